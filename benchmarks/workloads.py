"""The networks whose training is timed, what they are trained on, and one step of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import LAYOUTS, dtype_name
from benchmarks.networks import (
    ConvTasNet,
    CosineClassifier,
    IResNet,
    UNet,
    arcface_loss,
    dice_loss,
    si_snr_loss,
)
from benchmarks.photos import downscale
from benchmarks.srgan import Generator

IDENTITIES = 10_000


@dataclass(frozen=True)
class Workload:
    """A network and how it is trained."""

    network: str
    batch: int
    """Examples in a step."""
    dtype: torch.dtype
    """float16 for float32 weights under autocast, with a GradScaler."""
    build: Callable[[], nn.Module]
    """Makes the network, its weights from the global generator."""
    draw: Callable[[int, torch.device], tuple[Tensor, Tensor]]
    """Makes a batch of random inputs and targets on a device."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """Of the network's output and the target."""
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    layout: str = "contiguous"
    """Of the network and its input."""

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.network}, {self.layout}"

    @property
    def dtype_name(self) -> str:
        """The dtype without its module."""
        return dtype_name(self.dtype)


def draw_faces(
    batch: int, device: torch.device, size: int = 112, identities: int = IDENTITIES
) -> tuple[Tensor, Tensor]:
    """Pictures (batch, 3, size, size) and identities (batch,)."""
    return (
        torch.randn(batch, 3, size, size, device=device),
        torch.randint(identities, (batch,), device=device),
    )


def draw_volumes(batch: int, device: torch.device, side: int = 192) -> tuple[Tensor, Tensor]:
    """Volumes (batch, 1, side, side, side), and dark and bright voxels as (batch, 2, ...)."""
    volumes = torch.randn(batch, 1, side, side, side, device=device)
    return volumes, torch.cat([volumes <= 0, volumes > 0], 1).float()


def draw_mixtures(batch: int, device: torch.device, samples: int = 32_000) -> tuple[Tensor, Tensor]:
    """Four seconds of two voices at 8 kHz: their sum (batch, samples), and (batch, 2, samples)."""
    voices = torch.randn(batch, 2, samples, device=device)
    return voices.sum(1), voices


def draw_pictures(batch: int, device: torch.device, size: int = 192) -> tuple[Tensor, Tensor]:
    """Pictures (batch, 3, size, size): of half that size, and themselves."""
    pictures = torch.rand(batch, 3, size, size, device=device)
    return downscale(pictures), pictures


IRESNET = Workload(
    "iresnet50",
    batch=128,
    dtype=torch.float16,
    build=lambda: nn.Sequential(IResNet(), CosineClassifier(512, IDENTITIES)),
    draw=draw_faces,
    loss=arcface_loss,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
)
UNET = Workload(
    "unet3d",
    batch=2,
    dtype=torch.float32,
    build=UNet,
    draw=draw_volumes,
    loss=dice_loss,
    optimizer=partial(torch.optim.Adam, lr=1e-3),
)
CONV_TASNET = Workload(
    "conv-tasnet",
    batch=8,
    dtype=torch.float32,
    build=ConvTasNet,
    draw=draw_mixtures,
    loss=si_snr_loss,
    optimizer=partial(torch.optim.Adam, lr=1e-3),
)
SRGAN = Workload(
    "srgan",
    batch=16,
    dtype=torch.float32,
    build=lambda: Generator(64),
    draw=draw_pictures,
    loss=F.l1_loss,
    optimizer=partial(torch.optim.Adam, lr=2e-3),
)
WORKLOADS = (IRESNET, UNET, replace(IRESNET, layout="channels_last"), CONV_TASNET, SRGAN)
"""The most telling first: a run may be cut off."""


def build(workload: Workload, device: torch.device) -> nn.Module:
    """The network as all its trainings start, always the same.

    Its slopes differ, so that one taken for another shows, and are bfloat16 numbers, which float16
    has too: autocast rounds nn.PReLU's slopes and not prelu_gpu's, and these stay the same.
    """
    torch.manual_seed(0)
    with device:
        model = workload.build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(0.05, 0.5).copy_(module.weight.bfloat16())
    return model.to(memory_format=LAYOUTS[workload.layout])


def draw(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch of all its trainings, always the same."""
    torch.manual_seed(1)
    examples, target = workload.draw(workload.batch, device)
    return examples.to(memory_format=LAYOUTS[workload.layout]), target


class Training:
    """A network in training on one batch; `scale` is the loss scale that it starts with."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        self._workload = workload
        self._model = model
        self._input, self._target = batch
        self._half = workload.dtype is not torch.float32
        self._optimizer = workload.optimizer(model.parameters())
        self._scaler = torch.amp.GradScaler(
            self._input.device.type, init_scale=scale, enabled=self._half
        )

    def backward(self) -> Tensor:
        """Forward, loss and backward; the parameters get their scaled gradients."""
        device_type = self._input.device.type
        with torch.autocast(device_type, self._workload.dtype, enabled=self._half):
            loss = self._workload.loss(self._model(self._input), self._target)
        self._scaler.scale(loss).backward()
        return loss.detach()

    def step(self) -> Tensor:
        """One step of training, which leaves no gradients; gives the loss before it."""
        loss = self.backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        return loss
