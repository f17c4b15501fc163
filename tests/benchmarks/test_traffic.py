"""The table of what training steps move, and its parts; `make test-full` counts all of it again."""

import re
import sys

import pandas as pd
import pytest
import torch
from support import run_program
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Inductor generates code for Triton; it is not installed")
pytest.importorskip("typer")
if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from torch import nn

import prelu_gpu
from benchmarks import traffic
from benchmarks.cases import LAYOUTS
from benchmarks.inductor import Kernel, read_kernels
from prelu_gpu import launch_norm
from prelu_gpu.launch_norm import norm_prelu_backward, norm_prelu_forward
from prelu_gpu.layout import Norm
from prelu_gpu.rules import gpu_rules, using_rules
from prelu_gpu.run import intercepting


def test_readmes_table_is_the_files():
    text, rows = traffic.README.read_text(), pd.read_csv(traffic.FILE)
    assert traffic.BETWEEN_MARKERS.findall(text) == [traffic.readme_block(rows)]
    (version,) = re.findall(r"Inductor (\d+\.\d+)", text)
    assert {name[: len(version)] for name in rows["torch"]} == {version}


def test_the_table_says_8_passes_of_norms_and_5_in_evaluation():
    rows = pd.read_csv(traffic.FILE)
    rows = rows[(rows["provider"] == "prelu_gpu") & rows["case"].str.contains("Norm")]
    assert len(rows) == 6
    for row in rows.itertuples():
        passes = [row.forward_reads + row.forward_writes, row.backward_reads + row.backward_writes]
        evaluation = "evaluation" in row.case
        assert passes == pytest.approx((2, 3) if evaluation else (3, 5), rel=0.02)
        # An instance norm's parameters are summed over the samples by one launch more.
        launches = (2, 2) if evaluation else (3, 4) if "Instance" in row.case else (3, 3)
        assert (row.forward_launches, row.backward_launches) == launches
        assert row.saved == 1


@pytest.mark.parametrize("provider", traffic.PROVIDERS)
def test_what_is_counted_again_is_what_the_table_says(provider, request, tmp_path):
    cases = slice(None)
    if request.config.getoption("--hypothesis-profile", default="") != "full":
        if provider != "eager":
            pytest.skip("make test-full counts it, in a minute")
        cases = slice(1, 2)
    source = f"""
from benchmarks import traffic
rows = traffic.count("{provider}", traffic.CASES[{cases}])
rows.to_csv("{tmp_path}/new.csv", index=False)
"""
    run_program(source, interpret=False, timeout=900)
    old, new = pd.read_csv(traffic.FILE), pd.read_csv(tmp_path / "new.csv")
    old = old[old["provider"] == provider][cases]
    assert not traffic.differences(old, new)


# What norms launch, allocate and save

IRESNET, MONAI = (128, 64, 112, 112), (2, 32, 96, 96, 96)
NORMS = {
    "batch": (IRESNET, "float16", "contiguous"),
    "batch channels_last": (IRESNET, "float16", "channels_last"),
    "instance": (MONAI, "float32", "contiguous"),
    "instance channels_last": (MONAI, "float32", "channels_last_3d"),
    "evaluation": (IRESNET, "float16", "contiguous"),
    "evaluation channels_last": (IRESNET, "float16", "channels_last"),
}


class Allocations(TorchDispatchMode):
    """Elements of each fresh tensor of a block, and the operators that were called."""

    def __init__(self):
        super().__init__()
        self.elements, self.operators = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0].removeprefix("aten::")
        self.operators.add(name)
        if name.startswith("empty"):
            self.elements.append(result.numel())
        return result


@pytest.mark.parametrize("slopes", ["one slope", "a slope each"])
@pytest.mark.parametrize("case", NORMS)
def test_a_norm_launches_little_and_allocates_its_results(case, slopes, monkeypatch):
    # Not the guarded allocations of conftest.py.
    monkeypatch.setattr(launch_norm, "torch", torch)
    shape, dtype, layout = NORMS[case]
    norm = Norm(not case.startswith("evaluation"), case.startswith("instance"), 1e-5)
    like = {"dtype": getattr(torch, dtype), "device": "meta"}
    x = torch.empty(shape, **like, memory_format=LAYOUTS[layout])
    slope = torch.empty(1 if slopes == "one slope" else shape[1], device="meta")
    weight, bias, *running = (torch.empty(shape[1], device="meta") for _ in range(4))
    running = (None, None) if norm.instances else running
    launches = []
    with (
        using_rules(lambda device, itemsize, backward: gpu_rules(132, itemsize, backward)),
        intercepting(lambda call, values: launches.append(call.kernel.__name__)),
        Allocations() as made,
    ):
        y, table = norm_prelu_forward(x, slope, weight, bias, *running, norm, 0.1, x.dtype)
        forward = len(launches)
        norm_prelu_backward(y, x, table, slope, weight, bias, norm, (True, True, True, True))
    backward = len(launches) - forward
    most = (3, 3 + norm.instances) if norm.training else (2, 2)
    assert (forward, backward) == most, launches
    assert sorted(made.elements)[-2:] == [x.numel()] * 2  # y and its gradient's
    assert sorted(made.elements)[-3] <= 2**18
    # A slice has no kernel.
    others = {name for name in made.operators - {"slice"} if not name.startswith("empty")}
    assert not others


def test_a_norm_saves_its_input_and_tables_of_its_channels(device):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 6, 8, 8, 8, device=device, requires_grad=True)
    slope, weight, bias = (torch.rand(6, device=device, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = [
            prelu_gpu.batch_norm_prelu(x, slope, None, None, weight, bias, True),
            prelu_gpu.instance_norm_prelu(x, slope, weight, bias),
        ]
    assert all(y.grad_fn is not None for y in ys)
    others = [tensor for tensor in saved if tensor.data_ptr() != x.data_ptr()]
    assert len(saved) - len(others) == len(ys)
    assert all(tensor.shape[-1] in (6, 4 * 6) and tensor.numel() <= 7 * 24 for tensor in others)


PASSES = """
import sys
import numpy as np
import torch
sys.path.insert(0, "tests")
from ptx import driver
driver.install()
from benchmarks.cases import LAYOUTS
from benchmarks.traffic import count_bytes
from prelu_gpu.launch_norm import norm_prelu_backward, norm_prelu_forward
from prelu_gpu.layout import Norm
from prelu_gpu.run import execute, intercepting

def some(count):
    return np.unique(np.linspace(0, count - 1, 12).astype(int))

def count(call, values):
    accesses = []
    with driver.emulation(ctas=some, trace=accesses, complete=False, count=False):
        execute(call, values)
    for tensor in values.values():
        if isinstance(tensor, torch.Tensor) and tensor.numel() == x.numel():
            first, touched = tensor.data_ptr(), [np.empty(0, int)]
            for _, size, _, at in accesses:
                at = at[(at >= first) & (at < first + tensor.nbytes)].astype(int)
                elements = at[:, None] + np.arange(0, size, tensor.itemsize)
                touched.append(elements.ravel())
            each = len(np.unique(np.concatenate(touched))) * tensor.itemsize
            passes.append(sum(count_bytes(accesses, tensor)) / each)

shape, dtype, layout = {case}
norm = Norm(*{norm}, 1e-5)
x = torch.empty(shape, dtype=getattr(torch, dtype), memory_format=LAYOUTS[layout])
slope, weight, bias, *running = (torch.zeros(shape[1]) for _ in range(5))
running = (None, None) if norm.instances else running
passes = []
with intercepting(count):
    y, table = norm_prelu_forward(x, slope, weight, bias, *running, norm, 0.1, x.dtype)
    forward, passes = sum(passes), []
    norm_prelu_backward(y, x, table, slope, weight, bias, norm, (True, True, True, True))
print(forward, sum(passes))
"""


@pytest.mark.parametrize("case", NORMS)
def test_the_passes_of_a_norm(case, request):
    """Of some programs of each launch on tensors as large as those of networks."""
    if request.config.getoption("--hypothesis-profile", default="") != "full":
        pytest.skip("make test-full counts them")
    training, instances = not case.startswith("evaluation"), case.startswith("instance")
    source = PASSES.replace("{case}", repr(NORMS[case]))
    source = source.replace("{norm}", repr((training, instances)))
    output, _ = run_program(source, interpret=False, timeout=300)
    passes = [float(word) for word in output.split()]
    assert passes == pytest.approx((3, 5) if training else (2, 3), rel=0.02)


CODE = """
def triton_red_0(in_ptr0, in_ptr1, in_out_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp0 = tl.load(in_ptr0 + (r0_1 + 32*x0), xmask)
        tmp1 = tl.load(in_ptr1 + (x0), xmask)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        tmp2 = tl.load(in_ptr0 + (r0_1 + 32*x0), xmask)
        tmp3 = tl.load(in_out_ptr0 + (r0_1 + 32*x0), xmask)
        tl.store(in_out_ptr0 + (r0_1 + 32*x0), tmp3, xmask)
    tl.store(out_ptr0 + (x0), tmp1, xmask)
''', device_str='cuda')

def triton_poi_1(in_ptr0, out_ptr1, xnumel, XBLOCK : tl.constexpr):
    tl.store(out_ptr1 + (x0), tl.load(in_ptr0 + (x0), xmask), xmask)
''', device_str='cuda')

    def call(self, args):
        primals_1, primals_2 = args
        buf0 = empty_strided_cuda((2, 32), (32, 1), torch.float32)
        buf1 = reinterpret_tensor(buf0, (64, ), (1, ), 0); del buf0  # reuse
        buf2 = empty_strided_cuda((2, ), (1, ), torch.float32)
        triton_red_0.run(primals_1, primals_2, buf1, buf2, 64, stream=raw_stream0)
        buf3 = empty_strided_cuda((64, ), (1, ), torch.bool)
        triton_poi_1.run(buf1, buf3, 64, stream=raw_stream0)
"""


def test_every_loop_counts_and_a_buffer_counts_by_its_bytes():
    assert list(read_kernels(CODE, 64, {"primals_1": 2})) == [
        Kernel("triton_red_0", 64 * (2 + 2 + 4), 64 * 4),
        Kernel("triton_poi_1", 64 * 4, 64 * 1),
    ]


def test_what_cannot_be_counted_is_named():
    with pytest.raises(NotImplementedError, match=r"extern_kernels\.mm in"):
        list(read_kernels(CODE + "        extern_kernels.mm(buf1, buf2)\n", 64, {}))
    case = traffic.Case("", (2, 3), lambda library, dtype: nn.GELU())
    with pytest.raises(NotImplementedError, match="aten::gelu: OPERATORS"):
        traffic.observe_step(case, nn)


@pytest.fixture
def count(monkeypatch, tmp_path, commit):
    """The program with another count, README and file."""
    (tmp_path / "README.md").write_text(traffic.README.read_text())
    rows = pd.read_csv(traffic.FILE)
    rows.to_csv(tmp_path / "traffic.csv", index=False)
    rows = rows.loc[:, "case":]
    monkeypatch.setattr(traffic, "INTERPRETED", False)
    monkeypatch.setattr(traffic, "README", tmp_path / "README.md")
    monkeypatch.setattr(traffic, "FILE", tmp_path / "traffic.csv")
    monkeypatch.setattr(traffic, "count_all", lambda: rows)
    return rows


def test_a_cell_that_is_no_longer_true_fails_and_is_named_until_it_is_written(count, cli, capsys):
    assert cli("traffic") == 0
    count.loc[1, "backward_reads"] += 0.5
    assert cli("traffic") == 1
    error = capsys.readouterr().err
    assert (
        "PReLU, one slope, 16x64x96x96 float32, compile: backward_reads was 2 and is 2.5" in error
    )
    assert cli("traffic", "--write") == 0
    assert "5.5 (2 + 3.5)" in traffic.README.read_text()
    assert cli("traffic") == 0
    assert set(pd.read_csv(traffic.FILE)["commit"]) == {"abc123"}
