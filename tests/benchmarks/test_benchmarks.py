import copy
import csv
import dataclasses
import gc
import itertools
import math
import re
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
import typer

import prelu_gpu
from benchmarks import results, speed, timing
from benchmarks.cases import PASSES, Case
from benchmarks.program import Deadline
from benchmarks.providers import PROVIDERS
from prelu_gpu import launch, reference

SMALL = [
    Case("channels", (2, 6, 5, 8), torch.float16, slope_dtype=torch.float32),
    Case("last", (2, 6, 5, 8), torch.bfloat16, layout="channels_last"),
    Case("shared", (2, 6, 40), torch.float32, slope="shared"),
]
LAYOUTS = [
    *SMALL,
    Case("sliced", (4, 6, 5, 8), torch.float32, layout="sliced"),
    Case("offset", (2, 6, 5, 8), torch.float16, layout="offset"),
    Case("features", (2, 5, 16), torch.bfloat16, slope_dtype=torch.float32, dim=-1),
    Case("leaky", (2, 6, 5, 8), torch.float16, slope="number"),
    Case("leaky in place", (2, 6, 5, 8), torch.bfloat16, slope="number", inplace=True),
]
NORMS = [
    Case("batch", (2, 6, 5, 8), torch.float16, slope_dtype=torch.float32, norm="batch"),
    Case("batch last", (2, 6, 5, 8), torch.bfloat16, layout="channels_last", norm="batch"),
    Case("instance", (2, 6, 4, 4, 8), slope="shared", norm="instance"),
    Case(
        "instance last",
        (2, 6, 4, 4, 8),
        slope="shared",
        layout="channels_last_3d",
        norm="instance",
    ),
]
TORCH = ("prelu_gpu", "eager", "copy")
"""Providers that need no compiler."""
RUN = results.Run("2026-01-01", "abc", "Some GPU (80 GB)", "1.2", "2.11", "3.6")


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(fake, console, tmp_path, commit):
    """Times cases with the fake device, as `speed --results` does; gives the file's rows."""

    def benchmark(cases, ops=tuple(PASSES), providers=TORCH, deadline=None):
        file = results.open_results(tmp_path, "", results.describe_run(fake.name), speed.Row)
        works = list(speed.remaining(cases, ops, providers, file.rows))
        speed.benchmark(fake, works, file, deadline or Deadline(), console, rounds=2)
        return read(file.path)

    return benchmark


def keys(rows):
    return [(row["case"], row["op"], row["provider"]) for row in rows]


def breaking(monkeypatch, what):
    """Makes prelu_gpu.prelu wrong in one respect."""
    prelu = prelu_gpu.prelu

    def wrong(x, weight, dim=1):
        if what == "output":
            return prelu(x, weight) * (1 + torch.finfo(x.dtype).eps)
        if what == "input gradient":
            return prelu(x.detach() + 1.01 * (x - x.detach()), weight)
        if what == "slope gradient":
            return prelu(x, weight.detach() + 1.01 * (weight - weight.detach()))
        return prelu(x, weight if torch.is_grad_enabled() else 1.01 * weight)

    monkeypatch.setattr(prelu_gpu, "prelu", wrong)


# The gate


@pytest.mark.parametrize("case", [*LAYOUTS, *NORMS], ids=lambda case: case.name)
def test_the_gate_is_green(case, device):
    assert case.mistakes(device) == []


@pytest.mark.parametrize("what", ["output", "input gradient", "slope gradient", "without grad"])
def test_a_red_gate_takes_no_time(what, monkeypatch, run, fake, device, tmp_path, capsys):
    breaking(monkeypatch, what)
    fake.device = device
    with pytest.raises(typer.Exit) as end:
        run(SMALL[2:])
    assert end.value.exit_code == 1
    assert fake.timed == 0
    assert read(tmp_path / "fake-gpu.csv") == []
    assert re.search(rf"shared \(float32\) is wrong and not timed: {what}", capsys.readouterr().err)


@pytest.mark.parametrize("case", LAYOUTS[-2:], ids=lambda case: case.name)
def test_the_gate_is_red_where_leaky_relu_is_wrong(case, monkeypatch, device):
    leaky_relu = prelu_gpu.leaky_relu
    monkeypatch.setattr(prelu_gpu, "leaky_relu", lambda x, a, inplace: leaky_relu(x, 0.2, inplace))
    found = [mistake.split(":")[0] for mistake in case.mistakes(device)]
    assert found == ["output", "input gradient", "without grad, output"]


def breaking_norms(monkeypatch, what):
    """Makes prelu_gpu's norms with PReLU wrong in one respect."""

    def bent(name, tensor):
        """With another gradient, if that is what is wrong."""
        if what != f"{name} gradient":
            return tensor
        return tensor.detach() + 1.02 * (tensor - tensor.detach())

    def break_(function):
        def wrong(x, slope, mean=None, variance=None, weight=None, bias=None, training=True):
            grad = torch.is_grad_enabled()
            x, slope = bent("input", x), bent("slope", slope)
            parameters = mean, variance, bent("weight", weight), bent("bias", bias), training
            y = function(x, slope, *(() if weight is None else parameters))
            if what == "running variance" and training:
                variance *= 1.05
            return y * 1.05 if what == ("output" if grad else "without grad, output") else y

        return wrong

    for name in ("batch_norm_prelu", "instance_norm_prelu"):
        monkeypatch.setattr(prelu_gpu, name, break_(getattr(prelu_gpu, name)))


@pytest.mark.parametrize(
    "what",
    [
        "output",
        "input gradient",
        "slope gradient",
        "weight gradient",
        "bias gradient",
        "running variance",
        "without grad, output",
    ],
)
@pytest.mark.parametrize("case", NORMS[::2], ids=lambda case: case.name)
def test_the_gate_is_red_where_a_norm_is_wrong(case, what, monkeypatch, device):
    if case.norm == "instance" and what.split()[0] in ("weight", "bias", "running"):
        pytest.skip("it has none")
    breaking_norms(monkeypatch, what)
    found = {mistake.split(":")[0] for mistake in case.mistakes(device)}
    if what == "output":  # its gradients are others, too
        assert what in found
    else:
        assert found == {what}


def test_a_red_case_is_named_once_and_the_others_are_timed(monkeypatch, run, tmp_path, capsys):
    checked = []

    def mistakes(case, device):
        checked.append(case.name)
        return ["3 elements are wrong"] if case == SMALL[0] else []

    monkeypatch.setattr(Case, "mistakes", mistakes)
    with pytest.raises(typer.Exit):
        run(SMALL, ops=("forward", "step"))
    assert checked == [case.name for case in SMALL]
    rows = keys(read(tmp_path / "fake-gpu.csv"))
    assert rows == list(itertools.product(("last", "shared"), ("forward", "step"), TORCH))
    line = "channels (float16, slope float32) is wrong and not timed: 3 elements are wrong"
    assert capsys.readouterr().err.count(line) == 1
    assert (tmp_path / "fake-gpu-notices.txt").read_text() == f"{line}\n"


# A run


def test_a_run_goes_on_where_the_last_one_stopped(run, fake, monkeypatch):
    def times():
        # One operation asks so often: to size each batch, then twice a round.
        yield from itertools.repeat(10000.0, len(TORCH) * (2 + 2 * 2) + 5)
        raise KeyboardInterrupt

    fake.times = times()
    with pytest.raises(KeyboardInterrupt):
        run(SMALL[1:])
    fake.times, fake.timed = itertools.repeat(10000.0), 0
    rows = run(SMALL[1:])
    assert keys(rows) == list(itertools.product(("last", "shared"), PASSES, TORCH))
    assert {row["commit"] for row in rows} == {"abc123"}
    count = fake.timed
    assert count > 0
    assert run(SMALL[1:]) == rows
    assert fake.timed == count
    # Figures of two states of the code would be compared.
    monkeypatch.setenv("PRELU_GPU_COMMIT", "def456")
    with pytest.raises(typer.BadParameter, match="commit is abc123, and this is def456"):
        run(SMALL[1:])


def test_rows_hold_both_times_the_bytes_and_the_share_of_the_copys_speed(run, fake):
    device, call = itertools.repeat(8000.0), itertools.repeat(9000.0)
    copy = itertools.repeat(6000.0)
    sizes = [8000.0] * 2, [6000.0] * 2
    fake.times = itertools.chain(
        *sizes, itertools.chain.from_iterable(zip(device, call, copy, call, strict=True))
    )
    (row,) = run(SMALL[2:], ("backward",), ("eager",))
    figures = [float(row[name]) for name in ("device_us", "call_us", "pct_copy", "gbps")]
    # A replay of the rotation is one batch.
    assert figures[2:] == [75.0, round(3 * 1920 / figures[0] / 1e3, 1)]
    assert figures[0] < figures[1]
    assert (row["bytes"], row["extra_bytes"]) == (str(3 * 1920), "64")


@pytest.mark.parametrize(("minutes", "finished"), [(2.25, 2), (0.25, 0), (math.inf, 4)])
def test_a_run_stops_before_its_minutes_are_over(minutes, finished, run, clock, console):
    # Each operation begins and ends by one look at the clock: two end at 100 seconds, and a third
    # would begin at 125 and end at 150, where the minutes are over at 135.
    clock.step = 25
    rows = run(SMALL[2:], deadline=Deadline(minutes, clock))
    assert list(dict.fromkeys(row["op"] for row in rows)) == list(PASSES)[:finished]
    stopped = f"{4 - finished} of 4 operations are not timed" in console.file.getvalue()
    assert stopped == (finished < 4)


@pytest.mark.parametrize("when", ["prepared", "called", "timed"])
def test_a_provider_that_fails_is_named_and_the_others_go_on(when, run, monkeypatch, tmp_path):
    def failing(case, op, sets):
        calls = itertools.count()

        def call(number):
            if when == "called" or next(calls) > 5:  # after those that prepare
                raise ValueError("no such luck\nand more")

        if when == "prepared":
            raise ValueError("no such luck")
        return call

    monkeypatch.setitem(PROVIDERS, "compile", failing)
    with pytest.raises(typer.Exit) as end:
        run(SMALL[1:], ops=("forward", "step"), providers=("compile", "eager"))
    assert end.value.exit_code == 1
    rows = keys(read(tmp_path / "fake-gpu.csv"))
    assert [key for key in rows if key[2] == "eager"] == list(
        itertools.product(("last", "shared"), ("forward", "step"), ("eager",))
    )
    notices = (tmp_path / "fake-gpu-notices.txt").read_text().splitlines()
    assert notices[-1] == "shared (float32) step, compile: failed: ValueError: no such luck"


def test_our_own_failure_ends_the_run(run, monkeypatch):
    def failing(case, op, sets):
        raise ValueError("ours")

    monkeypatch.setitem(PROVIDERS, "prelu_gpu", failing)
    with pytest.raises(ValueError, match="ours"):
        run(SMALL[2:])


def test_compilers_come_last_and_inference_alone_is_without_grad(run, monkeypatch):
    order, grad = [], {}

    def watched(case, op, sets):
        order.append(case.name)
        return lambda number: grad.setdefault(op, set()).add(torch.is_grad_enabled())

    monkeypatch.setitem(PROVIDERS, "compile", watched)
    monkeypatch.setattr(Case, "mistakes", lambda case, device: [])
    rows = run(SMALL[1:], providers=("compile", "copy"))
    assert [row["provider"] for row in rows] == ["copy"] * 8 + ["compile"] * 8
    assert grad == {op: {op != "inference"} for op in PASSES}
    # Each operation is compiled anew.
    assert order == ["last"] * 4 + ["shared"] * 4


# Cases and providers


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_providers_compute_what_the_reference_does(case, device, monkeypatch):
    compile_ = torch.compile
    # Without a C compiler.
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend="aot_eager"))
    names = ["prelu_gpu", "eager", *(["compile"] if case in SMALL[:1] else [])]
    for op, name in itertools.product(case.ops, names):
        sets = [case.inputs(device) for _ in range(2)]
        x, weight, grad_y = (tensor.detach().clone() for tensor in sets[1])
        weight = sets[0].weight.detach() if op == "inference" else weight
        wide = torch.float64
        y = reference.prelu(x.to(wide), weight.to(wide), case.dim)
        gradients = reference.prelu_backward(grad_y.to(wide), x.to(wide), weight.to(wide), case.dim)
        expected = [] if op == "backward" else [y]
        expected += gradients if op in ("backward", "step") else ()
        with torch.set_grad_enabled(op != "inference"):
            found = PROVIDERS[name](case, op, sets)(1)
        found = found if isinstance(found, tuple) else (found,)
        for actual, wanted in zip(found, expected, strict=case.slope != "number"):
            torch.testing.assert_close(actual.to(wide), wanted, rtol=0.05, atol=0.05)
        if case.inplace:
            assert found[0] is sets[1].x


def test_what_is_not_fused_is_timed_beside_norms_alone():
    works = speed.remaining([SMALL[0], NORMS[0]], ["step"], PROVIDERS, [])
    named = {(work.case.name, name) for work in works for name in work.providers}
    every = set(itertools.product(("channels", "batch"), PROVIDERS))
    assert every - named == {("channels", "unfused")}


@pytest.mark.parametrize("case", NORMS[::2], ids=lambda case: case.name)
def test_providers_compute_a_norm_and_prelu(case, device, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend="aot_eager"))
    drawn = case.norm_tensors(device)
    monkeypatch.setattr(Case, "norm_tensors", lambda *_: copy.deepcopy(drawn))
    names = ["prelu_gpu", "eager", "unfused", *(["compile"] if case is NORMS[0] else [])]
    for op, name in itertools.product(("inference", "step"), names):
        sets = [case.inputs(device) for _ in range(2)]
        exact = type(drawn)(*(t if t is None else t.detach().double() for t in drawn))
        for parameter in exact.parameters:
            parameter.requires_grad_()
        x, weight, grad_y = (t.detach().double().requires_grad_() for t in sets[1])
        slope = sets[0].weight.double() if op == "inference" else weight
        y = reference.prelu(case.normalize(x, exact, op != "inference"), slope)
        expected = [y]
        if op == "step":
            expected += torch.autograd.grad(y, (x, weight, *exact.parameters), grad_y)
        with torch.set_grad_enabled(op != "inference"):
            found = PROVIDERS[name](case, op, sets)(1)
        found = found if isinstance(found, tuple) else (found,)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("case", [*LAYOUTS[:5], *NORMS], ids=lambda case: case.name)
def test_the_copy_moves_the_bytes_of_the_operation(case, op):
    sets = [case.inputs(torch.device("cpu")) for _ in range(2)]
    target = PROVIDERS["copy"](case, op, sets)(1)
    assert 2 * target.nbytes == case.bytes_moved(op) == case.passes[op] * case.nbytes
    assert torch.equal(target[: case.nbytes // target.itemsize], sets[1].x.detach().flatten())


# Timing


def test_sets_exceed_the_cache_three_times_up_to_a_limit(fake):
    for nbytes in (4, 299, 300, 899, 900, 10**6):
        sets = timing.count_sets(fake, nbytes)
        assert sets * nbytes > 3 * fake.l2_bytes >= (sets - 1) * nbytes
    assert timing.count_sets(fake, 1) == timing.SETS_LIMIT < 900


def test_a_rotation_uses_all_sets_and_keeps_their_results():
    class Result:
        pass

    numbers, kept = [], []

    def call(number):
        numbers.append(number)
        result = Result()
        kept.append(weakref.ref(result))
        return result

    rotation = timing.Rotation(call, sets=3)
    rotation.run(2)
    rotation.run(5)
    gc.collect()
    assert numbers == [0, 1, 2, 0, 1, 2, 0]
    assert [result() is not None for result in kept] == [False] * 4 + [True] * 3


def test_providers_take_turns_in_every_round_in_batches_of_their_own_length(fake):
    order = []
    calls = {name: lambda name=name: lambda number: order.append(name) for name in "ab"}
    fake.times = itertools.chain([1000.0, 500.0], itertools.repeat(1000.0))
    measured = timing.measure(fake, calls, 1, rounds=3)
    # 2500 us: 2 calls of 1000 us, 5 of 500; once for the device, once as whole calls.
    assert order[-3 * 2 * 7 :] == (["a"] * 4 + ["b"] * 10) * 3
    assert (measured["a"].device_us, measured["b"].call_us) == (500, 200)
    assert fake.captured == 0


def test_small_calls_are_timed_by_replays_of_a_rotation(fake):
    numbers = []
    fake.times = itertools.repeat(1000.0)
    measured = timing.measure(fake, {"a": lambda: numbers.append}, 4, rounds=1, replay=True)
    # 1000 us for a replay of four calls: two of them reach 2500 us. Whole calls as ever: ten.
    assert fake.captured == 1
    assert numbers[-18:] == [0, 1, 2, 3] * 2 + [
        n % 4 for n in range(numbers[-10], numbers[-10] + 10)
    ]
    assert (measured["a"].device_us, measured["a"].call_us) == (1000 / 8, 1000 / 10)


def test_what_cannot_be_captured_is_timed_with_events_and_says_so(fake, monkeypatch):
    def capture(run):
        raise RuntimeError("not permitted\nwhile capturing")

    monkeypatch.setattr(fake, "capture", capture)
    measured = timing.measure(fake, {"a": lambda: print}, 1, rounds=2, replay=True)
    assert measured["a"].device_us == 10000
    assert measured["a"].notice == "no CUDA graph, timed with events: RuntimeError: not permitted"


class FakeEvent:
    """An event that the spin reaches before the host has queued the batch, or not."""

    def __init__(self, **options):
        self.query = self.elapsed = None

    record = synchronize = lambda self: None

    def elapsed_time(self, end):
        return self.elapsed


@pytest.fixture
def gpu(monkeypatch):
    """A Gpu without one: `gpu.spins` are the cycles of its spins, `gpu.reached` what events say."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = type("Properties", (), {"name": "Fake", "L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = timing.Gpu()
    gpu.spins, gpu.reached = [], itertools.repeat(False)
    gpu._start.query, gpu._start.elapsed = lambda: next(gpu.reached), 1.5
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.spins.append)
    return gpu


@pytest.mark.parametrize(("reached", "runs"), [([], 1), ([True, True], 3), ([True] * 99, 6)])
def test_a_batch_is_repeated_behind_a_longer_spin_until_it_is_queued_in_time(reached, runs, gpu):
    queued = []
    gpu.reached = itertools.chain(reached, itertools.repeat(False))
    slow = timing.Batch(lambda: queued.append("slow"), 1)
    assert gpu.device_us(slow) == 1500
    assert len(queued) == runs
    assert gpu.spins == [timing.LEAD_CYCLES * 2**n for n in range(runs)]
    assert (slow.notice is not None) == (runs == 6)
    # Another batch does not wait for it.
    gpu.reached = itertools.repeat(False)
    gpu.device_us(timing.Batch(lambda: None, 1))
    assert gpu.spins[-1] == timing.LEAD_CYCLES


def test_the_spin_is_as_long_as_the_host_needs_and_no_longer(gpu, monkeypatch):
    now, took = [0.0], [0.003]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    batch = timing.Batch(lambda: now.append(now.pop() + took[0]), 1)
    gpu.reached = itertools.chain([True] * 3, itertools.repeat(False))
    gpu.device_us(batch)
    assert batch.lead == int(0.006 * timing.LEAD_CYCLES_PER_S) < gpu.spins[-1]
    took[0] = 0.0001
    gpu.device_us(batch)
    assert batch.lead == timing.LEAD_CYCLES


def test_a_batch_that_events_cannot_time_says_so(gpu):
    gpu._start.elapsed = 0.0
    batch = timing.Batch(lambda: None, 64)
    assert gpu.device_us(batch) == timing.RESOLUTION_US
    assert "events see no time pass" in batch.notice


# Provenance


def test_results_of_different_runs_or_of_no_commit_are_not_continued(tmp_path):
    file = results.ResultsFile(tmp_path, "-core", RUN, speed.Row)
    assert file.path == tmp_path / "some-gpu-80-gb-core.csv"
    later = dataclasses.replace(RUN, date="2026-01-02")
    file.write(speed.Row(*["x"] * 9, 1.0, 2.0, 3, 4.0, 5.0, 6))
    assert len(results.ResultsFile(tmp_path, "-core", later, speed.Row).rows) == 1
    with pytest.raises(typer.BadParameter, match=r"driver is 1\.2, and this is 1\.3"):
        results.open_results(tmp_path, "-core", dataclasses.replace(later, driver="1.3"), speed.Row)
    for commit in ("abc-dirty", "unknown"):  # the code may have changed since
        run = dataclasses.replace(RUN, commit=commit)
        results.open_results(tmp_path / commit, "", run, speed.Row)
        with pytest.raises(typer.BadParameter, match=commit):
            results.open_results(tmp_path / commit, "", run, speed.Row)
    with pytest.raises(typer.BadParameter, match="a folder that can be written"):
        results.open_results(file.path, "-core", later, speed.Row)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_run_of_no_commit_is_said_loudly(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("PRELU_GPU_COMMIT", raising=False)
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "another's"], check=True)

    def commit_of(checkout):
        (checkout / "benchmarks").mkdir(parents=True)
        monkeypatch.setattr(results, "__file__", str(checkout / "benchmarks" / "results.py"))
        return results.describe_run("Fake GPU").commit

    assert re.fullmatch("[0-9a-f]{7,}", commit_of(tmp_path))
    assert capsys.readouterr().err == ""
    # Files without history, which lie within that repository.
    assert commit_of(tmp_path / "copy") == "unknown"
    assert "WARNING: this checkout (unknown) is no commit" in capsys.readouterr().err


# The program


def test_without_a_gpu_it_says_so_and_prints_what_needs_none(no_gpu, cli, tmp_path, capsys):
    assert cli("speed", "--results", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert output.startswith("Nothing is timed: there is no GPU here")
    (monai,) = (line for line in output.splitlines() if " monai-unet " in line)
    assert [f"{passes * 226.492416:.1f}" in monai for passes in PASSES.values()] == [True] * 4
    assert not list(tmp_path.iterdir())
    assert cli("speed", "--require-gpu") == 1
    assert "there is no GPU" in capsys.readouterr().err


def test_wrong_options_are_named_and_status_2(cli, capsys):
    for arguments, word in (("--case iresnett", "iresnet-7x7"), ("--core --case curve", "--core")):
        assert cli("speed", *arguments.split()) == 2
        assert word in capsys.readouterr().err


def test_only_the_chosen_program_is_imported():
    # machine-code must not be interpreted, which the import decides.
    text = (
        "import contextlib, sys\nfrom benchmarks.__main__ import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['--help'])\n"
        "assert not {'prelu_gpu', 'torch'} & set(sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "machine-code" in answer.stdout


# On a GPU


@pytest.mark.gpu
def test_one_case_on_a_gpu(monkeypatch, console, tmp_path, commit):
    # The guarded allocations of conftest.py would be timed too.
    monkeypatch.setattr(launch, "torch", torch)
    case, gpu = Case("real", (128, 512, 7, 7), torch.float16), timing.Gpu()
    file = results.open_results(tmp_path, "", results.describe_run(gpu.name), speed.Row)
    works = list(speed.remaining([case], tuple(PASSES), tuple(PROVIDERS), []))
    speed.benchmark(gpu, works, file, Deadline(), console, rounds=3)
    rows = {(row["op"], row["provider"]): row for row in read(file.path)}
    assert set(rows) == set(itertools.product(PASSES, PROVIDERS)), console.file.getvalue()
    assert all(float(row["device_us"]) > 0 for row in rows.values())
    # A backward keeps nothing the size of x; PyTorch's does.
    assert int(rows["backward", "prelu_gpu"]["extra_bytes"]) < case.nbytes / 2
    assert int(rows["backward", "eager"]["extra_bytes"]) >= case.nbytes


@pytest.mark.gpu
def test_a_replay_takes_the_device_no_longer_than_the_launches(monkeypatch):
    monkeypatch.setattr(launch, "torch", torch)
    # Columns, which have no counters: a graph fills its own with zeros, one launch more.
    case, gpu = Case("small", (256, 64), torch.float32), timing.Gpu()
    with gpu.stream():
        sets = [case.inputs(gpu.device) for _ in range(32)]
        calls = {name: lambda name=name: PROVIDERS[name](case, "step", sets) for name in TORCH}
        replayed, launched = (
            timing.measure(gpu, calls, len(sets), rounds=7, replay=replay)
            for replay in (True, False)
        )
    for name in TORCH:
        noise = 1 + launched[name].spread_us + replayed[name].spread_us
        assert 0 < replayed[name].device_us < launched[name].device_us + noise
