import contextlib
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from benchmarks import demo, photos, srgan
from prelu_gpu.run import execute, intercepting

SHORT = {"steps": 6, "batch": 2, "channels": 2}


def save_photo(path, width=60, height=52, seed=0):
    """A picture with detail at every scale: smooth colours, edges and noise."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(x / 9 + seed) + 40 * (np.cos(y / 5) > 0)
    noise = np.random.default_rng(seed).normal(0, 15, (height, width, 3))
    pixels = np.clip(waves[..., None] + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def fill(folder):
    folder.mkdir()
    for seed, name in enumerate(["a.png", "B.JPG", "z[red]$\\x$.png"]):
        save_photo(folder / name, seed=seed)
    (folder / "README.txt").write_text("no picture")
    (folder / "._a.png").write_bytes(b"hidden, and no picture either")
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "photos")


def run(folder, out, **options):
    """Gives the exit status."""
    try:
        demo.main(folder, out, **{**SHORT, **options})
    except typer.Exit as end:
        return end.exit_code
    return 0


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """What a short training leaves, satisfied with any gain."""
    folder = tmp_path_factory.mktemp("demo")
    kernels, written = [], io.StringIO()

    def counted(call, values):
        kernels.append(call.kernel.__name__)
        execute(call, values)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(written):
        patch.setattr(demo, "NEEDED_GAIN", -1.0)
        with intercepting(counted):
            status = run(fill(folder / "photos"), folder / "new" / "out")
    picture = folder / "new" / "out" / "demo.png"
    return SimpleNamespace(status=status, text=written.getvalue(), picture=picture, kernels=kernels)


def test_a_run_succeeds_and_says_what_it_measured(short_run):
    text = short_run.text
    assert short_run.status == 0
    assert "Photographs: B.JPG, a.png. Held out of training: z[red]$\\x$.png." in text
    assert "measured on z[red]$\\x$.png" in text
    assert text.count(" 6/6 ") == 2
    bicubic, reference, ours = map(float, re.search(r"PSNR, dB" + 3 * r" +([\d.]+)", text).groups())
    assert 10 < bicubic < 40
    assert reference == pytest.approx(ours, abs=0.01)
    assert re.search(r"time per step, median +[\d.]+ ms +[\d.]+ ms", text)
    differences = re.findall(r"difference of .* (\d\.\de.\d\d) of (\d\.\de.\d\d)", text)
    assert len(differences) == 2
    assert all(float(difference) < float(explained) for difference, explained in differences)


def test_the_network_with_prelu_gpu_runs_kernels_for_each_prelu(short_run):
    forwards = [name for name in short_run.kernels if "forward" in name]
    assert len(forwards) == 4 * (1 + SHORT["steps"] + 1)  # the gate, the steps, the photograph


def test_the_picture_is_written_in_colour(short_run):
    with Image.open(short_run.picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (720, 1440, 3)
    half = pixels.shape[0] // 2
    for part in (pixels[:half, :720], pixels[:half, 720:]):
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 500
    # The two curves: matplotlib's orange and blue.
    for colour in ((255, 127, 14), (31, 119, 180)):
        assert (pixels[half:] == colour).all(-1).sum() > 200


def test_the_part_shown_is_the_one_that_bicubic_interpolation_restores_worst():
    target = torch.zeros(1, 3, 200, 240)
    bicubic = target.clone()
    bicubic[:, :, 100:120, 150:170] = 1
    top, left, side = demo.most_detailed(bicubic, target)
    assert top <= 100 < 120 <= top + side
    assert left <= 150 < 170 <= left + side


# Wrong kernels


def scaled(parameter, factor, right=0):
    """Makes kernels write this result too large, except the first so many times."""
    written = []

    def wrong(call, values):
        execute(call, values)
        if values.get(parameter) is not None:
            written.append(call)
            if len(written) > right:
                values[parameter].mul_(factor)

    return intercepting(wrong)


@pytest.mark.parametrize("parameter", ["y_ptr", "grad_x_ptr", "grad_weight_ptr"])
def test_a_kernel_whose_result_is_too_large_by_a_thousandth_is_found(
    parameter, folder, tmp_path, capsys
):
    with scaled(parameter, 1.001):
        assert run(folder, tmp_path) == 1
    error = capsys.readouterr().err
    assert re.search(r"nn.PReLU and prelu_gpu differ: .+: .+ apart, rounding explains", error)


def test_losses_that_part_after_the_first_step_are_found(folder, tmp_path, capsys):
    # Right in the gate and in the first step, then with the other sign.
    with scaled("grad_x_ptr", -1.0, right=2 * 4):
        assert run(folder, tmp_path, steps=20) == 1
    error = capsys.readouterr().err
    assert error.count("differ") == 1
    assert "differ: losses of the first 20 steps: " in error


def test_networks_that_do_not_beat_bicubic_by_the_needed_gain_are_named(folder, tmp_path, capsys):
    assert run(folder, tmp_path, steps=1) == 1
    failing = re.findall(r"(\S+) reaches [\d.]+ dB, but", capsys.readouterr().err)
    assert failing == ["nn.PReLU", "prelu_gpu"]


# Photographs


def test_psnr():
    target = torch.full((1, 3, 8, 8), 0.5)
    assert srgan.psnr(target + 0.1, target) == pytest.approx(20, abs=1e-4)


def test_odd_sides_lose_a_pixel_and_large_ones_are_reduced(tmp_path):
    pixels = save_photo(tmp_path / "odd.png", width=61, height=49)
    odd = photos.read_photo(tmp_path / "odd.png").pixels
    assert np.array_equal(odd.permute(1, 2, 0).numpy(), pixels[:48, :60])
    save_photo(tmp_path / "large.png", width=2048, height=300)
    assert photos.read_photo(tmp_path / "large.png").pixels.shape == (3, 150, 1024)


def test_crops_lie_inside_the_photographs_and_reach_their_corners():
    rows, columns = torch.meshgrid(torch.arange(50), torch.arange(52), indexing="ij")
    ramp = photos.Photo("ramp", torch.stack([rows, columns, rows]).byte())
    exact = photos.Photo("exact", torch.full((3, 48, 48), 255, dtype=torch.uint8))
    crops = next(photos.random_crops([ramp, exact], 64, seed=0)) * 255
    corners = {(round(crop[0, 0, 0].item()), round(crop[1, 0, 0].item())) for crop in crops}
    assert crops.shape == (64, 3, 48, 48)
    assert {(0, 0), (2, 4), (255, 255)} <= corners
    assert corners <= {(top, left) for top in range(3) for left in range(5)} | {(255, 255)}


# What cannot be used


def text_as_picture(folder):
    (folder / "a.png").write_text("this is text")


def only_one(folder):
    (folder / "a.png").unlink()
    (folder / "B.JPG").unlink()


def too_small(folder):
    save_photo(folder / "a.png", width=47, height=80)


def sixteen_bits(folder):
    Image.fromarray(np.zeros((60, 60), np.uint16)).save(folder / "a.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only_one, r"photos: 1 photographs .* at least 2 are needed; add some"),
        (text_as_picture, r"a\.png: not a readable picture \(.*\); take it out"),
        (too_small, r"a\.png: 47 x 80 pixels .* at least 48 x 48 are needed; take it"),
        (sixteen_bits, r"a\.png: more than 8 bits a channel .*; save it with 8 bits"),
    ],
)
def test_photographs_that_cannot_be_used(spoil, message, folder, tmp_path):
    spoil(folder)
    with pytest.raises(typer.BadParameter, match=message):
        run(folder, tmp_path)


def test_without_kernels_nothing_is_compared(folder, tmp_path, no_kernels):
    with pytest.raises(typer.BadParameter, match=r"kernels cannot run \(.*\); use Linux with"):
        run(folder, tmp_path)


def test_wrong_options_end_with_status_2(cli, capsys):
    assert cli("demo", "--photos", "/nowhere") == 2
    assert "--photos" in capsys.readouterr().err
