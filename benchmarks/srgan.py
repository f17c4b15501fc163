"""SRGAN in small (Ledig et al., https://arxiv.org/abs/1609.04802): two networks, two trainings.

As in its successors the generator has no batch normalisation and learns the residual to bicubic
interpolation. Its residual blocks have a slope per channel, the layers around them a shared one.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.photos import SCALE, downscale, upscale

ADVERSARIAL_WEIGHT = 1e-3


class ResidualBlock(nn.Module):
    """Convolution, PReLU, convolution, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, input: Tensor) -> Tensor:
        """Keeps the (batch, channels, height, width) shape."""
        output: Tensor = input + self.body(input)
        return output


class Generator(nn.Module):
    """Doubles the sides of (batch, 3, height, width) pictures in [0, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.PReLU())
        self.body = nn.Sequential(
            ResidualBlock(channels),
            ResidualBlock(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        to_rgb = nn.Conv2d(channels, 3, 3, padding=1)
        self.tail = nn.Sequential(
            nn.Conv2d(channels, channels * SCALE**2, 3, padding=1),
            nn.PixelShuffle(SCALE),
            nn.PReLU(),
            to_rgb,
        )
        # Starting near bicubic keeps the first steps from undoing a random residual.
        with torch.no_grad():
            for parameter in to_rgb.parameters():
                parameter.mul_(0.1)

    def forward(self, low: Tensor) -> Tensor:
        """Returns the picture with both sides doubled."""
        features = self.head(low)
        output: Tensor = upscale(low) + self.tail(features + self.body(features))
        return output


class Discriminator(nn.Module):
    """Tells photographs from the generator's pictures: one logit each, above 0 for photographs.

    Args:
        channels: Channels of the first layer; each further one has twice as many.
        activation: nn.LeakyReLU or a subclass of it.
    """

    def __init__(self, channels: int, activation: type[nn.LeakyReLU]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), activation(0.2)]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, 1)

    def forward(self, high: Tensor) -> Tensor:
        """Maps (batch, 3, height, width) pictures to (batch, 1) logits."""
        logits: Tensor = self.classifier(self.features(high).mean((2, 3)))
        return logits


@dataclass
class Training:
    """What a training left behind.

    Attributes:
        losses: The loss of every step.
        bicubic_losses: What bicubic interpolation leaves of the same crops.
        gradients: Every parameter's gradient in the first step, by name.
        seconds: The duration of every step.
        peak_bytes: Memory at its peak, less what was allocated before; None on a CPU.
    """

    losses: list[float] = field(default_factory=list)
    bicubic_losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


@dataclass
class AdversarialLosses:
    """The losses of the last adversarial step."""

    content: float
    adversarial: float
    discriminator: float


def train(generator: nn.Module, batches: Iterable[Tensor], device: torch.device) -> Training:
    """Trains the generator to restore photographs from their halved copies, in the L1 norm."""
    training = Training()
    allocated = 0
    if device.type != "cpu":
        allocated = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3)
    for high in batches:
        low = downscale(high)
        training.bicubic_losses.append(F.l1_loss(upscale(low), high).item())
        start = time.perf_counter()
        loss = F.l1_loss(generator(low), high)
        optimizer.zero_grad()
        loss.backward()
        if not training.losses:
            training.gradients = {
                name: parameter.grad.clone()
                for name, parameter in generator.named_parameters()
                if parameter.grad is not None
            }
        optimizer.step()
        training.losses.append(loss.item())  # waits for the device: the step is timed whole
        training.seconds.append(time.perf_counter() - start)
    if device.type != "cpu":
        training.peak_bytes = torch.accelerator.max_memory_allocated(device) - allocated
    return training


def train_adversarially(
    generator: nn.Module, discriminator: nn.Module, batches: Iterable[Tensor]
) -> AdversarialLosses:
    """Goes on training the generator, now also to pass for a photograph."""
    losses = AdversarialLosses(math.nan, math.nan, math.nan)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-4)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    for high in batches:
        output = generator(downscale(high))

        # softplus(-z) is the cross-entropy of a logit with "photograph", softplus(z) with "not"
        real, fake = discriminator(high), discriminator(output.detach())
        discriminator_loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        discriminator_optimizer.zero_grad()
        discriminator_loss.backward()
        discriminator_optimizer.step()

        content = F.l1_loss(output, high)
        adversarial = F.softplus(-discriminator(output)).mean()
        generator_optimizer.zero_grad()
        (content + ADVERSARIAL_WEIGHT * adversarial).backward()
        generator_optimizer.step()

        losses = AdversarialLosses(content.item(), adversarial.item(), discriminator_loss.item())
    return losses
