import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import prelu_gpu
from benchmarks import demo, photos, srgan
from prelu_gpu import functional
from prelu_gpu.backend import Backend

ROOT = Path(__file__).parents[2]


def save_photo(path, width=60, height=52, seed=0):
    """A picture with detail at every scale: smooth colours, edges and noise."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(x / 9 + seed) + 40 * (np.cos(y / 5) > 0)
    noise = np.random.default_rng(seed).normal(0, 15, (height, width, 3))
    pixels = np.clip(waves[..., None] + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate(["a.png", "b.jpg", "c.png"]):
        save_photo(folder / name, seed=seed)
    return folder


@pytest.fixture
def small(folder, tmp_path):
    """Arguments of a run that takes a fraction of a second."""
    sizes = ["--steps", "6", "--batch", "2", "--channels", "2"]
    return ["--photos", str(folder), "--out", str(tmp_path / "out"), *sizes]


@pytest.fixture
def any_gain(monkeypatch):
    """Lets a network pass that was hardly trained."""
    monkeypatch.setattr(demo, "NEEDED_GAIN", -1.0)


@pytest.fixture
def runs(monkeypatch):
    """The arguments and the result of either network's run."""
    calls = []
    run = demo.run

    def recorded(name, generator, *args):
        weights = {key: value.clone() for key, value in generator.state_dict().items()}
        result = run(name, generator, *args)
        calls.append((generator, weights, result))
        return result

    monkeypatch.setattr(demo, "run", recorded)
    return calls


@pytest.fixture
def adversaries():
    torch.manual_seed(0)
    with demo.reproducible():
        yield srgan.Generator(4), srgan.Discriminator(8, nn.LeakyReLU)


def accelerate_with(monkeypatch, hook):
    """Makes the slope gradients of accelerated networks pass through `hook`."""
    accelerate = prelu_gpu.accelerate

    def wrong(model):
        for module in accelerate(model).modules():
            if isinstance(module, prelu_gpu.PReLU):
                module.weight.register_hook(hook())
        return model

    monkeypatch.setattr(prelu_gpu, "accelerate", wrong)


# The program


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="it interprets kernels, triton 3.6 with older NumPy only"
)
def test_the_program_trains_says_what_it_measured_and_fails_below_the_needed_gain(small):
    # The interpreter of triton 3.6 warns, about NumPy.
    warnings = "-W", "error", "-W", "ignore:Conversion of an array with ndim > 0"
    finished = subprocess.run(
        [sys.executable, *warnings, "-m", "benchmarks.demo", *small, "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 2
    for name, line in zip(("nn.PReLU", "prelu_gpu"), finished.stderr.splitlines(), strict=True):
        assert line.startswith(f"demo: {name} reaches")
        assert "0.3 dB more than bicubic are needed" in line
    assert "Photographs: a.png, b.jpg. Held out of training: c.png." in finished.stdout
    assert "interpreted on the CPU" in finished.stdout
    assert "not GPU times" in finished.stdout
    assert finished.stdout.count(" 6/6 ") == 2
    figures = re.search(r"PSNR, dB +│ +([\d.]+) +│ +([\d.]+) +│ +([\d.]+)", finished.stdout)
    bicubic, reference, ours = map(float, figures.groups())
    assert 10 < bicubic < 40
    assert reference == pytest.approx(ours, abs=0.01)
    assert re.search(r"time per step, median +│ +│ +[\d.]+ ms +│ +[\d.]+ ms", finished.stdout)


def test_both_networks_start_alike_and_only_the_second_runs_our_kernels(
    small, runs, launches, any_gain
):
    assert demo.main(small) == 0
    (plain, weights, reference), (accelerated, same_weights, ours) = runs
    assert all(torch.equal(weights[key], same_weights[key]) for key in weights)
    assert [type(m) for m in plain.modules() if isinstance(m, nn.PReLU)] == [nn.PReLU] * 4
    assert [type(m) for m in accelerated.modules() if isinstance(m, nn.PReLU)] == (
        [prelu_gpu.PReLU] * 4
    )
    # Two trainings of either network: had both seen other crops, the first losses would differ.
    assert reference.training.losses[0] == pytest.approx(ours.training.losses[0], rel=1e-6)
    assert len(set(reference.training.losses)) == 6
    for network in (plain, accelerated):
        moved = network.state_dict()
        assert not any(torch.equal(weights[key], moved[key].cpu()) for key in weights)


def test_a_run_repeats_itself_and_another_seed_is_another_run(small, runs, any_gain):
    for seed in ("5", "5", "6"):
        assert demo.main([*small, "--seed", seed]) == 0
    first, again, other = ([run[2].training for run in runs[i : i + 2]] for i in (0, 2, 4))
    assert [run.losses for run in first] == [run.losses for run in again]
    # What bicubic interpolation leaves depends on the crops alone.
    assert first[0].bicubic_losses == first[1].bicubic_losses
    assert first[0].bicubic_losses != other[0].bicubic_losses


def test_the_last_photograph_is_not_trained_on(small, monkeypatch, any_gain):
    seen = []
    random_crops = demo.random_crops

    def recorded(found, *args):
        seen.append([photo.name for photo in found])
        return random_crops(found, *args)

    monkeypatch.setattr(demo, "random_crops", recorded)
    assert demo.main(small) == 0
    assert seen == [["a.png", "b.jpg"]] * 2


def test_the_global_state_is_as_before(small, any_gain):
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(3)
    assert demo.main(small) == 0
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert torch.backends.cudnn.deterministic == deterministic


# Wrong gradients


def test_a_slope_gradient_too_large_by_a_thousandth_fails(small, monkeypatch, capsys, any_gain):
    accelerate_with(monkeypatch, lambda: lambda gradient: gradient * 1.001)
    assert demo.main(small) == 1
    error = capsys.readouterr().err
    assert "demo: the gradients of the first step of nn.PReLU and prelu_gpu differ by 1" in error
    assert error.count("\n") == 1


def test_losses_that_part_after_the_first_step_fail(small, monkeypatch, capsys, any_gain):
    def negated_from_the_second_step():
        steps = []

        def hook(gradient):
            steps.append(1)
            return gradient if len(steps) == 1 else -gradient

        return hook

    accelerate_with(monkeypatch, negated_from_the_second_step)
    assert demo.main([*small, "--steps", "20"]) == 1
    error = capsys.readouterr().err
    assert "demo: the losses of the first 20 steps of nn.PReLU and prelu_gpu differ by" in error
    assert error.count("\n") == 1


def training(losses, gradient):
    return srgan.Training(losses=losses, gradients={"slope": torch.tensor(gradient)})


@pytest.fixture
def options():
    return demo.Options(batch=8, channels=16)


def test_differences_are_relative_and_the_limit_follows_the_sizes(options):
    agreement = demo.compare(
        training([0.5, 0.25], [4.0, 0.5]), training([0.5, 0.3], [4.0, 0.4]), options
    )
    assert agreement.losses == pytest.approx(0.1)
    assert agreement.gradients == pytest.approx(0.025)
    assert agreement.limit == pytest.approx(543.06 * 2**-23, rel=1e-4)


def test_losses_are_compared_in_the_first_20_steps_only(options):
    same = [1.0] * 20
    parted = training([*same, 1.0], [1.0]), training([*same, 2.0], [1.0])
    assert demo.compare(*parted, options).losses == 0
    parted = training([*same[1:], 1.0], [1.0]), training([*same[1:], 2.0], [1.0])
    assert demo.compare(*parted, options).losses == 1


def test_gradients_that_cancel_are_measured_against_the_loss(options):
    zero = training([2.0], [0.0])
    assert demo.compare(zero, zero, options).gradients == 0
    for gradient in (0.0, 1e-4):
        other = training([2.0], [gradient + 1e-3])
        assert demo.compare(training([2.0], [gradient]), other, options).gradients == (
            pytest.approx(5)
        )


@pytest.mark.parametrize(
    ("losses", "gradient", "message"),
    [
        ([1.0, math.nan], [1.0], "losses of the first 20 steps"),
        ([1.0, 1.0], [math.nan], "gradients of the first step"),
    ],
)
def test_nan_fails(losses, gradient, message, options):
    agreement = demo.compare(training([1.0, 1.0], [1.0]), training(losses, gradient), options)
    result = demo.Result("ours", training(losses, gradient), torch.zeros(1), 31.0)
    (failure,) = demo.find_failures(30.0, result, result, agreement)
    assert message in failure


@pytest.mark.parametrize(
    ("reference", "ours", "failing"),
    [
        (30.31, 30.31, []),
        (30.29, 30.31, ["nn.PReLU"]),
        (30.31, 30.29, ["prelu_gpu"]),
        (math.nan, 29.0, ["nn.PReLU", "prelu_gpu"]),
    ],
)
def test_either_network_must_beat_bicubic_by_the_needed_gain(reference, ours, failing):
    results = [
        demo.Result(name, srgan.Training(), torch.zeros(1), reached)
        for name, reached in (("nn.PReLU", reference), ("prelu_gpu", ours))
    ]
    failures = demo.find_failures(30.0, *results, demo.Agreement(0, 0, 1e-5))
    assert [failure.split()[0] for failure in failures] == failing


# The picture


def test_the_picture_is_written_in_colour(small, tmp_path, any_gain):
    assert demo.main(small) == 0
    with Image.open(tmp_path / "out" / "demo.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (720, 1440, 3)
    half = pixels.shape[0] // 2
    for part in (pixels[:half, :720], pixels[:half, 720:]):
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 500
    # The two curves: matplotlib's orange and blue.
    for colour in ((255, 127, 14), (31, 119, 180)):
        assert (pixels[half:] == colour).all(-1).sum() > 200


def test_the_panels_show_the_same_part_and_the_curves_both_trainings(tmp_path):
    save_photo(tmp_path / "photo.png", width=120, height=100)
    photo = photos.read_photo(tmp_path / "photo.png")
    target = photo.batch()
    low = photos.downscale(target)
    bicubic = photos.upscale(low).clamp(0, 1)
    outputs = torch.rand_like(target), torch.rand_like(target)
    results = [
        demo.Result(
            name,
            srgan.Training(losses=losses, bicubic_losses=[2.0, 4.0]),
            output,
            photos.psnr(output, target),
        )
        for name, losses, output in zip(
            ("nn.PReLU", "prelu_gpu"), ([1.0, 1.0], [1.0, 3.0]), outputs, strict=True
        )
    ]
    *panels, curves = demo.draw(photo, bicubic, *results).axes

    top, left, side = demo.most_detailed(bicubic, target)
    assert side == 80
    expected = [bicubic, outputs[1], target]
    titles = [panel.get_title() for panel in panels]
    for panel, title, pictures in zip(panels[1:3], titles[1:3], expected, strict=False):
        assert f"{photos.psnr(pictures, target):.2f} dB" in title
        assert panel.images[0].get_array().shape == (80, 80, 3)
    for panel, pictures in zip(panels[1:], expected, strict=True):
        part = pictures[0, :, top : top + 80, left : left + 80].permute(1, 2, 0)
        assert torch.equal(torch.from_numpy(np.asarray(panel.images[0].get_array())), part)
    half = low[0, :, top // 2 : top // 2 + 40, left // 2 : left // 2 + 40].permute(1, 2, 0)
    assert torch.equal(torch.from_numpy(np.asarray(panels[0].images[0].get_array())), half)

    reference, ours = curves.lines[:2]
    assert list(reference.get_ydata()) == [0.5, 0.25]
    assert list(ours.get_ydata()) == [0.5, 0.75]
    assert (reference.get_linestyle(), ours.get_linestyle()) == ("-", "--")


def test_the_part_shown_is_the_one_bicubic_restores_worst():
    target = torch.zeros(1, 3, 200, 240)
    bicubic = target.clone()
    bicubic[:, :, 100:120, 150:170] = 1
    top, left, side = demo.most_detailed(bicubic, target)
    assert top <= 100 < 120 <= top + side
    assert left <= 150 < 170 <= left + side
    assert top % 2 == left % 2 == 0


def test_a_name_with_markup_is_printed_as_it_is(folder, small, capsys, any_gain):
    (folder / "c.png").rename(folder / "z[red]$\\x$.png")
    assert demo.main(small) == 0
    assert capsys.readouterr().out.count("z[red]$\\x$.png") == 2


# Adversarial training


def test_adversarial_training_moves_both_networks_and_is_reported(
    small, monkeypatch, capsys, tmp_path, any_gain
):
    calls = []
    train_adversarially = demo.train_adversarially

    def recorded(generator, discriminator, batches):
        networks = generator, discriminator
        before = [[p.detach().clone() for p in network.parameters()] for network in networks]
        losses = train_adversarially(generator, discriminator, batches)
        calls.append((discriminator, before[1]))
        for network, old in zip(networks, before, strict=True):
            for parameter, value in zip(network.parameters(), old, strict=True):
                assert not torch.equal(parameter, value)
        return losses

    monkeypatch.setattr(demo, "train_adversarially", recorded)
    assert demo.main([*small, "--adversarial", "--adversarial-steps", "3"]) == 0
    (reference, weights), (ours, same_weights) = calls
    assert all(map(torch.equal, weights, same_weights))
    for network, kind in ((reference, nn.LeakyReLU), (ours, prelu_gpu.LeakyReLU)):
        layers = [m for m in network.modules() if isinstance(m, nn.LeakyReLU)]
        assert [type(layer) for layer in layers] == [kind] * 3
        assert {layer.negative_slope for layer in layers} == {0.2}
    output = capsys.readouterr().out
    assert output.count(" 3/3 ") == 2
    for row in ("content loss", "adversarial loss", "discriminator loss"):
        figures = re.search(rf"{row} +│ +│ +([\d.]+) +│ +([\d.]+) │", output).groups()
        assert float(figures[0]) == pytest.approx(float(figures[1]), rel=1e-2)
    with Image.open(tmp_path / "out" / "demo.png") as image:
        assert image.size == (1440, 720)


def test_the_discriminator_learns_to_tell_photographs_from_outputs(adversaries):
    generator, discriminator = adversaries
    high = torch.rand(4, 3, 48, 48)
    losses = srgan.train_adversarially(generator, discriminator, [high] * 100)
    assert discriminator(high).min() > 0 > discriminator(generator(photos.downscale(high))).max()
    assert losses.discriminator < 2 * math.log(2)


def test_the_generator_learns_to_pass_for_a_photograph(adversaries, monkeypatch):
    generator, discriminator = adversaries
    for parameter in discriminator.parameters():
        parameter.register_hook(torch.zeros_like)
    high = torch.rand(4, 3, 48, 48)
    logits = []
    for weight in (0, 1e3):
        monkeypatch.setattr(srgan, "ADVERSARIAL_WEIGHT", weight)
        copied = copy.deepcopy(generator)
        srgan.train_adversarially(copied, discriminator, [high] * 20)
        logits.append(discriminator(copied(photos.downscale(high))))
    assert (logits[1] > logits[0]).all()


# Photographs


def test_scikit_image_has_the_photographs_and_the_astronaut_is_held_out():
    found = photos.load_photos(None)
    assert [photo.name for photo in found] == list(photos.BUNDLED)
    assert found[-1].name == "astronaut.png"
    assert found[-1].pixels.shape == (3, 512, 512)
    assert all(photo.pixels.float().std() > 20 for photo in found)


def test_photographs_come_by_name_without_hidden_and_other_files(folder):
    (folder / "README.txt").write_text("no picture")
    (folder / "._c.png").write_bytes(b"no picture either")
    (folder / "z").mkdir()
    save_photo(folder / "B.JPEG")
    assert [photo.name for photo in photos.load_photos(folder)] == (
        ["B.JPEG", "a.png", "b.jpg", "c.png"]
    )


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_other_modes_become_rgb(mode, tmp_path):
    pixels = save_photo(tmp_path / "photo.png")
    image = Image.fromarray(pixels).convert(mode)
    options = {"transparency": b"\0\x80"} if mode == "P" else {}
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    image.save(path, **options)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(photos.read_photo(path).pixels.permute(1, 2, 0).numpy(), expected)


def test_odd_sides_lose_a_pixel_and_large_ones_are_reduced(tmp_path):
    pixels = save_photo(tmp_path / "odd.png", width=61, height=49)
    odd = photos.read_photo(tmp_path / "odd.png").pixels
    assert np.array_equal(odd.permute(1, 2, 0).numpy(), pixels[:48, :60])
    save_photo(tmp_path / "large.png", width=2048, height=300)
    assert photos.read_photo(tmp_path / "large.png").pixels.shape == (3, 150, 1024)


def test_crops_lie_inside_the_photographs_and_depend_on_the_seed():
    rows, columns = torch.meshgrid(torch.arange(50), torch.arange(52), indexing="ij")
    ramp = photos.Photo("ramp", torch.stack([rows, columns, rows]).byte())
    exact = photos.Photo("exact", torch.full((3, 48, 48), 255, dtype=torch.uint8))
    crops = next(photos.random_crops([ramp, exact], 64, seed=0))
    corners = set()
    for crop in crops * 255:
        top, left = crop[0, 0, 0].item(), crop[1, 0, 0].item()
        if top == 255:
            assert (crop == 255).all()
        else:
            assert torch.allclose(crop[0], rows[:48, :48] + top)
            assert torch.allclose(crop[1], columns[:48, :48] + left)
        corners.add((round(top), round(left)))
    assert {(0, 0), (2, 4), (255, 255)} <= corners
    assert torch.equal(crops, next(photos.random_crops([ramp, exact], 64, seed=0)))
    assert not torch.equal(crops, next(photos.random_crops([ramp, exact], 64, seed=1)))


def test_psnr():
    target = torch.full((1, 3, 8, 8), 0.5)
    assert photos.psnr(target + 0.1, target) == pytest.approx(20, abs=1e-4)
    assert photos.psnr(target, target) == math.inf
    assert photos.psnr(torch.full_like(target, 7.0), torch.ones_like(target)) == math.inf


# Bad input


def text_as_picture(folder):
    (folder / "b.png").write_text("this is text")


def cut_off(folder):
    path = folder / "a.png"
    path.write_bytes(path.read_bytes()[:2000])


def only_one(folder):
    for name in ("a.png", "b.jpg"):
        (folder / name).unlink()


def none_at_all(folder):
    only_one(folder)
    (folder / "c.png").unlink()


def too_small(folder):
    save_photo(folder / "b.png", width=47, height=80)


def sixteen_bits(folder):
    deep = np.arange(60 * 60, dtype=np.uint16).reshape(60, 60)
    Image.fromarray(deep).save(folder / "b.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (none_at_all, r"--photos .*photos: 0 photographs .* at least 2 are needed; add some"),
        (only_one, r"--photos .*photos: 1 photographs .* at least 2 are needed; add some"),
        (text_as_picture, r"photos/b\.png: not a readable picture \(.*\); repair it or take it"),
        (cut_off, r"photos/a\.png: not a readable picture \(.*\); repair it or take it"),
        (too_small, r"photos/b\.png: 47 x 80 pixels .*at least 48 x 48 are needed; take it"),
        (sixteen_bits, r"photos/b\.png: more than 8 bits a channel .*; save it with 8 bits"),
    ],
)
def test_photographs_that_cannot_be_used(spoil, message, folder, small, capsys):
    spoil(folder)
    assert_refused(small, message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--photos", "/nowhere/at/all"], "--photos /nowhere/at/all: no such folder; give a"),
        (["--photos", __file__], "--photos .*test_demo.py: no such folder; give a folder"),
        (["--out", __file__], "--out .*test_demo.py: no folder can be made there .*; give another"),
        (["--steps", "-3"], "--steps: '-3' is not allowed; give a whole number from 1 up"),
        (["--steps", "many"], "--steps: 'many' is not allowed; give a whole number from 1 up"),
        (["--batch", "0"], "--batch: '0' is not allowed; give a whole number from 1 up"),
        (["--channels", "1.5"], "--channels: '1.5' is not allowed; give a whole number from 1 up"),
        (["--seed", "-1"], "--seed: '-1' is not allowed; give a whole number from 0 up"),
        (["--adversarial-steps", "0"], "--adversarial-steps: '0' is not allowed; give a whole"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu' .*cpu"),
        (["--fast"], "unrecognized arguments: --fast; see --help"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, message, small, capsys):
    assert_refused([*small, *arguments], message, capsys)


def test_without_kernels_nothing_is_compared(small, monkeypatch, capsys):
    monkeypatch.setattr("prelu_gpu.backend.backend", lambda device: Backend.EAGER)
    monkeypatch.setattr("prelu_gpu.backend.reason", lambda device: "triton cannot be imported")
    message = r"the kernels cannot run \(triton cannot be imported\); use Linux with triton"
    assert_refused(small, message, capsys)


def test_without_scikit_image_photographs_are_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "scikit-image, .* is not installed; install it or give your own with --photos DIR"
    assert_refused([], message, capsys)


def assert_refused(arguments, message, capsys):
    """The program says why in one line, and does nothing."""
    assert demo.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"demo: .*{message}.*\n", captured.err), captured.err


def test_help_names_the_photograph_that_is_held_out(capsys):
    with pytest.raises(SystemExit) as left:
        demo.main(["--help"])
    assert left.value.code == 0
    assert "the last by name is held out" in " ".join(capsys.readouterr().out.split())


def test_the_demo_shows_kernels_though_its_pictures_are_small(monkeypatch, device):
    monkeypatch.setattr(functional, "EAGER_BELOW", 2**22)
    demo.import_prelu_gpu(device)
    assert functional.EAGER_BELOW == 0
