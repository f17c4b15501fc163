"""Networks that train with PReLU, as published; the demo's is in benchmarks/srgan.py."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A body with a shortcut around it; the shortcut is the input itself if none is given."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """Adds what both make of the input."""
        return self.body(input) + self.shortcut(input)


def iresnet() -> nn.Sequential:
    """Face recognition: the "improved" ResNet-50 of ArcFace, with a slope per channel.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
    https://arxiv.org/abs/1801.07698. Maps (batch, 3, 112, 112) pictures to (batch, 10000) logits of
    the people to tell apart.
    """
    blocks = []
    before = 64
    for channels, count in ((64, 3), (128, 4), (256, 14), (512, 3)):
        for stride in [2] + [1] * (count - 1):
            blocks.append(face_block(before, channels, stride))
            before = channels
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.PReLU(64),
        *blocks,
        nn.BatchNorm2d(512),
        nn.Flatten(),
        nn.Linear(512 * 7 * 7, 512),
        nn.BatchNorm1d(512),
        nn.Linear(512, 10_000, bias=False),
    )


def face_block(inputs: int, outputs: int, stride: int) -> Residual:
    """The block of IResNet: normalised before and after, PReLU only between the convolutions."""
    body = nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.PReLU(outputs),
        nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
    )
    if stride == 1:
        return Residual(body)
    shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
    return Residual(body, nn.Sequential(*shortcut))


class Skip(nn.Module):
    """An input beside what a body makes of it, along the channels."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, input: Tensor) -> Tensor:
        """Adds channels to the input's."""
        return torch.cat([input, self.body(input)], 1)


def unet(
    channels: Sequence[int] = (32, 64, 128, 256),
    inputs: int = 1,
    outputs: int = 2,
    top: bool = True,
) -> nn.Sequential:
    """3-D segmentation: a U-Net of residual units as MONAI builds it, all slopes shared.

    Kerfoot et al., "Left-Ventricle Quantification Using Residual U-Net" (STACOM 2018); MONAI:
    https://arxiv.org/abs/2211.02701. Maps (batch, 1, depth, height, width) volumes to logits of
    two classes, (batch, 2, depth, height, width).

    Args:
        channels: of each level; each except the last halves the sides.
        inputs: channels of what comes into this level.
        outputs: channels of what leaves it.
        top: whether it is the first level, whose last layer gives logits.
    """
    here, *below = channels
    if len(below) > 1:
        body, joined = unet(below, here, here, top=False), 2 * here
    else:
        body, joined = volume_unit(here, *below, stride=1), here + below[0]
    last = nn.Conv3d(outputs, outputs, 3, padding=1) if top else volume_layer(outputs, outputs)
    return nn.Sequential(
        volume_unit(inputs, here, stride=2),
        Skip(body),
        nn.ConvTranspose3d(joined, outputs, 3, stride=2, padding=1, output_padding=1),
        nn.InstanceNorm3d(outputs),
        nn.PReLU(),
        Residual(last),
    )


def volume_layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, InstanceNorm, PReLU."""
    convolution = nn.Conv3d(inputs, outputs, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.InstanceNorm3d(outputs), nn.PReLU())


def volume_unit(inputs: int, outputs: int, stride: int) -> Residual:
    """Two layers, the first with the stride, and a convolution around them."""
    kernel = 3 if stride > 1 else 1
    return Residual(
        nn.Sequential(volume_layer(inputs, outputs, stride), volume_layer(outputs, outputs)),
        nn.Conv3d(inputs, outputs, kernel, stride, padding=kernel // 2),
    )


class ConvTasNet(nn.Module):
    """Speech separation: masks on a learned transform of the sound, all slopes shared.

    Luo and Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech
    Separation", https://arxiv.org/abs/1809.07454; non-causal, with the paper's best sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 512, 16, stride=8, bias=False)
        self.normalise = nn.Sequential(nn.GroupNorm(1, 512), nn.Conv1d(512, 128, 1))
        dilations = [2**number for number in range(8)] * 3
        self.blocks = nn.ModuleList(sound_block(dilation) for dilation in dilations)
        # The last block's features go nowhere except to the masks.
        self.onward = nn.ModuleList(nn.Conv1d(512, 128, 1) for _ in dilations[1:])
        self.skips = nn.ModuleList(nn.Conv1d(512, 128, 1) for _ in dilations)
        self.masks = nn.Sequential(
            nn.PReLU(), nn.Conv1d(128, 2 * 512, 1), nn.Unflatten(1, (2, 512)), nn.Sigmoid()
        )
        self.decoder = nn.ConvTranspose1d(512, 1, 16, stride=8, bias=False)

    def forward(self, mixtures: Tensor) -> Tensor:
        """Maps (batch, samples) to the voices, (batch, 2, samples); samples fill whole filters."""
        transform = self.encoder(mixtures.unsqueeze(1))
        features = self.normalise(transform)
        skipped = torch.zeros_like(features)
        for block, onward, skip in itertools.zip_longest(self.blocks, self.onward, self.skips):
            hidden = block(features)
            skipped = skipped + skip(hidden)
            if onward is not None:
                features = features + onward(hidden)
        voices = self.masks(skipped) * transform.unsqueeze(1)
        sounds = self.decoder(voices.flatten(0, 1))
        return sounds.unflatten(0, voices.shape[:2]).squeeze(2)


def sound_block(dilation: int) -> nn.Sequential:
    """The block of Conv-TasNet up to its two outputs: PReLU and global norm after each layer."""
    return nn.Sequential(
        nn.Conv1d(128, 512, 1),
        nn.PReLU(),
        nn.GroupNorm(1, 512),
        nn.Conv1d(512, 512, 3, padding=dilation, dilation=dilation, groups=512),
        nn.PReLU(),
        nn.GroupNorm(1, 512),
    )
