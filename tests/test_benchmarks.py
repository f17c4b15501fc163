import csv
import dataclasses
import gc
import io
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import benchmarks.__main__ as program
import prelu_gpu
from benchmarks import timing
from benchmarks.cases import CASES, PASSES, PROVIDERS, Case, check, provide_copy
from prelu_gpu import launch
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
RUN = program.Run("2026-01-01", "abc", "Some GPU (80 GB)", "1.2", "2.11", "3.6")


class FakeDevice:
    """Runs on the CPU, by a clock that says so many microseconds each time it is asked."""

    name = "Fake GPU"
    l2_bytes = 300

    def __init__(self, device="cpu", times=None):
        self.device = torch.device(device)
        self._times = times or itertools.repeat(10000.0)
        self.timed = 0

    def device_us(self, batch):
        batch()
        self.timed += 1
        return next(self._times)

    def call_us(self, batch):
        return 2 * self.device_us(batch)

    def extra_bytes(self, call):
        call()
        return 64


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def quiet():
    return Console(file=io.StringIO(), width=160)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_without_a_gpu_it_says_so_and_prints_what_would_be_launched(no_gpu, tmp_path, capsys):
    assert program.main(["--results", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Nothing is timed: there is no GPU here")
    for case in CASES:
        assert output.count(case.name + " ") == 2
    for text in ("132 multiprocessors", "453.0", "679.5", "column", "plane", "flat"):
        assert text in output
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_required_is_one_line_and_status_1(no_gpu, capsys):
    assert program.main(["--require-gpu"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "there is no GPU" in captured.err


def test_interpreted_kernels_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(program, "backend", lambda device: Backend.INTERPRETER)
    assert program.main(["--require-gpu"]) == 1
    assert "the kernels do not run on the GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("monai-unet", 2 * 2 * 32 * 96**3 * 4, 3 * 2 * 32 * 96**3 * 4),
        ("iresnet", 2 * 128 * 64 * 112**2 * 2, 3 * 128 * 64 * 112**2 * 2),
        ("real-esrgan", 2 * 8 * 64 * 360 * 640 * 2, 3 * 8 * 64 * 360 * 640 * 2),
        ("iresnet-7x7", 2 * 256 * 512 * 49 * 2, 3 * 256 * 512 * 49 * 2),
        ("graph-infomax", 2 * 100000 * 512 * 4, 3 * 100000 * 512 * 4),
        ("conv-tasnet", 2 * 8 * 512 * 4000 * 2, 3 * 8 * 512 * 4000 * 2),
    ],
)
def test_bytes_of_the_cases(name, forward, backward):
    (case,) = (case for case in CASES if case.name == name)
    assert [case.bytes_moved(op) for op in PASSES] == [forward, backward]


@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_copy_moves_the_bytes_of_the_operation(case, op):
    sets = [case.inputs(torch.device("cpu")) for _ in range(2)]
    call = provide_copy(op, sets)
    targets = [call(0), call(1)]
    for target, inputs in zip(targets, sets, strict=True):
        # Read once and written once, and something was.
        assert 2 * target.nbytes == case.bytes_moved(op)
        assert torch.equal(target.flatten()[:8], inputs.x.detach().flatten()[:8])
    assert targets[0].data_ptr() != targets[1].data_ptr()


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_providers_compute_the_same(case):
    sets = [case.inputs(torch.device("cpu")) for _ in range(2)]
    for op in PASSES:
        ours, eager = (PROVIDERS[name](op, sets) for name in ("prelu_gpu", "eager"))
        for number in (0, 1, 0):
            torch.testing.assert_close(ours(number), eager(number), rtol=0.05, atol=0.05)


def test_rows_are_consistent():
    measured = timing.Measurement(64, device_samples=[99, 100, 101], call_samples=[120, 130, 125])
    row = program.make_row(SMALL[2], "backward", "eager", measured, copy_us=80)
    assert (row.device_us, row.call_us, row.bytes, row.extra_bytes) == (100, 125, 3 * 1920, 64)
    assert (row.gbps, row.pct_copy) == (round(5760 / 100 / 1e3, 1), 80.0)
    assert (row.slope, row.shape, row.dtype) == ("shared", "2x6x40", "float32")


def test_the_results_file_is_complete_after_every_row(tmp_path):
    file = program.ResultsFile(tmp_path, RUN)
    assert file.path == tmp_path / "some-gpu-80-gb.csv"
    assert file.path.read_text() == COLUMNS + "\n"
    measured = timing.Measurement(0, device_samples=[1, 2, 3], call_samples=[4, 5, 6])
    for count, op in enumerate(PASSES, start=1):
        file.write(program.make_row(SMALL[0], op, "prelu_gpu", measured, copy_us=1))
        rows = read(file.path)
        assert len(rows) == count
        assert rows[-1]["op"] == op
        assert rows[-1]["gpu"] == RUN.gpu
        assert rows[-1]["slope_dtype"] == "float32"


def test_a_run_from_gate_to_table(few_rounds, tmp_path, monkeypatch):
    monkeypatch.setenv("PRELU_GPU_COMMIT", "abc123")
    console = quiet()
    assert program.benchmark(FakeDevice(), SMALL, tmp_path / "new", console) == 0
    rows = read(tmp_path / "new" / "fake-gpu.csv")
    assert [(row["case"], row["op"], row["provider"]) for row in rows] == list(
        itertools.product([case.name for case in SMALL], PASSES, PROVIDERS)
    )
    assert {row["commit"] for row in rows} == {"abc123"}
    assert {(row["device_us"], row["call_us"]) for row in rows} == {("10000.0", "20000.0")}
    table = console.file.getvalue()
    assert table.count("prelu_gpu") >= 6
    assert "x eager" in table


def test_a_run_cut_off_keeps_what_it_finished(few_rounds, tmp_path):
    def times():
        # One operation asks the clock so often: to size the batch, then twice a round.
        yield from itertools.repeat(10000.0, len(PROVIDERS) * (1 + 2 * 3) + 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program.benchmark(FakeDevice(times=times()), SMALL, tmp_path, quiet())
    rows = read(tmp_path / "fake-gpu.csv")
    assert [(row["op"], row["provider"]) for row in rows] == [("forward", p) for p in PROVIDERS]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert program.benchmark(FakeDevice(), SMALL, tmp_path / "file", quiet()) == 1
    assert "--results" in capsys.readouterr().err


def wrong_forward(x, weight):
    y = F.prelu(x, weight)
    return torch.cat([y.flatten()[:-1], y.flatten()[-1:] * 1.01]).view_as(y)


def wrong_input_gradient(x, weight):
    return F.prelu(x.detach() + 1.01 * (x - x.detach()), weight)


def wrong_slope_gradient(x, weight):
    return F.prelu(x, weight.detach() + 1.01 * (weight - weight.detach()))


def unwritten_forward(x, weight):
    y = F.prelu(x, weight)
    y.data[-1] = math.nan
    return y


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
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
    ],
)
def test_a_red_gate_takes_no_time(prelu, words, monkeypatch, tmp_path, capsys, device):
    monkeypatch.setattr(prelu_gpu, "prelu", prelu)
    fake, console = FakeDevice(device), quiet()
    assert program.benchmark(fake, SMALL[2:], tmp_path, console) == 1
    assert fake.timed == 0
    assert "GB/s" not in console.file.getvalue()
    assert f"shared: {words}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sets_exceed_the_cache_three_times():
    for nbytes in (1, 299, 300, 899, 900, 10**6):
        sets = timing.count_sets(FakeDevice(), nbytes)
        assert sets * nbytes > 3 * FakeDevice.l2_bytes >= (sets - 1) * nbytes


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
    rotation.run(2)
    rotation.run(5)
    gc.collect()
    assert numbers == [0, 1, 2, 0, 1, 2, 0]
    assert [result() is not None for result in results] == [False] * 4 + [True] * 3


def test_providers_take_turns_in_every_round(few_rounds):
    order = []

    def caller(name):
        return lambda number: order.append(name)

    advanced = []
    calls = {name: caller(name) for name in "ab"}
    measured = timing.measure(FakeDevice(), calls, 1, lambda: advanced.append(None))
    rounds = order[-2 * 2 * 3 :]
    assert rounds == ["a", "a", "b", "b"] * 3
    assert len(advanced) == 3
    assert measured["a"].device_samples == [10000.0] * 3


def test_batches_are_sized_by_the_device_time(few_rounds):
    numbers = []
    device = FakeDevice(times=itertools.repeat(2000.0))
    measured = timing.measure(device, {"a": numbers.append}, 2, lambda: None)
    # 2000 us for two calls: batches of five to reach 5000 us; before them two rotations to warm
    # up, one to size the batch, and a call for its memory.
    assert len(numbers) == 4 + 2 + 1 + 2 * 3 * 5
    assert measured["a"].device_us == 2000 / 5
    assert measured["a"].call_us == 4000 / 5


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


@pytest.mark.parametrize(
    ("reached", "spins"),
    [([False], 1), ([True, True, False], 3), (itertools.repeat(True), 8)],
    ids=["queued in time", "too late twice", "never in time"],
)
def test_a_batch_is_queued_before_it_starts(reached, spins, monkeypatch):
    cycles, batches = [], []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", cycles.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"name": "Fake", "L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(FakeEvent, "reached", iter(reached))
    gpu = timing.Gpu()
    assert gpu.device_us(lambda: batches.append(None)) == 1500
    assert len(batches) == spins
    assert cycles == [cycles[0] * 2**n for n in range(spins)]


def test_an_answer_nobody_gives_is_unknown():
    assert program.ask("no-such-program-here") == "unknown"
    assert program.ask("git", "no-such-command") == "unknown"


@pytest.mark.gpu
def test_one_case_on_a_gpu(tmp_path, monkeypatch):
    # The guarded allocations of conftest.py would be timed too.
    monkeypatch.setattr(launch, "torch", torch)
    case = dataclasses.replace(CASES[3], name="real")
    gpu = timing.Gpu()
    assert program.benchmark(gpu, [case], tmp_path, quiet()) == 0
    (path,) = tmp_path.iterdir()
    rows = {(row["op"], row["provider"]): row for row in read(path)}
    assert set(rows) == set(itertools.product(PASSES, PROVIDERS))
    for row in rows.values():
        assert float(row["device_us"]) > 0
        assert row["gpu"] == gpu.name
    # A backward keeps nothing the size of x; PyTorch's does.
    assert int(rows["backward", "prelu_gpu"]["extra_bytes"]) < case.nbytes / 2
    assert int(rows["backward", "eager"]["extra_bytes"]) >= case.nbytes
    assert int(rows["forward", "copy"]["extra_bytes"]) == 0
