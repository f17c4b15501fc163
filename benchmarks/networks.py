"""Networks that train with PReLU, as published, and the losses they train with.

All take sizes; the defaults are the papers'. The demo's network is in benchmarks/srgan.py.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A body with a shortcut around it; the shortcut is the input itself if none is given."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """Adds what both make of the input."""
        output: Tensor = self.body(input) + self.shortcut(input)
        return output


class IResNet(nn.Module):
    """Face recognition: the "improved" ResNet of ArcFace, with a slope per channel.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
    https://arxiv.org/abs/1801.07698. Defaults are IResNet-50.

    Args:
        layers: Residual blocks of each stage; the first of a stage halves the sides.
        width: Channels of the first stage; each further one has twice as many.
        size: Side of the pictures, a multiple of 16.
        embedding: Numbers that describe a face.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 14, 3),
        width: int = 64,
        size: int = 112,
        embedding: int = 512,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        )
        blocks = []
        channels = width
        for stage, count in enumerate(layers):
            for number in range(count):
                outputs = width * 2**stage
                blocks.append(face_block(channels, outputs, stride=2 if number == 0 else 1))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels * (size // 2 ** len(layers)) ** 2, embedding),
            nn.BatchNorm1d(embedding),
        )

    def forward(self, faces: Tensor) -> Tensor:
        """Maps (batch, 3, size, size) pictures to (batch, embedding) descriptions."""
        output: Tensor = self.head(self.blocks(self.stem(faces)))
        return output


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
    if stride == 1 and inputs == outputs:
        return Residual(body)
    shortcut = nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
    )
    return Residual(body, shortcut)


class CosineClassifier(nn.Module):
    """The cosines between a description and a centre for each identity: what ArcFace trains."""

    def __init__(self, embedding: int, identities: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.empty(identities, embedding).normal_(std=0.01))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Maps (batch, embedding) to (batch, identities), each in [-1, 1]."""
        return F.linear(F.normalize(embeddings), F.normalize(self.centres))


def arcface_loss(
    cosines: Tensor, identities: Tensor, scale: float = 64.0, margin: float = 0.5
) -> Tensor:
    """Cross-entropy after the angle to the true centre was made wider by `margin` radians.

    Args:
        cosines: (batch, identities).
        identities: (batch,) numbers of the true ones.
        scale: Factor of all cosines.
        margin: In radians.
    """
    cosines = cosines.float()
    true = F.one_hot(identities, cosines.shape[1]).to(cosines.dtype)
    cosine = (cosines * true).sum(1, keepdim=True)
    sine = (1 - cosine.square()).clamp(min=1e-6).sqrt()
    widened = cosine * math.cos(margin) - sine * math.sin(margin)
    return F.cross_entropy(scale * (cosines + true * (widened - cosine)), identities)


class UNet(nn.Module):
    """3-D segmentation: a U-Net of residual units as MONAI builds it, all slopes shared.

    Kerfoot et al., "Left-Ventricle Quantification Using Residual U-Net" (STACOM 2018); MONAI:
    https://arxiv.org/abs/2211.02701.

    Args:
        inputs: Channels of the volumes.
        outputs: Channels of the result, one for each class.
        channels: Channels of each level; each but the last halves the sides.
    """

    def __init__(
        self, inputs: int = 1, outputs: int = 2, channels: Sequence[int] = (32, 64, 128, 256)
    ) -> None:
        super().__init__()
        *upper, lowest = channels
        levels = list(zip([inputs, *upper], upper, strict=False))
        self.encoder = nn.ModuleList(volume_unit(before, here, 2) for before, here in levels)
        self.bottom = volume_unit(upper[-1], lowest, 1)
        decoder = []
        below = lowest
        for number, here in reversed(list(enumerate(upper))):
            above = upper[number - 1] if number else outputs
            last = volume_layer(above, above) if number else nn.Conv3d(above, above, 3, padding=1)
            raised = nn.ConvTranspose3d(
                here + below, above, 3, stride=2, padding=1, output_padding=1
            )
            decoder.append(
                nn.Sequential(raised, nn.InstanceNorm3d(above), nn.PReLU(), Residual(last))
            )
            below = above
        self.decoder = nn.ModuleList(decoder)

    def forward(self, volumes: Tensor) -> Tensor:
        """Maps (batch, inputs, depth, height, width) to logits (batch, outputs, ...)."""
        features = volumes
        skipped = []
        for unit in self.encoder:
            features = unit(features)
            skipped.append(features)
        features = self.bottom(features)
        for unit in self.decoder:
            features = unit(torch.cat([skipped.pop(), features], 1))
        return features


def volume_layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, InstanceNorm, PReLU."""
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, stride, padding=1), nn.InstanceNorm3d(outputs), nn.PReLU()
    )


def volume_unit(inputs: int, outputs: int, stride: int) -> Residual:
    """Two layers, the first with the stride, and a convolution around them."""
    kernel = 3 if stride > 1 else 1
    return Residual(
        nn.Sequential(volume_layer(inputs, outputs, stride), volume_layer(outputs, outputs)),
        nn.Conv3d(inputs, outputs, kernel, stride, padding=kernel // 2),
    )


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """1 - the mean Dice overlap of every volume's classes with the truth.

    Args:
        logits: (batch, classes, depth, height, width).
        mask: the same shape; 1 in the channel of the true class, else 0.
    """
    probabilities = logits.float().softmax(1)
    space = (2, 3, 4)
    overlap = (probabilities * mask).sum(space)
    dice: Tensor = (2 * overlap + 1e-5) / ((probabilities + mask).sum(space) + 1e-5)
    return 1 - dice.mean()


class ConvTasNet(nn.Module):
    """Speech separation: masks on a learned transform of the sound, all slopes shared.

    Luo and Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech
    Separation", https://arxiv.org/abs/1809.07454; non-causal, with the paper's best sizes.

    Args:
        filters: Of the transform (the paper's N).
        length: Samples each filter sees (L); filters overlap by half.
        bottleneck: Channels between the blocks and of the skip paths (B, Sc).
        hidden: Channels in a block (H).
        kernel: Of the depthwise convolutions (P).
        blocks: In a repeat, each dilated twice as far as the one before (X).
        repeats: Of these blocks (R).
        speakers: Voices to separate (C).
    """

    def __init__(
        self,
        filters: int = 512,
        length: int = 16,
        bottleneck: int = 128,
        hidden: int = 512,
        kernel: int = 3,
        blocks: int = 8,
        repeats: int = 3,
        speakers: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, filters, length, length // 2, bias=False)
        self.normalise = nn.Sequential(nn.GroupNorm(1, filters), nn.Conv1d(filters, bottleneck, 1))
        dilations = [2**number for _ in range(repeats) for number in range(blocks)]
        self.blocks = nn.ModuleList(
            sound_block(bottleneck, hidden, kernel, dilation) for dilation in dilations
        )
        # The last block's features go nowhere but to the masks.
        self.onward = nn.ModuleList(nn.Conv1d(hidden, bottleneck, 1) for _ in dilations[1:])
        self.skips = nn.ModuleList(nn.Conv1d(hidden, bottleneck, 1) for _ in dilations)
        self.masks = nn.Sequential(
            nn.PReLU(),
            nn.Conv1d(bottleneck, speakers * filters, 1),
            nn.Unflatten(1, (speakers, filters)),
            nn.Sigmoid(),
        )
        self.decoder = nn.ConvTranspose1d(filters, 1, length, length // 2, bias=False)

    def forward(self, mixtures: Tensor) -> Tensor:
        """Maps (batch, samples) to (batch, speakers, samples); samples fill whole filters."""
        transform = self.encoder(mixtures.unsqueeze(1))
        features = self.normalise(transform)
        skipped = torch.zeros_like(features)
        for block, onward, skip in itertools.zip_longest(self.blocks, self.onward, self.skips):
            hidden = block(features)
            skipped = skipped + skip(hidden)
            if onward is not None:
                features = features + onward(hidden)
        voices = self.masks(skipped) * transform.unsqueeze(1)
        sounds: Tensor = self.decoder(voices.flatten(0, 1))
        return sounds.unflatten(0, voices.shape[:2]).squeeze(2)


def sound_block(bottleneck: int, hidden: int, kernel: int, dilation: int) -> nn.Sequential:
    """The block of Conv-TasNet up to its two outputs: PReLU and global norm after each layer."""
    return nn.Sequential(
        nn.Conv1d(bottleneck, hidden, 1),
        nn.PReLU(),
        nn.GroupNorm(1, hidden),
        nn.Conv1d(
            hidden,
            hidden,
            kernel,
            padding=dilation * (kernel - 1) // 2,
            dilation=dilation,
            groups=hidden,
        ),
        nn.PReLU(),
        nn.GroupNorm(1, hidden),
    )


def si_snr_loss(estimates: Tensor, sources: Tensor) -> Tensor:
    """The negative scale-invariant signal-to-noise ratio in dB, speakers in the best order.

    Args:
        estimates: (batch, speakers, samples).
        sources: the same shape.
    """
    centred = [sound - sound.mean(2, keepdim=True) for sound in (estimates, sources)]
    cosines = F.normalize(centred[0], dim=2) @ F.normalize(centred[1], dim=2).mT
    # The part of an estimate along a source against the part across it.
    along = cosines.square().clamp(1e-8, 1 - 1e-6)
    ratios = 10 * torch.log10(along / (1 - along))
    speakers = range(ratios.shape[1])
    orders = [
        torch.stack([ratios[:, i, order[i]] for i in speakers], 1).mean(1)
        for order in itertools.permutations(speakers)
    ]
    return -torch.stack(orders, 1).amax(1).mean()
