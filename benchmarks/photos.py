"""Photographs for super-resolution: reading them, cropping them, and measuring what is restored."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SCALE = 2
CROP = 48
LONGEST_SIDE = 1024
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}

# Photographs with detail to restore; the astronaut is held out.
BUNDLED = (
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "rocket.jpg",
    "astronaut.png",
)


class InputError(Exception):
    """What the user gave cannot be used; the message says why and what to do."""


class Photo(NamedTuple):
    """A photograph: its file name and its (3, height, width) pixels, in bytes to be small."""

    name: str
    pixels: Tensor

    def batch(self) -> Tensor:
        """The whole photograph as a (1, 3, height, width) batch in [0, 1]."""
        return self.pixels[None].float() / 255


def load_photos(folder: Path | None) -> list[Photo]:
    """Reads the photographs of a folder by name, or those in the scikit-image wheel.

    Args:
        folder: Where to look (not in subfolders), or None for the photographs of scikit-image.

    Returns:
        Two or more photographs; the last is the one to hold out of training.

    Raises:
        InputError: No such folder, fewer than two photographs in it, or one that cannot be used.
    """
    if folder is None:
        return [read_photo(bundled_folder() / name) for name in BUNDLED]
    if not folder.is_dir():
        raise InputError(f"--photos {folder}: no such folder; give a folder of photographs")
    try:
        paths = sorted(path for path in folder.iterdir() if is_photo(path))
    except OSError as error:
        raise InputError(f"--photos {folder}: cannot be read ({error.strerror})") from error
    if len(paths) < 2:
        kinds = " ".join(sorted(SUFFIXES))
        raise InputError(
            f"--photos {folder}: {len(paths)} photographs ({kinds}) in it, at least 2 are needed; "
            "add some, the last by name is held out of training"
        )
    return [read_photo(path) for path in paths]


def bundled_folder() -> Path:
    """Where scikit-image keeps its pictures."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError(
            "scikit-image, whose photographs are used, is not installed; "
            "install it or give your own with --photos DIR"
        )
    return Path(package.origin).parent / "data"


def is_photo(path: Path) -> bool:
    """Whether a file's name says that it is a photograph, and not a hidden file."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_photo(path: Path) -> Photo:
    """Reads a picture as RGB, reduced to at most 1024 pixels a side, both sides even.

    Raises:
        InputError: The file is no readable 8-bit picture, or is smaller than a crop.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise many kinds on a broken file
        raise InputError(
            f"{path}: not a readable picture ({error}); repair it or take it out of the folder"
        ) from error
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{path}: more than 8 bits a channel (mode {image.mode}); save it with 8 bits"
        )
    image.info.pop("transparency", None)  # it would be dropped with a warning
    rgb = image.convert("RGB")
    rgb.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    if min(rgb.size) < CROP:
        width, height = rgb.size
        raise InputError(
            f"{path}: {width} x {height} pixels (of at most {LONGEST_SIDE} a side), "
            f"at least {CROP} x {CROP} are needed; take it out of the folder"
        )
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    height, width = (side // SCALE * SCALE for side in pixels.shape[1:])
    return Photo(path.name, pixels[:, :height, :width].contiguous())


def random_crops(photos: list[Photo], batch: int, seed: int) -> Iterator[Tensor]:
    """Endless random crops as (batch, 3, 48, 48) in [0, 1]; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    while True:
        crops = []
        for _ in range(batch):
            pixels = photos[below(len(photos))].pixels
            top = below(pixels.shape[1] - CROP + 1)
            left = below(pixels.shape[2] - CROP + 1)
            crops.append(pixels[:, top : top + CROP, left : left + CROP])
        yield torch.stack(crops).float() / 255


def downscale(high: Tensor) -> Tensor:
    """Halves the sides of (batch, 3, height, width) pictures: the network's input."""
    low = F.interpolate(high, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return low.clamp(0, 1)


def upscale(low: Tensor) -> Tensor:
    """Doubles the sides by bicubic interpolation: what the network has to beat."""
    return F.interpolate(low, scale_factor=SCALE, mode="bicubic")


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and colours, of pictures in [0, 1]."""
    error = F.mse_loss(output.clamp(0, 1).double(), target.double()).item()
    return -10 * math.log10(error) if error > 0 else math.inf
