import contextlib
import csv
import dataclasses
import gc
import io
import itertools
import math
import re
import shutil
import subprocess
import sys
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import prelu_gpu
from benchmarks import cases, outlook, program, providers, results, speed, timing
from benchmarks.__main__ import main
from benchmarks.cases import CASES, CORE, PASSES, Case, check
from benchmarks.program import Deadline, ProgramError, TimeUpError
from benchmarks.providers import PROVIDERS, provide_copy
from prelu_gpu import launch, plan
from prelu_gpu.backend import Backend

COLUMNS = (
    "date,commit,gpu,driver,torch,triton,case,shape,layout,slope,dtype,slope_dtype,op,provider,"
    "device_us,call_us,bytes,gbps,pct_copy,extra_bytes"
)
SMALL = [
    Case("channels", (2, 6, 5, 8), torch.float16, slope_dtype=torch.float32),
    Case("last", (2, 6, 5, 8), torch.bfloat16, layout="channels_last"),
    Case("shared", (2, 6, 40), torch.float32, slope="shared"),
]
SMALL_LAYOUTS = [
    *SMALL,
    Case("sliced", (4, 6, 5, 8), torch.float32, layout="sliced"),
    Case("offset", (2, 6, 5, 8), torch.float16, layout="offset"),
    Case("features", (2, 5, 16), torch.bfloat16, slope_dtype=torch.float32, dim=-1),
    Case("one row", (61,), torch.float32, slope="shared"),
    Case("leaky", (2, 6, 5, 8), torch.float16, slope="number"),
    Case("leaky in place", (2, 6, 5, 8), torch.bfloat16, slope="number", inplace=True),
]
RUN = results.Run("2026-01-01", "abc", "Some GPU (80 GB)", "1.2", "2.11", "3.6")
NO_TIMES = ("0", "-1", "soon", "nan", "inf")
TORCH = ("prelu_gpu", "eager", "copy")
"""Providers that need no compiler."""
SETTINGS = speed.Settings(providers=TORCH, rounds=3)


class FakeDevice:
    """Runs on the CPU, by a clock that says so many microseconds each time it is asked."""

    name = "Fake GPU"
    l2_bytes = 300

    def __init__(self, device="cpu", times=None):
        self.device = torch.device(device)
        self._times = times or itertools.repeat(10000.0)
        self.timed = 0
        self.captured = 0

    def stream(self):
        return contextlib.nullcontext()

    def device_us(self, batch):
        batch()
        self.timed += 1
        return next(self._times)

    def call_us(self, batch):
        return 2 * self.device_us(batch)

    def extra_bytes(self, call):
        call()
        return 64

    def capture(self, batch):
        self.captured += 1
        return batch


@pytest.fixture
def commit(monkeypatch):
    monkeypatch.setenv("PRELU_GPU_COMMIT", "abc123")


@pytest.fixture
def quick_kernels(monkeypatch):
    """PyTorch's operator for the interpreted kernels, where they are not what is tested."""
    monkeypatch.setattr(prelu_gpu, "prelu", lambda x, weight, dim=1: F.prelu(x, weight))
    monkeypatch.setattr(prelu_gpu, "PReLU", lambda slopes, dim: torch.nn.PReLU(slopes))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(outlook, "host_table", lambda: "the cost of a call")


def quiet():
    return Console(file=io.StringIO(), width=160)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def run(cases, folder=None, device=None, console=None, deadline=None, **settings):
    settings = dataclasses.replace(SETTINGS, folder=folder, **settings)
    deadline = deadline or Deadline(math.inf)
    speed.benchmark(device or FakeDevice(), cases, settings, deadline, console or quiet())


def rows_of(cases, ops=tuple(PASSES), providers=TORCH):
    return list(itertools.product([case.name for case in cases], ops, providers))


def test_without_a_gpu_it_says_so_and_prints_what_needs_none(no_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(outlook, "machine_code", lambda: "registers")
    assert main(["--results", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Nothing is timed: there is no GPU here")
    lines = output.splitlines()
    for case in CASES:
        assert sum(line.startswith(f"  {case.name} ") for line in lines) == 1, case.name
    # The bytes of every operation, at the usual dtype.
    (monai,) = (line for line in lines if " monai-unet " in line)
    assert "float32" in monai
    assert [f"{passes * 226.492416:.1f}" in monai for passes in PASSES.values()] == [True] * 4
    for text in (
        "132 multiprocessors",
        "odd plane",
        f"less than {plan.SMALL:,} elements",
        "registers",
        "the cost of a call",
    ):
        assert text in output
    assert not list(tmp_path.iterdir())


def test_machine_code_is_asked_of_a_process_that_can_compile(monkeypatch):
    asked = []

    def run(command, env, **options):
        asked.append((command, env))
        return subprocess.CompletedProcess(command, 0, stdout="registers")

    machine_code = pytest.importorskip("benchmarks.machine_code", reason="needs Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", run)
    assert outlook.machine_code() == "registers"
    ((command, env),) = asked
    assert "TRITON_INTERPRET" not in env
    assert command[:3] == [sys.executable, "-m", "benchmarks.machine_code"]
    monkeypatch.setattr(machine_code, "INTERPRETED", False)
    assert machine_code.parse(command[3:]).target == ["sm_90"]


def test_machine_code_that_cannot_be_made_says_why(monkeypatch):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", stderr="Traceback\nno compiler\n\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert outlook.machine_code() == "not made: no compiler"


@pytest.mark.parametrize("command", ["speed", "training", "tune", "report"])
def test_commands_get_their_arguments_and_their_errors_are_status_1(command, monkeypatch, capsys):
    module, given = types.ModuleType(f"benchmarks.{command}"), []
    module.main = given.append
    monkeypatch.setitem(sys.modules, module.__name__, module)
    arguments = [*([command] if command != "speed" else []), "--out", "x"]
    assert main(arguments) == 0
    assert given == [["--out", "x"]]

    def fail(arguments):
        raise ProgramError("no such thing")

    module.main = fail
    assert main(arguments) == 1
    assert capsys.readouterr().err == "benchmarks: no such thing\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "iresnett"], ["--case iresnett", "core", "iresnet-7x7"]),
        *((["--minutes", text], ["--minutes", repr(text), "above 0"]) for text in NO_TIMES),
        (["tune", "--minutes", "0"], ["--minutes", "'0'", "above 0"]),
        (["training", "--minutes", "0"], ["--minutes", "'0'", "above 0"]),
        (["--core", "--case", "curve"], ["--core", "drop one"]),
    ],
)
def test_bad_arguments_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words)


def selected(*arguments):
    return speed.parse(arguments).cases


def test_cases_are_selected_by_name_group_and_dtype():
    assert selected() == list(CASES)
    assert selected("--core") == selected("--quick") == selected("--case", "core") == list(CORE)
    assert {case.name for case in selected("--case", "iresnet")} == {"iresnet"}
    both = selected("--case", "sliced", "curve")
    assert {case.name for case in both if case.group != "curve"} == {"sliced"}
    assert sum(case.group == "curve" for case in both) == 20 * 3
    assert {case.dtype for case in selected("--dtype", "float16")} == {torch.float16}
    assert 0 < len(selected("--core", "--dtype", "float16")) < len(CORE)


def test_every_case_is_there_once_in_every_dtype():
    pairs = {}
    for case in CASES:
        pairs.setdefault(case.name, []).append((case.dtype, case.weight_dtype))
    same = [(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    mixed = [(dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)]
    for case in CASES:
        expected = same + mixed if case.group == "model" else same
        if case.slope == "number":
            expected = [same[0], *mixed]
        assert sorted(pairs[case.name], key=str) == sorted(expected, key=str), case.name
        assert case.shape_name == CASES[[c.name for c in CASES].index(case.name)].shape_name


def test_the_most_telling_cases_come_first():
    assert len(CORE) == 14
    assert CASES[:14] == CORE
    groups = [case.group for case in CASES[14:]]
    assert groups == sorted(groups, key=["model", "leaky", "curve", "awkward"].index)
    # Every model in its usual dtype before any in another.
    names = {case.name for case in cases.MODELS}
    assert {case.name for case in CASES[: 14 + len(names)] if case.group == "model"} == names


@pytest.mark.parametrize("slope", ["shared", "channel"])
def test_curves_go_in_steps_of_four(slope):
    curve = [case for case in cases.CURVES if case.slope == slope]
    assert [math.prod(case.shape) for case in curve] == [4**n for n in range(5, 15)]
    assert {case.slopes for case in curve} == {1 if slope == "shared" else 64}


def test_inputs_lie_in_memory_as_the_layout_says():
    for case in SMALL_LAYOUTS:
        x, weight, grad_y = case.inputs(torch.device("cpu"))
        assert x.shape == grad_y.shape == case.shape
        assert x.is_leaf
        assert x.requires_grad
        assert weight.requires_grad
        assert weight.shape == (case.slopes,)
        dense = [
            t.is_contiguous(memory_format=cases.LAYOUTS.get(case.layout, torch.contiguous_format))
            for t in (x, grad_y)
        ]
        assert dense == [case.layout != "sliced", True]
        offset = case.layout == "offset"
        assert (grad_y.storage_offset(), grad_y.data_ptr() % 16 != 0) == (offset, offset)
        if case.layout == "sliced":
            assert x.stride() == (2 * 6 * 40, 40, 8, 1)
            assert x.storage_offset() == 6 * 40


def test_a_gpu_that_is_required_is_one_line_and_status_1(no_gpu, capsys):
    assert main(["--require-gpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "there is no GPU" in captured.err


def test_interpreted_kernels_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "backend", lambda device: Backend.INTERPRETER)
    assert main(["--require-gpu"]) == 1
    assert "the kernels do not run on the GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("monai-unet", 2 * 2 * 32 * 96**3 * 4, 3 * 2 * 32 * 96**3 * 4),
        ("iresnet", 2 * 128 * 64 * 112**2 * 2, 3 * 128 * 64 * 112**2 * 2),
        ("real-esrgan", 2 * 8 * 64 * 360 * 640 * 2, 3 * 8 * 64 * 360 * 640 * 2),
        ("iresnet-7x7", 2 * 128 * 512 * 49 * 2, 3 * 128 * 512 * 49 * 2),
        ("graph-infomax", 2 * 100000 * 512 * 4, 3 * 100000 * 512 * 4),
        ("conv-tasnet", 2 * 8 * 512 * 4000 * 2, 3 * 8 * 512 * 4000 * 2),
    ],
)
def test_bytes_of_the_cases(name, forward, backward):
    case = next(case for case in CORE if case.name == name)
    moved = [case.bytes_moved(op) for op in ("forward", "inference", "backward", "step")]
    assert moved == [forward, forward, backward, forward + backward]


@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("case", SMALL_LAYOUTS[:5], ids=lambda case: case.name)
def test_the_copy_moves_the_bytes_of_the_operation(case, op):
    sets = [case.inputs(torch.device("cpu")) for _ in range(2)]
    call = provide_copy(case, op, sets)
    targets = [call(0), call(1)]
    for target, inputs in zip(targets, sets, strict=True):
        # Read once and written once, dense, and something was.
        assert 2 * target.nbytes == case.bytes_moved(op)
        assert target.is_contiguous()
        start = inputs.x.detach().flatten()
        assert torch.equal(target[: len(start)], start)
    assert targets[0].data_ptr() != targets[1].data_ptr()


def assert_same(case, op, provider, sets):
    with torch.set_grad_enabled(op != "inference"):
        eager = PROVIDERS["eager"](case, op, sets)
        for number in (0, 1, 0):
            expected = eager(number)
            torch.testing.assert_close(provider(number), expected, rtol=0.05, atol=0.05)
            first = expected[0] if op == "step" else expected
            assert isinstance(first, tuple) or first.requires_grad == (op != "inference")


def test_the_operations_are_what_they_are_called():
    case = SMALL[2]
    sets = [case.inputs(torch.device("cpu"))]
    x, weight, grad_y = (tensor.detach() for tensor in sets[0])
    y = torch.where(x > 0, x, weight * x)
    grad_x = torch.where(x > 0, grad_y, weight * grad_y)
    grad_weight = torch.where(x > 0, 0.0, grad_y * x).sum().view(1)
    expected = {"forward": y, "inference": y, "backward": (grad_x, grad_weight)}
    expected["step"] = (y, grad_x, grad_weight)
    for op in PASSES:
        torch.testing.assert_close(PROVIDERS["eager"](case, op, sets)(0), expected[op])


def test_inference_is_that_of_the_modules(monkeypatch):
    monkeypatch.setattr(torch.nn.PReLU, "forward", lambda self, x: "PyTorch's")
    monkeypatch.setattr(prelu_gpu.PReLU, "forward", lambda self, x: "ours")
    sets = [SMALL[2].inputs(torch.device("cpu"))]
    assert PROVIDERS["eager"](SMALL[2], "inference", sets)(0) == "PyTorch's"
    assert PROVIDERS["prelu_gpu"](SMALL[2], "inference", sets)(0) == "ours"


@pytest.mark.parametrize("case", SMALL_LAYOUTS[:-1], ids=lambda case: case.name)
def test_providers_compute_the_same(case):
    sets = [case.inputs(torch.device("cpu")) for _ in range(2)]
    for op in case.ops:
        # A module has one set of slopes.
        used = [inputs._replace(weight=sets[0].weight) for inputs in sets]
        assert_same(case, op, PROVIDERS["prelu_gpu"](case, op, used), used)


@pytest.mark.parametrize("name", ["prelu_gpu", "eager"])
def test_leaky_relu_in_place_overwrites_its_input(name):
    case = SMALL_LAYOUTS[-1]
    assert case.ops == ("inference",)
    sets = [case.inputs(torch.device("cpu"))]
    x = sets[0].x.detach().clone()
    with torch.no_grad():
        y = PROVIDERS[name](case, "inference", sets)(0)
    assert y is sets[0].x
    expected = F.leaky_relu(x, cases.NEGATIVE_SLOPE)
    assert torch.equal(y, expected)
    assert not torch.equal(y, x)


def test_only_operations_that_a_case_has_are_timed(quick_kernels, tmp_path):
    run(SMALL_LAYOUTS[-1:], tmp_path)
    ops = [(row["op"], row["slope"], row["provider"]) for row in read(tmp_path / "fake-gpu.csv")]
    assert ops == [("inference", "number", name) for name in TORCH]


@pytest.mark.parametrize("case", SMALL_LAYOUTS[-2:], ids=lambda case: case.name)
def test_the_gate_is_red_where_leaky_relu_is_wrong(case, monkeypatch, device):
    leaky_relu = prelu_gpu.leaky_relu

    def wrong(x, negative_slope, inplace):
        return leaky_relu(x, 1.01 * negative_slope, inplace)

    monkeypatch.setattr(prelu_gpu, "leaky_relu", wrong)
    mistakes = check(case, device)
    assert [mistake.split(":")[0] for mistake in mistakes] == [
        "forward",
        "forward without grad",
        "input gradient",
    ]


@pytest.mark.parametrize("case", SMALL_LAYOUTS[:1], ids=lambda case: case.name)
def test_compiled_operators_compute_the_same(case, monkeypatch):
    compile_ = torch.compile
    compiled = []

    def without_a_toolchain(function, **options):
        compiled.append(function)
        return compile_(function, **options, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", without_a_toolchain)
    sets = [case.inputs(torch.device("cpu"))] * 2
    for op in PASSES:
        with torch.set_grad_enabled(op != "inference"):
            call = PROVIDERS["compile"](case, op, sets)
        assert_same(case, op, call, sets)
    assert compiled


@pytest.mark.parametrize("case", SMALL_LAYOUTS, ids=lambda case: case.name)
def test_jax_computes_the_same(case, device):
    if obstacle := providers.jax_obstacle(device):
        pytest.skip(obstacle)
    if not providers.serves("jax", case):
        pytest.skip("a layout that JAX does not know")
    sets = [case.inputs(device)] * 2

    def as_torch(result):
        if isinstance(result, tuple):
            return tuple(itertools.chain.from_iterable(map(flat, result)))
        return torch.from_dlpack(result)

    def flat(part):
        return as_torch(part) if isinstance(part, tuple) else [torch.from_dlpack(part)]

    for op in PASSES:
        call = PROVIDERS["jax"](case, op, sets)
        providers.wait_for_jax(call(0))
        with torch.set_grad_enabled(op != "inference"):
            expected = PROVIDERS["eager"](case, op, sets)(0)
        torch.testing.assert_close(as_torch(call(0)), expected, rtol=0.05, atol=0.05)


def test_a_jax_that_is_not_there_is_said_and_not_timed(quick_kernels, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    console = quiet()
    everyone = (*TORCH, "jax")
    run(SMALL[2:], tmp_path, ops=("forward",), providers=everyone, console=console)
    assert "JAX is not timed: " in console.file.getvalue()
    assert {row["provider"] for row in read(tmp_path / "fake-gpu.csv")} == set(TORCH)


def measurement(device_us, call_us):
    return timing.Measurement(64, device_samples=[device_us] * 3, call_samples=[call_us] * 3)


def test_rows_are_consistent():
    eager = timing.Measurement(64, device_samples=[99, 100, 101], call_samples=[120, 130, 125])
    measured = {"eager": eager, "copy": measurement(80, 90)}
    row = speed.make_row(SMALL[2], "backward", "eager", measured)
    assert (row.device_us, row.call_us, row.bytes, row.extra_bytes) == (100, 125, 3 * 1920, 64)
    assert (row.gbps, row.pct_copy) == (round(5760 / 100 / 1e3, 1), 80.0)
    assert (row.slope, row.shape, row.dtype) == ("shared", "2x6x40", "float32")


def test_who_is_timed_by_whole_calls_alone_has_no_device_figures():
    device, waited = FakeDevice(), []
    measured = timing.measure(
        device,
        {"jax": lambda number: number, "copy": lambda number: number},
        3,
        lambda: None,
        rounds=2,
        waits={"jax": waited.append},
    )
    row = speed.make_row(SMALL[0], "step", "jax", measured)
    assert (row.device_us, row.gbps, row.pct_copy, row.extra_bytes) == (None,) * 4
    assert row.call_us == 20000.0
    # To size the batch, and then in every round, for the last result.
    assert waited == [2, 0, 1]
    assert speed.make_row(SMALL[0], "step", "copy", measured).device_us == 10000.0


def test_a_speedup_is_by_the_time_that_counts():
    large = Case("large", (2**22,), torch.float32, slope="shared")
    small = dataclasses.replace(large, shape=(2**22 - 1,))
    eager, ours = measurement(30, 40), measurement(10, 20)
    assert speed.speedup(large, eager, ours) == 3
    assert speed.speedup(small, eager, ours) == 2
    assert speed.speedup(large, eager, timing.Measurement(None, call_samples=[10, 10])) == 4
    assert speed.speedup(large, None, ours) is None


def test_the_results_file_is_complete_after_every_row(tmp_path):
    file = results.ResultsFile(tmp_path, "-core", RUN, speed.Row)
    assert file.path == tmp_path / "some-gpu-80-gb-core.csv"
    assert file.path.read_text() == COLUMNS + "\n"
    measured = {"copy": measurement(1, 2)}
    for count, op in enumerate(PASSES, start=1):
        file.write(speed.make_row(SMALL[0], op, "copy", measured))
        rows = read(file.path)
        assert len(rows) == count
        assert rows[-1]["op"] == op
        assert rows[-1]["gpu"] == RUN.gpu
        assert rows[-1]["slope_dtype"] == "float32"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"commit": "def"}, "commit abc"),
        ({"driver": "1.3"}, "driver 1.2"),
    ],
)
def test_results_of_different_runs_are_not_mixed(other, words, tmp_path):
    file = results.ResultsFile(tmp_path, "", RUN, speed.Row)
    file.write(speed.make_row(SMALL[0], "step", "copy", {"copy": measurement(1, 2)}))
    later = dataclasses.replace(RUN, date="2026-01-02")
    assert len(results.ResultsFile(tmp_path, "", later, speed.Row).rows) == 1
    with pytest.raises(ValueError, match=words):
        results.ResultsFile(tmp_path, "", dataclasses.replace(later, **other), speed.Row)
    with pytest.raises(ValueError, match="other columns"):
        results.ResultsFile(tmp_path, "", later, timing.Measurement)
    assert len(read(file.path)) == 1


@pytest.mark.parametrize("commit", ["abc-dirty", "unknown"])
def test_results_of_no_commit_are_not_continued(commit, tmp_path):
    # The code may have changed between two runs of that name.
    run = dataclasses.replace(RUN, commit=commit)
    results.ResultsFile(tmp_path, "", run, speed.Row)
    with pytest.raises(ValueError, match=commit):
        results.ResultsFile(tmp_path, "", run, speed.Row)


def test_a_run_from_gate_to_table(commit, tmp_path):
    console = quiet()
    run(SMALL, tmp_path / "new", console=console)
    rows = read(tmp_path / "new" / "fake-gpu.csv")
    assert [(row["case"], row["op"], row["provider"]) for row in rows] == rows_of(SMALL)
    assert {row["commit"] for row in rows} == {"abc123"}
    assert {(row["device_us"], row["call_us"]) for row in rows} == {("10000.0", "20000.0")}
    table = console.file.getvalue()
    assert table.count(" prelu_gpu  ") == 3 * 4
    assert all(column in table for column in ("% of copy", "x eager", "extra MiB"))


def test_a_run_goes_on_where_the_last_one_stopped(quick_kernels, commit, tmp_path):
    cases = SMALL[1:]
    run(cases[:1], tmp_path, ops=("forward",), providers=("eager",))
    run(cases[:1], tmp_path, ops=("forward", "step"))
    device = FakeDevice()
    run(cases, tmp_path, device=device)
    rows = [(row["case"], row["op"], row["provider"]) for row in read(tmp_path / "fake-gpu.csv")]
    assert sorted(rows) == sorted(rows_of(cases))
    again = FakeDevice()
    run(cases, tmp_path, device=again)
    assert (device.timed > 0, again.timed) == (True, 0)


def test_another_commits_results_are_an_error(quick_kernels, commit, tmp_path, monkeypatch):
    run(SMALL[2:], tmp_path, ops=("step",))
    monkeypatch.setenv("PRELU_GPU_COMMIT", "def456")
    device = FakeDevice()
    with pytest.raises(ProgramError, match=r"--results .* abc123, and this is def456; ") as error:
        run(SMALL[2:], tmp_path, device=device)
    assert "\n" not in str(error.value)
    assert device.timed == 0


class Clock:
    """Says so many seconds more each time it is asked; a test may put it on."""

    def __init__(self, step=0):
        self.now = -step
        self._step = step

    def __call__(self):
        self.now += self._step
        return self.now


@pytest.mark.parametrize(("minutes", "finished"), [(2.25, 2), (0.25, 0), (math.inf, 4)])
def test_a_run_stops_before_its_minutes_are_over(
    quick_kernels, minutes, finished, commit, tmp_path
):
    # Each operation begins and ends by one look at the clock; two end at 100 seconds, and a third
    # would begin at 125 and end at 150, where the minutes are over at 135.
    console, deadline = quiet(), Deadline(minutes, Clock(25))
    run(SMALL[2:], tmp_path, deadline=deadline, console=console)
    rows = read(tmp_path / "fake-gpu.csv")
    assert list(dict.fromkeys(row["op"] for row in rows)) == list(PASSES)[:finished]
    assert len(rows) == finished * len(TORCH)
    stopped = f"{4 - finished} of 4 operations are not timed" in console.file.getvalue()
    assert stopped == (finished < 4)


def test_no_piece_of_work_begins_that_would_not_end_in_time():
    clock = Clock()
    deadline = Deadline(10 / 60, clock)
    clock.now = 2  # what came before the pieces does not count
    for seconds in (1, 3, 1):
        with deadline.piece():
            clock.now += seconds
    with deadline.piece():  # at 7; the longest took 3
        clock.now += 0.5
    with pytest.raises(TimeUpError), deadline.piece():  # at 7.5
        pytest.fail("the piece has begun")


def test_a_deadline_is_over_when_the_seconds_needed_are_not_left():
    clock = Clock()
    deadline = Deadline(2, clock)
    clock.now = 20
    deadline.check()
    deadline.check(100)
    with pytest.raises(TimeUpError):
        deadline.check(101)
    Deadline(math.inf, clock).check(1e9)


def test_a_run_cut_off_keeps_what_it_finished(quick_kernels, tmp_path):
    def times():
        # One operation asks the clock so often: to size both batches, then twice a round.
        yield from itertools.repeat(10000.0, len(TORCH) * (2 + 2 * 3) + 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SMALL[2:], tmp_path, device=FakeDevice(times=times()))
    rows = read(tmp_path / "fake-gpu.csv")
    assert [(row["op"], row["provider"]) for row in rows] == [("forward", p) for p in TORCH]


def test_a_compiler_that_fails_is_said_and_not_timed(quick_kernels, tmp_path, monkeypatch):
    def failing(function, **options):
        def call(*arguments):
            raise ValueError("no such luck\nand more")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    console = quiet()
    everyone = (*TORCH, "compile")
    run(SMALL[2:], tmp_path, providers=everyone, console=console)
    assert {row["provider"] for row in read(tmp_path / "fake-gpu.csv")} == set(TORCH)
    notices = [
        f"shared float32 {op}, compile is not timed: ValueError: no such luck" for op in PASSES
    ]
    assert "\n".join(notices) in console.file.getvalue()
    assert (tmp_path / "fake-gpu-notices.txt").read_text().splitlines() == notices


def test_inference_alone_runs_without_grad(quick_kernels, monkeypatch):
    seen = {}

    def watched(case, op, sets):
        def call(number):
            seen.setdefault(op, set()).add(torch.is_grad_enabled())

        return call

    monkeypatch.setitem(PROVIDERS, "eager", watched)
    run(SMALL[2:], providers=("eager",))
    assert seen == {op: {op != "inference"} for op in PASSES}


def test_jax_is_timed_by_whole_calls_where_it_knows_the_layout(
    quick_kernels, tmp_path, monkeypatch
):
    waited = []
    monkeypatch.setattr(speed, "jax_obstacle", lambda device: None)
    monkeypatch.setitem(PROVIDERS, "jax", lambda case, op, sets: lambda number: op)
    monkeypatch.setitem(providers.WAITS, "jax", waited.append)
    run(SMALL[1:], tmp_path, ops=("step",), providers=("copy", "jax"))
    rows = [(row["case"], row["provider"]) for row in read(tmp_path / "fake-gpu.csv")]
    assert rows == [("last", "copy"), ("shared", "copy"), ("shared", "jax")]
    jax = read(tmp_path / "fake-gpu.csv")[-1]
    assert (jax["device_us"], jax["call_us"], jax["extra_bytes"]) == ("", "20000.0", "")
    assert waited == ["step"] * 4


def test_our_own_failure_is_no_notice(monkeypatch):
    def failing(case, op, sets):
        raise ValueError("ours")

    monkeypatch.setitem(PROVIDERS, "prelu_gpu", failing)
    with pytest.raises(ValueError, match="ours"):
        run(SMALL[2:])


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    device = FakeDevice()
    with pytest.raises(ProgramError, match=r"--results .*; give a folder that can be written"):
        run(SMALL, tmp_path / "file", device=device)
    assert device.timed == 0


def wrong_forward(x, weight, dim=1):
    y = F.prelu(x, weight)
    return torch.cat([y.flatten()[:-1], y.flatten()[-1:] * 1.01]).view_as(y)


def wrong_input_gradient(x, weight, dim=1):
    return F.prelu(x.detach() + 1.01 * (x - x.detach()), weight)


def wrong_slope_gradient(x, weight, dim=1):
    return F.prelu(x, weight.detach() + 1.01 * (weight - weight.detach()))


def unwritten_forward(x, weight, dim=1):
    y = F.prelu(x, weight)
    y.data[-1] = math.nan
    return y


def wrong_without_grad(x, weight, dim=1):
    return F.prelu(x, weight) if torch.is_grad_enabled() else F.prelu(x, 1.01 * weight)


@pytest.mark.parametrize("case", SMALL_LAYOUTS, ids=lambda case: case.name)
def test_the_gate_is_green(case, device):
    assert check(case, device) == []


def test_the_gate_is_green_in_parts(device, monkeypatch):
    monkeypatch.setattr("benchmarks.cases.CHECKED_ELEMENTS", 100)
    case = Case("parts", (7, 6, 5, 8), torch.float32)
    assert check(case, device) == []
    monkeypatch.setattr(prelu_gpu, "prelu", wrong_slope_gradient)
    assert check(case, device) == ["slope gradient: 6 of 6 elements are wrong"]


@pytest.mark.parametrize(
    ("prelu", "words"),
    [
        (wrong_forward, "forward: 1 of 480"),
        (unwritten_forward, "forward: 240 of 480"),
        (wrong_input_gradient, "input gradient: 480 of 480"),
        (wrong_slope_gradient, "slope gradient: 1 of 1"),
        (wrong_without_grad, "forward without grad: "),
    ],
)
def test_a_red_gate_takes_no_time(prelu, words, monkeypatch, tmp_path, device):
    monkeypatch.setattr(prelu_gpu, "prelu", prelu)
    fake, console = FakeDevice(device), quiet()
    with pytest.raises(ProgramError, match=re.escape(f"shared (float32): {words}")):
        run(SMALL[2:], tmp_path, device=fake, console=console)
    assert fake.timed == 0
    assert "prelu_gpu  " not in console.file.getvalue()
    assert read(tmp_path / "fake-gpu.csv") == []


@pytest.fixture
def red(monkeypatch):
    """SMALL[0] is computed wrong, or not at all; SMALL[1] and SMALL[2] are right."""

    def make(kind):
        def check(case, device):
            if case != SMALL[0]:
                return []
            if kind == "failing":
                raise ValueError("no kernel\nfor it")
            return ["forward: 3 of 480 elements are wrong"]

        monkeypatch.setattr(speed, "check", check)

    return make


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("wrong", "channels (float16, slope float32): forward: 3 of 480 elements are wrong"),
        ("failing", "channels (float16, slope float32): ValueError: no kernel"),
    ],
)
def test_a_red_case_is_named_and_the_others_are_timed(
    kind, words, red, quick_kernels, monkeypatch, tmp_path
):
    red(kind)
    monkeypatch.setitem(PROVIDERS, "compile", PROVIDERS["eager"])
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    console = quiet()
    with pytest.raises(ProgramError) as error:
        run(SMALL, tmp_path, providers=(*TORCH, "compile"), console=console)
    assert str(error.value) == f"wrong results; these cases are not timed:\n{words}"
    rows = [(row["case"], row["provider"]) for row in read(tmp_path / "fake-gpu.csv")]
    assert set(rows) == set(itertools.product(("last", "shared"), (*TORCH, "compile")))
    assert (tmp_path / "fake-gpu-notices.txt").read_text() == f"{words}\n"
    assert "minutes given are over" not in console.file.getvalue()


@pytest.fixture
def happened(monkeypatch):
    """What a run checks and compiles, in order."""
    events = []

    def check(case, device):
        events.append(f"check {case.name}")
        return []

    def compiled(case, op, sets):
        events.append(f"compile {case.name}")
        return PROVIDERS["eager"](case, op, sets)

    def ours(case, op, sets):
        events.append(f"time {case.name}")
        return PROVIDERS["eager"](case, op, sets)

    monkeypatch.setattr(speed, "check", check)
    monkeypatch.setitem(PROVIDERS, "compile", compiled)
    monkeypatch.setitem(PROVIDERS, "prelu_gpu", ours)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    return events


def test_a_case_is_checked_just_before_its_timing_and_none_that_is_not_timed(happened):
    # Two operations of each case; there is time for three.
    run(SMALL, deadline=Deadline(175 / 60, Clock(25)), ops=("forward", "step"))
    channels, last = ["check channels", *["time channels"] * 2], ["check last", "time last"]
    assert happened == channels + last


def test_compilers_come_when_all_cases_are_timed_by_the_others(happened, commit, tmp_path):
    cases, options = SMALL[1:], {"ops": ("step",), "providers": (*PROVIDERS,)}
    run(cases, tmp_path, **options, deadline=Deadline(175 / 60, Clock(25)))
    others = ["check last", "time last", "check shared", "time shared"]
    assert happened == [*others, "compile last"]
    # Another call goes on, and knows nothing of the last one's checks.
    happened.clear()
    run(cases, tmp_path, **options)
    assert happened == ["check shared", "compile shared"]
    rows = [(row["case"], row["provider"]) for row in read(tmp_path / "fake-gpu.csv")]
    first = [("last", name) for name in TORCH] + [("shared", name) for name in TORCH]
    assert [row for row in rows if row[1] != "jax"] == [
        *first,
        ("last", "compile"),
        ("shared", "compile"),
    ]


def test_what_is_compiled_is_compared_with_eager_of_the_same_run(happened):
    console = quiet()
    providers_ = "eager", "copy", "compile"
    run(SMALL[2:], ops=("step",), providers=providers_, console=console)
    (line,) = (line for line in console.file.getvalue().splitlines() if " compile  " in line)
    assert line.split()[-2] == "1.00"


def test_sets_exceed_the_cache_three_times_up_to_a_limit():
    for nbytes in (4, 299, 300, 899, 900, 10**6):
        sets = timing.count_sets(FakeDevice(), nbytes)
        assert sets * nbytes > 3 * FakeDevice.l2_bytes >= (sets - 1) * nbytes
    assert timing.count_sets(FakeDevice(), 1) == timing.SETS_LIMIT < 900


def test_a_rotation_uses_all_sets_and_keeps_their_results():
    class Result:
        pass

    numbers, results = [], []

    def call(number):
        numbers.append(number)
        result = Result()
        results.append(weakref.ref(result))
        return result

    rotation = timing.Rotation(call, sets=3)
    assert rotation.run(2) is results[-1]()
    assert rotation.run(5) is results[-1]()
    gc.collect()
    assert numbers == [0, 1, 2, 0, 1, 2, 0]
    assert [result() is not None for result in results] == [False] * 4 + [True] * 3


def test_providers_take_turns_in_every_round():
    order = []

    def caller(name):
        return lambda number: order.append(name)

    advanced = []
    calls = {name: caller(name) for name in "ab"}
    measured = timing.measure(FakeDevice(), calls, 1, lambda: advanced.append(None), rounds=3)
    rounds = order[-2 * 2 * 3 :]
    assert rounds == ["a", "a", "b", "b"] * 3
    assert len(advanced) == 3
    assert measured["a"].device_samples == [10000.0] * 3


def test_batches_are_sized_by_the_device_time():
    numbers = []
    device = FakeDevice(times=itertools.repeat(1000.0))
    measured = timing.measure(device, {"a": numbers.append}, 2, lambda: None, rounds=3)
    # 1000 us for two calls: batches of five to reach 2500 us; before them two rotations to warm
    # up, one to size the batch, and a call for its memory.
    assert len(numbers) == 4 + 2 + 1 + 2 * 3 * 5
    assert measured["a"].device_us == 1000 / 5
    assert measured["a"].call_us == 2000 / 5
    assert device.captured == 0


def test_small_calls_are_timed_by_replays_of_a_rotation():
    numbers = []
    device = FakeDevice(times=itertools.repeat(1000.0))
    measured = timing.measure(device, {"a": numbers.append}, 4, lambda: None, rounds=3, replay=True)
    # 1000 us for one replay of four calls: two of them to reach 2500 us. Whole calls as ever.
    assert device.captured == 1
    assert measured["a"].device_us == 1000 / (2 * 4)
    assert measured["a"].call_us == 2000 / 10
    assert numbers[-(2 * 4 + 10) :][:8] == [0, 1, 2, 3] * 2
    assert measured["a"].notice is None


def test_what_cannot_be_captured_is_timed_with_events_and_said(quick_kernels, commit, tmp_path):
    class Uncapturable(FakeDevice):
        def capture(self, batch):
            raise RuntimeError("not permitted\nwhile capturing")

    console = quiet()
    run(SMALL[2:], tmp_path, device=Uncapturable(), console=console)
    rows = read(tmp_path / "fake-gpu.csv")
    assert len(rows) == len(rows_of(SMALL[2:]))
    assert {row["device_us"] for row in rows} == {"10000.0"}
    words = "no CUDA graph, timed with events: RuntimeError: not permitted\n"
    assert f"shared float32 forward, eager: {words}" in console.file.getvalue()


@pytest.mark.parametrize(("elements", "captured"), [(2**18, 0), (2**18 - 1, 3)])
def test_graphs_are_for_less_than_a_mebibyte(quick_kernels, elements, captured, monkeypatch):
    monkeypatch.setattr(speed, "check", lambda case, device: [])
    device = FakeDevice()
    monkeypatch.setattr(device, "l2_bytes", 1)
    case = Case("size", (elements,), torch.float32, slope="shared")
    run([case], device=device, ops=("forward",))
    assert device.captured == captured


def test_spread_is_the_interquartile_range():
    measured = timing.Measurement(0, device_samples=[1, 2, 3, 4, 5, 6, 7], call_samples=[])
    assert (measured.device_us, measured.spread_us) == (4, 4)


class FakeEvent:
    """An event that the spin kernel reaches before the host has queued the batch, or not."""

    reached = ()

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def query(self):
        return next(FakeEvent.reached)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.5


@pytest.fixture
def spins(monkeypatch):
    """The cycles of each spin kernel before a batch, by a GPU that is not there."""
    cycles = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"name": "Fake", "L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return cycles


@pytest.mark.parametrize(
    ("reached", "repeats"),
    [([False], 1), ([True, True, False], 3), (itertools.repeat(True), 6)],
    ids=["queued in time", "too late twice", "never in time"],
)
def test_a_batch_is_queued_before_it_starts(reached, repeats, spins, monkeypatch):
    batches = []
    monkeypatch.setattr(FakeEvent, "reached", iter(reached))
    gpu = timing.Gpu()
    assert gpu.device_us(lambda: batches.append(None)) == 1500
    assert len(batches) == repeats
    assert spins == [spins[0] * 2**n for n in range(repeats)]
    # A hiccup, as a batch that never fits, leaves the next one its short spin.
    monkeypatch.setattr(FakeEvent, "reached", itertools.repeat(False))
    gpu.device_us(lambda: None)
    assert spins[-1] == spins[0]


def test_the_spin_is_as_long_as_the_host_needs_and_no_longer(spins, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def batch(seconds):
        def queue():
            now[0] += seconds

        return queue

    gpu = timing.Gpu()
    monkeypatch.setattr(FakeEvent, "reached", iter([True, True, False]))
    gpu.device_us(batch(0.0015))
    monkeypatch.setattr(FakeEvent, "reached", itertools.repeat(False))
    for seconds in (0.0015, 0.0001, 0.0001):
        gpu.device_us(batch(seconds))
    # Where 3 of 4 ms were needed, with a margin of two, the spin stays about as long.
    assert spins[2] == 4 * spins[0]
    assert spins[3] == int(0.003 * timing.LEAD_CYCLES_PER_S)
    assert spins[4:] == [spins[3], spins[0]]


def test_a_batch_that_events_cannot_time_is_as_long_as_their_step(spins, monkeypatch):
    monkeypatch.setattr(FakeEvent, "reached", itertools.repeat(False))
    monkeypatch.setattr(FakeEvent, "elapsed_time", lambda self, end: 0.0)
    gpu = timing.Gpu()
    monkeypatch.setattr(gpu, "call_us", lambda batch: 10.0)
    monkeypatch.setattr(gpu, "extra_bytes", lambda call: 0)
    calls = dict.fromkeys(("prelu_gpu", "eager", "copy"), lambda number: None)
    measured = timing.measure(gpu, calls, 2, lambda: None, rounds=3)
    row = speed.make_row(SMALL[2], "forward", "eager", measured)
    assert (row.device_us, row.pct_copy) == (round(0.5 / 64, 3), 100)


def test_an_answer_nobody_gives_is_unknown():
    assert results.ask("no-such-program-here") == "unknown"
    assert results.ask("git", "no-such-command") == "unknown"


def git(folder, *arguments):
    who = "-c", "user.name=n", "-c", "user.email=e"
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_run_of_no_commit_is_said_loudly(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("PRELU_GPU_COMMIT", raising=False)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--allow-empty", "--message", "another repository's")

    def commit_of(checkout):
        (checkout / "benchmarks").mkdir(parents=True)
        monkeypatch.setattr(results, "__file__", str(checkout / "benchmarks" / "results.py"))
        return results.describe_run("Fake GPU").commit

    assert re.fullmatch("[0-9a-f]{7,}", commit_of(tmp_path))
    assert capsys.readouterr().err == ""
    # Files without history, which lie within that repository.
    assert commit_of(tmp_path / "copy") == "unknown"
    error = capsys.readouterr().err
    assert "WARNING: this checkout (unknown) is no commit" in error
    assert "set PRELU_GPU_COMMIT" in error
    monkeypatch.setenv("PRELU_GPU_COMMIT", "abc123")
    assert results.describe_run("Fake GPU").commit == "abc123"
    assert capsys.readouterr().err == ""


@pytest.fixture
def real_allocations(monkeypatch):
    """The guarded ones of conftest.py would be timed too."""
    monkeypatch.setattr(launch, "torch", torch)


@pytest.mark.gpu
def test_one_case_on_a_gpu(real_allocations, tmp_path):
    case = dataclasses.replace(CORE[3], name="real")
    gpu = timing.Gpu()
    everyone = ("prelu_gpu", "eager", "compile", "copy")
    run([case], tmp_path, device=gpu, providers=everyone)
    (path,) = tmp_path.glob("*.csv")  # a notice may lie beside it
    notices = [notice.read_text() for notice in tmp_path.glob("*.txt")]
    rows = {(row["op"], row["provider"]): row for row in read(path)}
    assert set(rows) == set(itertools.product(PASSES, everyone)), notices
    for row in rows.values():
        assert float(row["device_us"]) > 0
        assert row["gpu"] == gpu.name
    # A backward keeps nothing the size of x; PyTorch's does.
    assert int(rows["backward", "prelu_gpu"]["extra_bytes"]) < case.nbytes / 2
    assert int(rows["backward", "eager"]["extra_bytes"]) >= case.nbytes
    assert int(rows["forward", "copy"]["extra_bytes"]) == 0


@pytest.mark.gpu
def test_a_replay_takes_the_device_no_longer_than_the_launches(real_allocations):
    # Columns, which have no counters: a graph fills its own with zeros, one launch more.
    case = Case("small", (256, 64), torch.float32)
    gpu = timing.Gpu()
    with gpu.stream():
        sets = [case.inputs(gpu.device) for _ in range(32)]
        for op in PASSES:
            with torch.set_grad_enabled(op != "inference"):
                calls = {name: PROVIDERS[name](case, op, sets) for name in TORCH}
                replayed, launched = (
                    timing.measure(gpu, calls, len(sets), lambda: None, rounds=7, replay=replay)
                    for replay in (True, False)
                )
            for name in TORCH:
                assert replayed[name].notice is None
                noise = 1 + launched[name].spread_us + replayed[name].spread_us
                assert 0 < replayed[name].device_us < launched[name].device_us + noise


@pytest.mark.gpu
def test_jax_is_timed_by_whole_calls_on_a_gpu(real_allocations, tmp_path):
    gpu = timing.Gpu()
    if obstacle := providers.jax_obstacle(gpu.device):
        pytest.skip(obstacle)
    case = Case("small", (4, 16, 64, 64), torch.bfloat16)
    run([case], tmp_path, device=gpu, providers=("jax", "copy"))
    (path,) = tmp_path.glob("*.csv")  # a notice may lie beside it
    notices = [notice.read_text() for notice in tmp_path.glob("*.txt")]
    rows = [row for row in read(path) if row["provider"] == "jax"]
    assert len(rows) == len(PASSES), notices
    for row in rows:
        assert float(row["call_us"]) > 0
        assert row["device_us"] == row["pct_copy"] == row["extra_bytes"] == ""
