import csv
import dataclasses
import io
import itertools
import math
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import prelu_gpu
from benchmarks import gate, training, workloads
from benchmarks.__main__ import main
from benchmarks.cases import LAYOUTS
from benchmarks.networks import (
    ConvTasNet,
    CosineClassifier,
    IResNet,
    UNet,
    arcface_loss,
    dice_loss,
    si_snr_loss,
)
from benchmarks.program import Deadline, ProgramError, TimeUpError
from benchmarks.srgan import Generator
from benchmarks.timing import Gpu, Measurement
from prelu_gpu import launch
from prelu_gpu.backend import Backend

COLUMNS = (
    "date,commit,gpu,driver,torch,triton,network,batch,layout,dtype,provider,step_us,iqr_us,steps,"
    "peak_bytes,speedup"
)
IRESNET = dataclasses.replace(
    workloads.IRESNET,
    batch=4,
    build=lambda: nn.Sequential(
        IResNet(layers=(1, 1), width=4, size=8, embedding=8), CosineClassifier(8, 16)
    ),
    draw=partial(workloads.draw_faces, size=8, identities=16),
)
UNET = dataclasses.replace(
    workloads.UNET,
    build=lambda: UNet(channels=(2, 3)),
    draw=partial(workloads.draw_volumes, side=4),
)
CONV_TASNET = dataclasses.replace(
    workloads.CONV_TASNET,
    batch=2,
    build=lambda: ConvTasNet(filters=8, bottleneck=4, hidden=6, blocks=2, repeats=1),
    draw=partial(workloads.draw_mixtures, samples=80),
)
SRGAN = dataclasses.replace(
    workloads.SRGAN,
    batch=2,
    build=lambda: Generator(4),
    draw=partial(workloads.draw_pictures, size=12),
)
TINY = [IRESNET, UNET, dataclasses.replace(IRESNET, layout="channels_last"), CONV_TASNET, SRGAN]


def title(workload):
    return workload.title.replace(", ", "-")


class FakeDevice:
    """Runs on the CPU, by a clock that says so many microseconds each time it is asked."""

    name = "Fake GPU"

    def __init__(self, device="cpu", times=None):
        self.device = torch.device(device)
        self._times = times or itertools.repeat(10000.0)
        self.timed = 0

    def call_us(self, batch):
        batch()
        self.timed += 1
        return next(self._times)

    def extra_bytes(self, call):
        call()
        return 64


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """One step of warming up, no search for garbage, and no threads, which only wait."""
    monkeypatch.setattr(training, "WARM_UP", 1)
    monkeypatch.setattr(training, "free_memory", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def quick_kernels(monkeypatch):
    """PyTorch's operator for the interpreted kernels, where they are not what is tested."""
    monkeypatch.setattr(
        prelu_gpu.modules, "prelu", lambda x, weight, dim: F.prelu(x, weight.to(x.dtype))
    )


@pytest.fixture
def compilers(monkeypatch):
    """Instead of the compiler one that fails, with many lines, on accelerated networks."""

    def fail(model):
        raise RuntimeError("Inductor [broke]\nat this line\nand that")

    compiled = {"nn.PReLU compile": lambda model: model, "prelu_gpu compile": fail}
    monkeypatch.setattr(training, "COMPILED", compiled)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    return compiled


def forever():
    return Deadline(math.inf)


def quiet():
    return Console(file=io.StringIO(), width=200)


def settings(workloads=(UNET,), stages=(training.EAGER,), steps=3):
    return training.Settings(workloads, stages, steps)


def run(device, settings, folder, console=None, deadline=None):
    settings = dataclasses.replace(settings, folder=folder)
    training.benchmark(device, settings, deadline or forever(), console or quiet())


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def find_prelus(model):
    return [module for module in model.modules() if isinstance(module, nn.PReLU)]


# The networks


@pytest.mark.parametrize(
    ("network", "input", "output", "prelus", "parameters"),
    [
        # 43.59 million in the paper's code; 4,808,917 in MONAI's with these channels and, in place
        # of InstanceNorm, BatchNorm with its 2436 numbers.
        (IResNet, (2, 3, 112, 112), (2, 512), 25, 43_590_848),
        (
            lambda: UNet(channels=(16, 32, 64, 128, 256)),
            (1, 1, 32, 32, 32),
            (1, 2, 32, 32, 32),
            17,
            4_808_917 - 2436,
        ),
        (ConvTasNet, (2, 32_000), (2, 2, 32_000), 49, 4_984_881),
    ],
    ids=["IResNet-50", "UNet", "Conv-TasNet"],
)
def test_networks_are_as_large_as_published(network, input, output, prelus, parameters):
    with torch.device("meta"):
        model = network()
        assert model(torch.empty(input)).shape == output
    assert len(find_prelus(model)) == prelus
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_prelus_see_the_shapes_that_the_networks_are_known_for():
    shapes = {}
    for workload in workloads.WORKLOADS:
        with torch.device("meta"):
            model = workload.build()
        seen = shapes.setdefault(workload.network, set())
        for prelu in find_prelus(model):
            prelu.register_forward_pre_hook(
                lambda module, inputs, seen=seen: seen.add(
                    (module.num_parameters, *inputs[0].shape)
                )
            )
        model(workload.draw(workload.batch, torch.device("meta"))[0])
    assert {(64, 128, 64, 112, 112), (128, 128, 128, 56, 56), (512, 128, 512, 7, 7)} <= shapes[
        "iresnet50"
    ]
    assert {(1, 2, 32, 96, 96, 96), (1, 2, 256, 24, 24, 24)} <= shapes["unet3d"]
    assert (1, 8, 512, 3999) in shapes["conv-tasnet"]
    assert {(64, 16, 64, 96, 96), (1, 16, 64, 192, 192)} <= shapes["srgan"]


@pytest.mark.parametrize("workload", TINY, ids=title)
def test_every_parameter_is_trained_and_the_loss_falls(workload):
    model = workloads.build(workload, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    steps = workloads.Training(workload, model, workloads.draw(workload, torch.device("cpu")), 1.0)
    losses = [steps.step().item() for _ in range(12)]
    assert losses[-1] < losses[0]
    # A bias in front of a norm has no gradient but rounding, which Adam trains on all the same.
    assert not [name for name, value in model.named_parameters() if value.equal(before[name])]
    assert all(value.grad is None for value in model.parameters())


def test_blocks_of_conv_tasnet_add_to_what_they_were_given():
    model = CONV_TASNET.build()
    given = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    for onward in model.onward:
        nn.init.zeros_(onward.weight)
        nn.init.constant_(onward.bias, 2.0)
    model(torch.randn(2, 80))
    torch.testing.assert_close(given[1], given[0] + 2)


def test_conv_tasnet_makes_voices_of_the_sound_it_is_given():
    assert CONV_TASNET.build()(torch.zeros(2, 80)).eq(0).all()


def test_arcface_widens_the_angle_to_the_true_centre():
    angle = torch.tensor([[0.3, 1.0], [1.2, 0.9]])
    expected = F.cross_entropy(
        64 * (angle + torch.tensor([[0.5, 0], [0, 0.5]])).cos(), torch.tensor([0, 1])
    )
    torch.testing.assert_close(arcface_loss(angle.cos(), torch.tensor([0, 1])), expected)


def test_dice_is_1_without_overlap_and_0_where_all_is_right():
    mask = torch.zeros(1, 2, 2, 2, 2)
    mask[:, 0] = 1
    assert dice_loss(100 * mask, mask).item() == pytest.approx(0, abs=1e-5)
    right = F.one_hot(torch.arange(8).view(1, 2, 2, 2) % 2, 2).movedim(-1, 1).float()
    assert dice_loss(-100 * right, right).item() == pytest.approx(1, abs=1e-5)


def test_si_snr_takes_the_best_order_and_no_account_of_loudness():
    torch.manual_seed(0)
    sources = torch.randn(3, 2, 4000)
    sources -= sources.mean(2, keepdim=True)
    noise = torch.randn_like(sources)
    noise -= noise.mean(2, keepdim=True)
    noise -= (
        (noise * sources).sum(2, keepdim=True) / sources.square().sum(2, keepdim=True) * sources
    )
    # Noise across the source, at a tenth of its size: 20 dB.
    noisy = sources + 0.1 * noise / noise.norm(dim=2, keepdim=True) * sources.norm(
        dim=2, keepdim=True
    )
    for estimates in (noisy, 7 * noisy.flip(1) + 3):
        assert si_snr_loss(estimates, sources).item() == pytest.approx(-20, abs=1e-2)


# The gate


@pytest.mark.parametrize("workload", TINY, ids=title)
def test_the_gate_is_green(workload, device, launches):
    mistakes, scale = gate.check(workload, device)
    assert mistakes == []
    assert 1 <= scale <= 2**16
    forwards = [name for name in launches if name.endswith("_forward")]
    assert len(forwards) == len(find_prelus(workload.build()))


def wrong_forward(x, weight):
    y = F.prelu(x, weight.to(x.dtype))
    return torch.cat([y[:-1], 2 * y[-1:]])


def wrong_input_gradient(x, weight):
    return F.prelu(x.detach() + 1.01 * (x - x.detach()), weight.to(x.dtype))


def wrong_slope_gradient(x, weight):
    weight = weight.detach() + 1.02 * (weight - weight.detach())
    return F.prelu(x, weight.to(x.dtype))


def lost_slope_gradient(x, weight):
    return F.prelu(x, weight.detach().to(x.dtype))


def nan_forward(x, weight):
    return F.prelu(x, weight.to(x.dtype)) * math.nan


@pytest.mark.parametrize("workload", [IRESNET, UNET], ids=title)
@pytest.mark.parametrize(
    ("prelu", "words"),
    [
        (wrong_forward, "the loss is"),
        (nan_forward, "the loss is nan"),
        (wrong_input_gradient, "parameters have wrong gradients"),
        (wrong_slope_gradient, "parameters have wrong gradients"),
        (lost_slope_gradient, "parameters have wrong gradients"),
    ],
)
def test_a_red_gate_times_nothing(prelu, words, workload, monkeypatch, tmp_path, device):
    monkeypatch.setattr(prelu_gpu.modules, "prelu", lambda x, weight, dim: prelu(x, weight))
    fake, console = FakeDevice(device), quiet()
    with pytest.raises(ProgramError, match=f"{workload.title}: .*{words}"):
        run(fake, settings([workload]), tmp_path, console)
    assert fake.timed == 0
    assert "step ms" not in console.file.getvalue()
    assert read(tmp_path / "fake-gpu-training.csv") == []


def test_the_gate_sees_slopes_of_other_channels(monkeypatch):
    def rolled(x, weight, dim):
        return F.prelu(x, weight.to(x.dtype).roll(1))

    monkeypatch.setattr(prelu_gpu.modules, "prelu", rolled)
    mistakes, _ = gate.check(IRESNET, torch.device("cpu"))
    assert any(mistake.startswith("the loss is") for mistake in mistakes)


def test_autocast_leaves_the_slopes_as_they_are():
    model = workloads.build(IRESNET, torch.device("cpu"))
    for prelu in find_prelus(model):
        assert prelu.weight.half().float().equal(prelu.weight)
        assert len(prelu.weight.unique()) > 1


@pytest.mark.parametrize("workload", [IRESNET, TINY[2]], ids=title)
def test_networks_and_batches_are_always_the_same_in_their_layout(workload):
    first, second = (
        [
            *workloads.build(workload, device).state_dict().values(),
            *workloads.draw(workload, device),
        ]
        for device in [torch.device("cpu")] * 2
    )
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    layout = LAYOUTS[workload.layout]
    pictures = [tensor for tensor in first if tensor.dim() == 4]
    assert pictures[-1].shape == (4, 3, 8, 8)
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in pictures)


def test_the_gate_is_deterministic_and_leaves_cudnn_as_it_was(monkeypatch):
    seen = []

    def loss(output, target):
        cudnn = torch.backends.cudnn
        seen.append((cudnn.enabled, cudnn.deterministic, cudnn.benchmark))
        return F.l1_loss(output, target)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    gate.check(dataclasses.replace(SRGAN, loss=loss), torch.device("cpu"))
    assert seen == [(True, True, False)] * 3  # nn.PReLU twice, prelu_gpu once
    assert torch.backends.cudnn.benchmark


def test_the_scale_of_the_loss_is_halved_until_all_is_finite():
    scales = []

    def overflow(scale):
        scales.append(scale)
        return gradients(a=[1.0, scale * 100 if scale * 100 < 65504 else math.inf])

    result, scale = gate.find_scale(overflow)
    assert scales == [2.0**16 / 2**n for n in range(8)]
    assert scale == 512
    assert result.by_name["a"][1] == 51200


def test_too_little_memory_is_one_line(tmp_path):
    def loss(logits, mask):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with pytest.raises(ProgramError, match=r"out of memory\. .* --network") as error:
        run(FakeDevice(), settings([dataclasses.replace(UNET, loss=loss)]), tmp_path)
    assert "\n" not in str(error.value)


def test_a_network_that_overflows_with_any_scale_is_not_compared(tmp_path):
    workload = dataclasses.replace(UNET, loss=lambda logits, mask: logits.sum() * math.inf)
    with pytest.raises(ProgramError, match="own loss or gradients are not finite"):
        run(FakeDevice(), settings([workload]), tmp_path)


def gradients(loss=1.0, rounding=None, **by_name):
    return gate.Gradients(
        torch.tensor(loss),
        {name: torch.tensor(values) for name, values in by_name.items()},
        {name: torch.tensor(values) for name, values in (rounding or {}).items()},
    )


@pytest.mark.parametrize(
    ("actual", "again", "mistakes"),
    [
        (gradients(a=[3.0, 4.0]), gradients(a=[3.0, 4.0]), []),
        (gradients(a=[3.0, 4.4]), gradients(a=[3.0, 4.0]), []),  # within a tenth of the norm 5
        (gradients(a=[3.0, 4.6]), gradients(a=[3.0, 4.0]), ["1 of 1 parameters"]),
        (gradients(a=[3.0, 4.6]), gradients(a=[3.0, 4.1]), []),  # a second run was off by 0.1
        (gradients(a=[3.0, 4.9]), gradients(a=[3.0, 4.1]), ["1 of 1 parameters"]),
        (gradients(a=[3.0, math.nan]), gradients(a=[3.0, 4.0]), ["1 of 1 parameters"]),
        (gradients(b=[3.0, 4.0]), gradients(a=[3.0, 4.0]), ["1 of 1 parameters"]),
        (gradients(1.2, a=[3.0, 4.0]), gradients(a=[3.0, 4.0]), ["the loss is 1.2"]),
        (gradients(math.nan, a=[3.0, 4.0]), gradients(a=[3.0, 4.0]), ["the loss is nan"]),
    ],
)
def test_gradients_may_be_off_by_an_epsilon_in_norm_and_by_what_a_second_run_is_off(
    actual, again, mistakes
):
    found = list(gate.compare(actual, gradients(a=[3.0, 4.0]), again, eps=0.1))
    assert len(found) == len(mistakes)
    for words, start in zip(found, mistakes, strict=True):
        assert words.startswith(start)


def test_slopes_may_be_off_by_their_rounding():
    expected = gradients(a=[3.0], rounding={"a": [0.5]})
    for value, wrong in ((3.4, False), (3.6, True)):
        assert any(gate.compare(gradients(a=[value]), expected, expected, 1e-6)) == wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("slopes", [1, 5])
def test_the_rounding_of_slopes_holds_nn_prelu_and_little_more(dtype, slopes):
    torch.manual_seed(0)
    x, grad_y = (torch.randn(40, 5, 200).to(dtype) for _ in range(2))
    weight = torch.full((slopes,), 0.25, dtype=dtype, requires_grad=True)
    (actual,) = torch.autograd.grad(F.prelu(x, weight), weight, grad_y)
    products = torch.where(x > 0, 0.0, grad_y.double() * x.double())
    exact = products.sum((0, 2)) if slopes > 1 else products.sum().view(1)
    rounding = gate.slope_rounding(x, grad_y, weight)
    assert rounding.shape == weight.shape
    assert ((actual.double() - exact).abs() <= rounding).all()
    # A hundredth of what the slope's gradient typically is.
    assert (rounding < 0.01 * products.square().sum().div(slopes).sqrt()).all()


# A run


@pytest.mark.parametrize("stages", [1, 2])
def test_a_run_from_gate_to_table(stages, quick_kernels, compilers, tmp_path, monkeypatch):
    monkeypatch.setenv("PRELU_GPU_COMMIT", "abc123")
    # nn.PReLU takes 9 and 11 ms, prelu_gpu 4 and 6 ms; a compiled nn.PReLU 8 ms.
    times = iter([9e3, 4e3, 11e3, 6e3] * 2 + [8e3] * 4)
    workloads = [UNET, SRGAN]
    stages = (training.EAGER, compilers)[:stages]
    console = quiet()
    run(FakeDevice(times=times), settings(workloads, stages, 2), tmp_path / "new", console)
    path = tmp_path / "new" / "fake-gpu-training.csv"
    assert path.read_text().splitlines()[0] == COLUMNS
    rows = read(path)
    measured = [
        tuple(row[name] for name in ("network", "provider", "step_us", "steps", "speedup"))
        for row in rows
    ]
    eager = [("nn.PReLU", "10000.0", "2", "1.0"), ("prelu_gpu", "5000.0", "2", "2.0")]
    compiled = [("nn.PReLU compile", "8000.0", "2", "1.25"), ("prelu_gpu compile", "", "0", "")]
    assert measured == [
        (network, *figures)
        for stage in (eager, compiled)[: len(stages)]
        for network in ("unet3d", "srgan")
        for figures in stage
    ]
    assert {(row["commit"], row["batch"], row["dtype"]) for row in rows} == {
        ("abc123", "2", "float32")
    }
    assert rows[0]["peak_bytes"] == "64"
    table = console.file.getvalue()
    assert table.count("10.00") == 2
    failures = table.count("prelu_gpu compile failed: RuntimeError: Inductor [broke]")
    assert failures == (2 if len(stages) > 1 else 0)
    assert "at this line" not in table
    notices = tmp_path / "new" / "fake-gpu-notices.txt"
    failed = "{}, contiguous, prelu_gpu compile failed: RuntimeError: Inductor [broke]\n"
    assert (notices.read_text() if notices.exists() else "") == (
        failed.format("unet3d") + failed.format("srgan") if len(stages) > 1 else ""
    )


def test_a_run_goes_on_where_the_last_one_of_the_same_commit_stopped(
    quick_kernels, compilers, tmp_path, monkeypatch
):
    monkeypatch.setenv("PRELU_GPU_COMMIT", "abc123")
    path = tmp_path / "fake-gpu-training.csv"
    times = iter([8e3, 2e3] * 2)
    run(FakeDevice(times=times), settings([SRGAN], steps=2), tmp_path)

    def times():
        yield from [9e3, 9e3] * 2 + [4e3] * 2
        raise KeyboardInterrupt

    both = settings([SRGAN, UNET], (training.EAGER, compilers), 2)
    with pytest.raises(KeyboardInterrupt):
        run(FakeDevice(times=times()), both, tmp_path)
    assert [(row["network"], row["provider"], row["speedup"]) for row in read(path)] == [
        ("srgan", "nn.PReLU", "1.0"),
        ("srgan", "prelu_gpu", "4.0"),
        ("unet3d", "nn.PReLU", "1.0"),
        ("unet3d", "prelu_gpu", "1.0"),
        ("srgan", "nn.PReLU compile", "2.0"),
        ("srgan", "prelu_gpu compile", ""),
    ]
    assert [job.title for job in training.remaining(both, read(path))] == [
        "unet3d, contiguous, nn.PReLU compile and prelu_gpu compile"
    ]


def test_results_of_another_commit_are_not_continued(quick_kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("PRELU_GPU_COMMIT", "abc")
    run(FakeDevice(), settings([SRGAN]), tmp_path)
    monkeypatch.setenv("PRELU_GPU_COMMIT", "def")
    with pytest.raises(ProgramError, match="abc"):
        run(FakeDevice(), settings([SRGAN]), tmp_path)
    assert {row["commit"] for row in read(tmp_path / "fake-gpu-training.csv")} == {"abc"}


def test_accelerated_steps_run_the_kernels_and_the_others_do_not(device, monkeypatch, launches):
    counts = []

    class Counting(FakeDevice):
        def call_us(self, batch):
            before = len(launches)
            batch()
            counts.append(len(launches) - before)
            return 1.0

    measured = training.time_job(
        Counting(device), training.Job(SRGAN, training.EAGER), 1.0, 2, forever(), lambda: None
    )
    assert counts[0] == counts[2] == 0
    assert counts[1] == counts[3] >= 2 * len(find_prelus(SRGAN.build()))
    assert [one.notice for one in measured.values()] == [None, None]


def test_providers_start_from_the_same_weights_and_take_turns_on_the_same_batch(
    quick_kernels, monkeypatch
):
    order, batches, weights = [], [], []

    class Recorded(workloads.Training):
        def __init__(self, workload, model, batch, scale):
            super().__init__(workload, model, batch, scale)
            self.name = type(find_prelus(model)[0]).__module__.split(".")[0]
            assert scale == 32
            batches.append(batch)
            weights.append({name: value.clone() for name, value in model.state_dict().items()})

        def step(self):
            order.append(self.name)
            return super().step()

    monkeypatch.setattr(training, "Training", Recorded)
    advanced = []
    measured = training.time_job(
        FakeDevice(),
        training.Job(UNET, training.EAGER),
        32.0,
        3,
        forever(),
        lambda: advanced.append(None),
    )
    assert order[-6:] == ["torch", "prelu_gpu"] * 3
    assert len(advanced) == 3
    assert batches[0][0] is batches[1][0]
    assert weights[0].keys() == weights[1].keys()
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    assert [one.call_samples for one in measured.values()] == [[1e4] * 3] * 2


def test_compilers_forget_the_shapes_of_the_network_before(quick_kernels, compilers, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    for providers, count in ((training.EAGER, 0), (compilers, 1)):
        training.time_job(
            FakeDevice(), training.Job(SRGAN, providers), 1.0, 2, forever(), lambda: None
        )
        assert len(resets) == count


def test_without_nn_prelus_time_there_is_no_speedup():
    measured = Measurement(5, call_samples=[1, 2, 3, 4, 5, 6, 7])
    row = training.make_row(UNET, "prelu_gpu", measured, None)
    assert (row.step_us, row.iqr_us, row.speedup) == (4, 4, None)


def test_steps_of_a_half_precision_network_are_scaled_and_autocast(monkeypatch):
    dtypes = []

    def loss(cosines, identities):
        dtypes.append(cosines.dtype)
        return arcface_loss(cosines, identities)

    workload = dataclasses.replace(IRESNET, loss=loss)
    model = workloads.build(workload, torch.device("cpu"))
    steps = workloads.Training(workload, model, workloads.draw(workload, torch.device("cpu")), 8.0)
    steps.backward()
    scaled = model[0].head[2].weight.grad.clone()
    model.zero_grad()
    steps = workloads.Training(workload, model, workloads.draw(workload, torch.device("cpu")), 4.0)
    steps.backward()
    torch.testing.assert_close(scaled, 2 * model[0].head[2].weight.grad, rtol=0.05, atol=1e-3)
    assert dtypes == [torch.float16] * 2


# The minutes


class Clock:
    """Says so many seconds more each time it is asked."""

    def __init__(self, seconds):
        self.now = 0.0
        self.seconds = seconds

    def __call__(self):
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize(
    ("seconds", "minutes", "finished", "first_left"),
    [
        # The clock is asked once at the start, twice by the gate and ten times by a pair: the
        # second pair is cut off as it warms up, at the 15th time, or at the 18th.
        (60, 13, 2, "srgan, contiguous, nn.PReLU and prelu_gpu; unet3d"),
        (60, 16, 2, "srgan, contiguous, nn.PReLU and prelu_gpu; unet3d"),
        # Both pairs are through at 230 s, but 310 are too few to begin a compilation.
        (10, 5, 4, "unet3d, contiguous, nn.PReLU compile and prelu_gpu compile; srgan"),
    ],
    ids=["warming up", "in a pair", "before compiling"],
)
def test_a_run_whose_minutes_are_over_keeps_what_it_finished(
    seconds, minutes, finished, first_left, quick_kernels, compilers, tmp_path
):
    console = quiet()
    deadline = Deadline(minutes, Clock(seconds))
    work = settings([UNET, SRGAN], (training.EAGER, compilers))
    run(FakeDevice(), work, tmp_path, console, deadline)
    assert len(read(tmp_path / "fake-gpu-training.csv")) == finished
    output = " ".join(console.file.getvalue().split())
    assert output.count("10.00") == finished
    assert f"The minutes given are over. Not timed: {first_left}" in output


def test_time_that_is_over_is_no_failure_of_a_provider(quick_kernels, compilers):
    deadline = Deadline(2.5, Clock(60))  # over in the second provider's first step
    failing_first = dict(reversed(compilers.items()))
    with pytest.raises(TimeUpError):
        training.time_job(
            FakeDevice(), training.Job(UNET, failing_first), 1.0, 2, deadline, lambda: None
        )


def test_minutes_too_few_for_the_gate_are_an_error(tmp_path):
    with pytest.raises(ProgramError, match="--minutes"):
        run(FakeDevice(), settings(), tmp_path, deadline=Deadline(0.5, Clock(60)))
    assert read(tmp_path / "fake-gpu-training.csv") == []


# The program


def test_without_a_gpu_it_says_so_and_prints_sizes(no_gpu, tmp_path, capsys):
    assert main(["training", "--results", str(tmp_path), "--network", "srgan", "unet3d"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Nothing is timed: there is no GPU here")
    lines = {line.split()[0]: line.split() for line in output.splitlines() if "float32" in line}
    # The PReLUs of the generator read 64 channels of 96 x 96, three times, and of 192 x 192.
    megabytes = 16 * 64 * (3 * 96**2 + 192**2) * 4 / 1e6
    assert lines["srgan"][-3:] == ["336,005", "4", f"{megabytes:.1f}"]
    assert lines["unet3d"][-2] == "13"
    assert len(lines) == 2
    assert not list(tmp_path.iterdir())


def test_every_network_is_sized_without_memory_for_it(no_gpu, capsys):
    assert main(["training"]) == 0
    output = capsys.readouterr().out
    stages = zip((3, 4, 14, 3), (64, 128, 256, 512), (56, 28, 14, 7), strict=True)
    elements = 64 * 112**2 + sum(
        width * (4 + blocks - 1) * side**2 for blocks, width, side in stages
    )
    assert output.count(f"{128 * elements * 2 / 1e6:.1f}") == 2  # float16, in both layouts
    assert output.count("iresnet50") == 2
    for name in ("contiguous", "channels_last", "unet3d", "conv-tasnet", "srgan", "float16"):
        assert name in output


def test_interpreted_kernels_are_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.program.backend", lambda device: Backend.INTERPRETER)
    assert main(["training", "--network", "srgan"]) == 0
    assert "Nothing is timed: the kernels do not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "stages", "steps", "names"),
    [
        ([], 2, training.STEPS, 5),
        (["--quick"], 1, training.QUICK_STEPS, 5),
        (["--network", "iresnet50"], 2, training.STEPS, 2),
    ],
)
def test_the_command_line_chooses_what_is_timed(arguments, stages, steps, names, monkeypatch):
    calls = []

    def record(device, settings, deadline, console):
        calls.append((settings, deadline))

    monkeypatch.setattr(training, "find_obstacle", lambda: None)
    monkeypatch.setattr(training, "Gpu", FakeDevice)
    monkeypatch.setattr(training, "benchmark", record)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert main(["training", *arguments, "--minutes", "0.5"]) == 0
    ((settings, deadline),) = calls
    chosen = len(settings.stages), settings.steps, len(settings.workloads)
    assert chosen == (stages, steps, names)
    assert settings.suffix == ("-training-quick" if "--quick" in arguments else "-training")
    assert torch.backends.cudnn.benchmark
    deadline.check(25)
    with pytest.raises(TimeUpError):
        deadline.check(31)


def test_an_unknown_network_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["training", "--network", "resnet"])
    error = capsys.readouterr().err
    assert all(workload.network in error for workload in workloads.WORKLOADS)


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path):
    (tmp_path / "file").touch()
    fake = FakeDevice()
    with pytest.raises(ProgramError, match="--results"):
        run(fake, settings(), tmp_path / "file")
    assert fake.timed == 0


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("workloads", "stages"),
    # Compilers take their time: one network.
    [(TINY, (training.EAGER,)), ([SRGAN], (training.EAGER, training.COMPILED))],
    ids=["eager", "compiled"],
)
def test_tiny_networks_on_a_gpu(workloads, stages, tmp_path, monkeypatch):
    # The guarded allocations of conftest.py would be timed too.
    monkeypatch.setattr(launch, "torch", torch)
    gpu = Gpu()
    run(gpu, settings(workloads, stages), tmp_path)
    (path,) = tmp_path.glob("*.csv")  # a notice may lie beside it
    notices = [notice.read_text() for notice in tmp_path.glob("*.txt")]
    rows = read(path)
    assert len(rows) == 2 * len(workloads) * len(stages)
    for row in rows:
        assert row["step_us"], notices
        assert row["gpu"] == gpu.name
        assert float(row["step_us"]) > 0
        assert int(row["peak_bytes"]) > 0


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_timed_until_its_end_and_its_peak_is_what_it_adds():
    gpu = Gpu()
    kept = torch.empty(2**20, device=gpu.device)

    def step():
        return torch.cat([kept, kept]).sum()

    assert 2 * kept.nbytes <= gpu.extra_bytes(step) < 3 * kept.nbytes
    start = time.perf_counter()
    microseconds = gpu.call_us(lambda: torch.cuda._sleep(10**7))
    assert 100 < microseconds <= (time.perf_counter() - start) * 1e6
