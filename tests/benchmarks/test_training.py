import csv
import math
import re
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import nn

from benchmarks import training, workloads
from benchmarks.cases import LAYOUTS
from benchmarks.program import Deadline
from benchmarks.timing import Gpu
from prelu_gpu import launch
from prelu_gpu.run import execute, intercepting

COLUMNS = (
    "date,commit,gpu,driver,torch,triton,network,batch,layout,dtype,provider,step_us,iqr_us,steps,"
    "peak_bytes,speedup"
)
TOY = workloads.Workload(
    "toy",
    batch=4,
    dtype=torch.float32,
    build=lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.PReLU(3), nn.Conv2d(3, 2, 3), nn.PReLU(), nn.Conv2d(2, 2, 1)
    ),
    draw=lambda batch: (torch.randn(batch, 2, 8, 8), torch.randn(batch, 2, 4, 4)),
    loss=F.mse_loss,
    optimizer=partial(torch.optim.Adam, lr=1e-2),
)
HALF = replace(TOY, network="half", dtype=torch.bfloat16, layout="channels_last")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """One step of warming up, no search for garbage, and no threads, which only wait."""
    monkeypatch.setattr(training, "WARM_UP", 1)
    monkeypatch.setattr(training, "free_memory", lambda: None)
    torch.set_num_threads(1)


@pytest.fixture
def compilers(monkeypatch):
    """Instead of the compiler one that fails, with many lines, on accelerated networks."""

    def fail(model):
        raise RuntimeError("Inductor [broke]\nat this line")

    compiled = {"nn.PReLU compile": lambda model: model, "prelu_gpu compile": fail}
    monkeypatch.setattr(training, "COMPILED", compiled)
    return compiled


@pytest.fixture
def run(fake, console, tmp_path, commit):
    """Times networks with the fake device and gives the rows of the results file."""

    def benchmark(*jobs, minutes=math.inf, clock=time.monotonic):
        training.benchmark(fake, jobs, 2, Deadline(minutes, clock), console, tmp_path)
        return read(tmp_path)

    return benchmark


def read(folder):
    with (folder / "fake-gpu-training.csv").open() as file:
        return list(csv.DictReader(file))


def told(rows):
    return [tuple(row[n] for n in ("network", "provider", "step_us", "speedup")) for row in rows]


def find_prelus(model):
    return [module for module in model.modules() if isinstance(module, nn.PReLU)]


# MONAI's U-Net with these levels has 4,808,917 parameters with BatchNorm, 2436 of them BatchNorm's.
FIVE_LEVELS = replace(workloads.UNET, build=lambda: workloads.unet((16, 32, 64, 128, 256)))


@pytest.mark.parametrize(
    ("workload", "parameters", "shape"),
    [
        (workloads.IRESNET, 43_590_848 + 512 * 10_000, (512, 128, 512, 7, 7)),
        (FIVE_LEVELS, 4_808_917 - 2436, (1, 2, 256, 12, 12, 12)),
        (workloads.CONV_TASNET, 4_984_881, (1, 8, 512, 3999)),
        (workloads.SRGAN, 336_005, (64, 16, 64, 96, 96)),
    ],
    ids=["IResNet-50 and classifier", "UNet", "Conv-TasNet", "SRGAN"],
)
def test_networks_are_as_published(workload, parameters, shape):
    model, (examples, target) = workload.start(torch.device("meta"))
    seen = set()
    for prelu in find_prelus(model):
        prelu.register_forward_pre_hook(
            lambda prelu, inputs: seen.add((prelu.num_parameters, *inputs[0].shape))
        )
    assert workload.loss(model(examples), target).shape == ()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert shape in seen


@pytest.mark.parametrize("workload", [TOY, HALF], ids=["float32", "bfloat16"])
def test_a_step_trains_every_parameter_in_the_dtype_and_layout(workload):
    dtypes = []

    def loss(output, target):
        dtypes.append(output.dtype)
        return workload.loss(output, target)

    model, batch = workload.start(torch.device("cpu"))
    for pictures in (batch[0], model[0].weight):
        assert pictures.is_contiguous(memory_format=LAYOUTS[workload.layout])
    before = {name: value.clone() for name, value in model.named_parameters()}
    workloads.Training(replace(workload, loss=loss), model, batch).step()
    assert dtypes == [workload.dtype]
    assert not [name for name, value in model.named_parameters() if value.equal(before[name])]
    assert all(value.grad is None for value in model.parameters())


# The gate


@pytest.mark.parametrize("workload", [TOY, HALF], ids=["float32", "bfloat16"])
def test_the_gate_is_green(workload, device, launches):
    assert training.find_mistakes(workload, device) == []
    assert len([name for name in launches if "forward" in name]) == 2


def test_the_gate_lets_pass_what_differs_between_runs_of_nn_prelu_too():
    torch.manual_seed(0)
    layers = nn.Linear(8, 100), nn.PReLU(), nn.Dropout(0.1), nn.Linear(100, 1)
    dropping = replace(
        TOY,
        build=lambda: nn.Sequential(*layers),
        draw=lambda batch: (torch.randn(batch, 8), torch.randn(batch, 1)),
    )
    assert training.find_mistakes(dropping, torch.device("cpu")) == []


@pytest.mark.parametrize("workload", [TOY, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("parameter", "factor", "found"),
    [
        ("y_ptr", 1.02, r"\S+"),
        ("y_ptr", math.nan, "loss"),
        ("grad_x_ptr", 1.02, r"0\.weight"),
        ("grad_weight_ptr", 1.001, r"1\.weight"),
        ("grad_weight_ptr", 0.0, r"1\.weight"),
    ],
)
def test_a_red_gate_times_nothing(
    parameter, factor, found, workload, run, fake, console, tmp_path, capsys, device
):
    fake.device = device

    def wrong(call, values):
        execute(call, values)
        if values.get(parameter) is not None:
            values[parameter].mul_(factor)

    with intercepting(wrong), pytest.raises(typer.Exit) as end:
        run((workload, training.EAGER))
    assert end.value.exit_code == 1
    message = f"{workload.title}, {found}: .* apart, rounding explains"
    assert re.search(message, capsys.readouterr().err)
    assert fake.timed == 0
    assert "step ms" not in console.file.getvalue()
    assert read(tmp_path) == []


# A run


def test_a_run_from_gate_to_table(run, fake, console, compilers, tmp_path):
    # nn.PReLU takes 9 and 11 ms, prelu_gpu 4 and 6 ms; a compiled nn.PReLU 8 ms.
    fake.times = iter([9e3, 4e3, 11e3, 6e3] * 2 + [8e3] * 4)
    rows = run(*((work, stage) for stage in (training.EAGER, compilers) for work in (TOY, HALF)))
    eager = [("nn.PReLU", "10000.0", "1.0"), ("prelu_gpu", "5000.0", "2.0")]
    compiled = [("nn.PReLU compile", "8000.0", "1.25"), ("prelu_gpu compile", "", "")]
    assert told(rows) == [
        (network, *figures)
        for stage in (eager, compiled)
        for network in ("toy", "half")
        for figures in stage
    ]
    assert list(rows[0]) == COLUMNS.split(",")
    facts = [rows[2][n] for n in ("commit", "gpu", "batch", "layout", "dtype", "steps")]
    assert facts == ["abc123", "Fake GPU", "4", "channels_last", "bfloat16", "2"]
    assert rows[0]["peak_bytes"] == "64"
    table = console.file.getvalue()
    assert table.count("10.00") == 2
    assert table.count("prelu_gpu compile failed: RuntimeError: Inductor [broke]") == 2
    notices = (tmp_path / "fake-gpu-notices.txt").read_text().splitlines()
    assert notices[0] == (
        "toy, contiguous, prelu_gpu compile failed: RuntimeError: Inductor [broke]"
    )
    assert len(notices) == 2


def test_a_run_goes_on_where_the_last_one_stopped(run, fake, console, compilers, tmp_path):
    fake.times = iter([8e3, 2e3] * 2)
    run((TOY, training.EAGER))

    def interrupted():
        yield from [9e3, 9e3] * 2 + [4e3] * 2
        raise KeyboardInterrupt

    fake.times = interrupted()
    with pytest.raises(KeyboardInterrupt):
        run((TOY, training.EAGER), (HALF, training.EAGER), (TOY, compilers), (HALF, compilers))
    assert told(read(tmp_path)) == [
        ("toy", "nn.PReLU", "8000.0", "1.0"),
        ("toy", "prelu_gpu", "2000.0", "4.0"),
        ("half", "nn.PReLU", "9000.0", "1.0"),
        ("half", "prelu_gpu", "9000.0", "1.0"),
        ("toy", "nn.PReLU compile", "4000.0", "2.0"),
        ("toy", "prelu_gpu compile", "", ""),
    ]


@pytest.mark.parametrize(
    ("minutes", "finished", "left"),
    [
        (1.5, 2, "half, contiguous, nn.PReLU and prelu_gpu; toy, contiguous, nn.PReLU compile"),
        # Some seconds are left, too few to begin a compilation.
        (6, 4, "toy, contiguous, nn.PReLU compile and prelu_gpu compile."),
    ],
)
def test_a_run_whose_minutes_are_over_keeps_what_it_finished(
    minutes, finished, left, run, console, compilers, clock
):
    clock.step = 60  # asked once at the start, and around each network
    half = replace(HALF, layout="contiguous")
    jobs = (TOY, training.EAGER), (half, training.EAGER), (TOY, compilers)
    assert len(run(*jobs, minutes=minutes, clock=clock)) == finished
    output = " ".join(console.file.getvalue().split())
    assert output.count("10.00") == finished
    assert f"The minutes given are over. Not timed: {left}" in output


def test_providers_take_turns_and_only_one_of_them_launches_kernels(device, launches, fake):
    counts = []

    def call_us(step):
        before = len(launches)
        step()
        counts.append(len(launches) - before)
        return 1.0

    fake.device, fake.call_us = device, call_us
    measured = training.time_steps(fake, TOY, training.EAGER, 2)
    assert counts[0] == counts[2] == 0
    assert counts[1] == counts[3] >= 2 * 2
    assert [one.notice for one in measured.values()] == [None, None]


def test_every_training_starts_from_the_same_network_and_batch():
    (first, batch), (second, again) = (HALF.start(torch.device("cpu")) for _ in range(2))
    for a, b in zip([*first.parameters(), *batch], [*second.parameters(), *again], strict=True):
        assert a.equal(b)
    prelu = find_prelus(first)[0]
    assert prelu.weight.bfloat16().float().equal(prelu.weight)
    assert len(prelu.weight.unique()) == 3


# The program


def test_without_a_gpu_it_says_so(no_gpu, tmp_path, cli, capsys):
    assert cli("training", "--results", str(tmp_path)) == 0
    assert capsys.readouterr().out.startswith("Nothing is timed: there is no GPU here")
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_networks_are_timed_on_a_gpu(console, tmp_path, monkeypatch):
    # The guarded allocations of conftest.py would be timed too.
    monkeypatch.setattr(launch, "torch", torch)
    jobs = [(TOY, training.EAGER), (HALF, training.EAGER), (TOY, training.COMPILED)]
    training.benchmark(Gpu(), jobs, 3, Deadline(), console, tmp_path)
    (path,) = tmp_path.glob("*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(float(row["step_us"]) > 0 and int(row["peak_bytes"]) > 0 for row in rows)
