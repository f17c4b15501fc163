"""Photographs for super-resolution: reading them, and cropping them at random."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
import torch
import typer
from PIL import Image
from torch import Tensor

CROP = 48
LONGEST_SIDE = 1024
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

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


class Photo(NamedTuple):
    """A photograph: its file name and its (3, height, width) pixels, in bytes to be small."""

    name: str
    pixels: Tensor

    def batch(self) -> Tensor:
        """The whole photograph as a (1, 3, height, width) batch in [0, 1]."""
        return self.pixels[None].float() / 255


def load_photos(folder: Path | None) -> list[Photo]:
    """Reads the photographs of a folder by name, or those in the scikit-image wheel.

    Returns:
        Two or more photographs; the last is the one to hold out of training.

    Raises:
        typer.BadParameter: fewer than two photographs, or one that cannot be used.
    """
    if folder is None:
        return [read_photo(Path(skimage.__file__).parent / "data" / name) for name in BUNDLED]
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if len(paths) < 2:
        raise refusal(
            f"{folder}: {len(paths)} photographs ({' '.join(SUFFIXES)}) in it, at least 2 are "
            "needed; add some, the last by name is held out of training"
        )
    return [read_photo(path) for path in paths]


def read_photo(path: Path) -> Photo:
    """Reads a picture as RGB, reduced to at most 1024 pixels a side, both sides even.

    Raises:
        typer.BadParameter: the file is no readable 8-bit picture, or is smaller than a crop.
    """
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on a broken file
        raise refusal(f"{path}: not a readable picture ({error}); take it out") from error
    if image.mode.startswith(("I", "F")):
        raise refusal(f"{path}: more than 8 bits a channel ({image.mode}); save it with 8 bits")
    rgb.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    if min(rgb.size) < CROP:
        width, height = rgb.size
        raise refusal(
            f"{path}: {width} x {height} pixels (of at most {LONGEST_SIDE} a side), "
            f"at least {CROP} x {CROP} are needed; take it out"
        )
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    height, width = (side // 2 * 2 for side in pixels.shape[1:])
    return Photo(path.name, pixels[:, :height, :width])


def refusal(message: str) -> typer.BadParameter:
    """The error of photographs that cannot be used."""
    return typer.BadParameter(message, param_hint="--photos")


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
