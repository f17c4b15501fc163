"""The networks whose training is timed, what they are trained on, and one step of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import LAYOUTS
from benchmarks.networks import ConvTasNet, iresnet, unet
from benchmarks.srgan import Generator, downscale


@dataclass(frozen=True)
class Workload:
    """A network and how it is trained."""

    network: str
    batch: int
    """Examples in a step."""
    dtype: torch.dtype
    """bfloat16 for float32 weights under autocast."""
    build: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    """Makes so many random examples and targets."""
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    layout: str = "contiguous"

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.network}, {self.layout}"

    def start(self, device: torch.device) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The network and the batch that all its trainings start with.

        Its slopes differ, so that one taken for another shows, and are bfloat16 numbers: autocast
        rounds nn.PReLU's slopes and not prelu_gpu's.
        """
        torch.manual_seed(0)
        with device:
            model, (examples, target) = self.build(), self.draw(self.batch)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.PReLU):
                    module.weight.uniform_(0.05, 0.5).copy_(module.weight.bfloat16())
        layout = LAYOUTS[self.layout]
        return model.to(memory_format=layout), (examples.to(memory_format=layout), target)


def draw_volumes(batch: int, side: int = 192) -> tuple[Tensor, Tensor]:
    """Volumes, and masks of their dark and of their bright voxels."""
    volumes = torch.randn(batch, 1, side, side, side)
    return volumes, torch.cat([volumes <= 0, volumes > 0], 1).float()


def draw_voices(batch: int, samples: int = 32_000) -> tuple[Tensor, Tensor]:
    """Two voices, for four seconds at 8 kHz: their sum, and themselves."""
    voices = torch.randn(batch, 2, samples)
    return voices.sum(1), voices


def draw_pictures(batch: int, side: int = 192) -> tuple[Tensor, Tensor]:
    """Pictures of half the size, and of the whole."""
    pictures = torch.rand(batch, 3, side, side)
    return downscale(pictures), pictures


IRESNET = Workload(
    "iresnet50",
    batch=128,
    dtype=torch.bfloat16,
    build=iresnet,
    draw=lambda batch: (torch.randn(batch, 3, 112, 112), torch.randint(10_000, (batch,))),
    loss=F.cross_entropy,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
)
UNET = Workload(
    "unet3d",
    batch=2,
    dtype=torch.float32,
    build=unet,
    draw=draw_volumes,
    loss=F.binary_cross_entropy_with_logits,
    optimizer=partial(torch.optim.Adam, lr=1e-3),
)
CONV_TASNET = replace(
    UNET, network="conv-tasnet", batch=8, build=ConvTasNet, draw=draw_voices, loss=F.l1_loss
)
SRGAN = replace(
    CONV_TASNET, network="srgan", batch=16, build=partial(Generator, 64), draw=draw_pictures
)
WORKLOADS = (IRESNET, UNET, replace(IRESNET, layout="channels_last"), CONV_TASNET, SRGAN)
"""The most telling first: a run may be cut off."""


class Training:
    """A network in training on one batch."""

    def __init__(self, workload: Workload, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        self._model, self._loss = model, workload.loss
        self._input, self._target = batch
        self._optimizer = workload.optimizer(model.parameters())
        self._autocast = torch.autocast(
            self._input.device.type, workload.dtype, enabled=workload.dtype is not torch.float32
        )

    def backward(self) -> Tensor:
        """Forward, loss and backward; gives the loss, and the parameters their gradients."""
        with self._autocast:
            loss = self._loss(self._model(self._input), self._target)
        loss.backward()
        return loss

    def step(self) -> None:
        """One step of training, which leaves no gradients."""
        self.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
