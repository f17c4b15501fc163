"""The table of what training steps move, and its parts; `make test-full` counts all of it again."""

import re
import sys

import pandas as pd
import pytest
from support import run_program

pytest.importorskip("triton", reason="Inductor generates code for Triton; it is not installed")
pytest.importorskip("typer")
if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from torch import nn

from benchmarks import traffic
from benchmarks.inductor import Kernel, read_kernels


def test_readmes_table_is_the_files():
    text, rows = traffic.README.read_text(), pd.read_csv(traffic.FILE)
    assert traffic.BETWEEN_MARKERS.findall(text) == [traffic.readme_block(rows)]
    (version,) = re.findall(r"Inductor (\d+\.\d+)", text)
    assert {name[: len(version)] for name in rows["torch"]} == {version}


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
