"""The generator of SRGAN in small (Ledig et al., https://arxiv.org/abs/1609.04802), in training.

As in its successors it has no batch normalisation and learns the residual to bicubic interpolation.
Its residual blocks have a slope per channel, the layers around them a shared one.
"""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from benchmarks.networks import Residual

SCALE = 2


class Generator(nn.Module):
    """Doubles the sides of (batch, 3, height, width) pictures in [0, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.PReLU())
        self.body = Residual(
            nn.Sequential(
                picture_block(channels),
                picture_block(channels),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
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
        return upscale(low) + self.tail(self.body(self.head(low)))


def picture_block(channels: int) -> Residual:
    """The residual block of SRGAN without its norms: convolution, PReLU, convolution."""
    return Residual(
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
    )


def downscale(high: Tensor) -> Tensor:
    """Halves the sides of (batch, 3, height, width) pictures: the network's input."""
    low = F.interpolate(high, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return low.clamp(0, 1)


def upscale(low: Tensor) -> Tensor:
    """Doubles the sides by bicubic interpolation: what the network has to beat."""
    return F.interpolate(low, scale_factor=SCALE, mode="bicubic")


@dataclass
class Training:
    """A network's training, and the photograph held out as the network restores it then."""

    losses: list[float]
    bicubic_losses: list[float]
    """What bicubic interpolation leaves of the same crops."""
    step_seconds: float
    """The median."""
    peak_bytes: int | None
    """Memory at its peak, less what was allocated before; None on a CPU."""
    output: Tensor
    psnr: float


def backward(network: nn.Module, high: Tensor) -> Tensor:
    """The loss of restoring photographs from their halved copies; parameters get gradients."""
    loss = F.l1_loss(network(downscale(high)), high)
    loss.backward()
    return loss


def train(network: nn.Module, crops: Iterable[Tensor], held_out: Tensor) -> Training:
    """Trains the network on crops of photographs, and has it restore another."""
    device = next(network.parameters()).device
    allocated, peak = 0, None
    if device.type != "cpu":
        allocated = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    losses, bicubic_losses, seconds = [], [], []
    for high in crops:
        bicubic_losses.append(F.l1_loss(upscale(downscale(high)), high).item())
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = backward(network, high)
        optimizer.step()
        losses.append(loss.item())  # waits for the device: the step is timed whole
        seconds.append(time.perf_counter() - start)
    if device.type != "cpu":
        peak = torch.accelerator.max_memory_allocated(device) - allocated
    with torch.no_grad():
        output = network(downscale(held_out).to(device)).clamp(0, 1).cpu()
    step_seconds = statistics.median(seconds)
    return Training(losses, bicubic_losses, step_seconds, peak, output, psnr(output, held_out))


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and colours, of pictures in [0, 1]."""
    return float(peak_signal_noise_ratio(target.numpy(), output.numpy(), data_range=1))
