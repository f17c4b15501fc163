"""The gate of every training: prelu_gpu gives a network the gradients that nn.PReLU gives it.

PReLU's output and input gradient are nn.PReLU's bit for bit. Only slope gradients differ: nn.PReLU
rounds each of their products in half precision, so they are held to the reference instead.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import prelu_gpu
from prelu_gpu import reference

CHANCE = 3
"""How many times as far apart as two runs of one network a third run may be."""


class Difference(NamedTuple):
    """How far apart two losses or the gradients of a parameter are, in norm."""

    name: str
    distance: float
    explained: float
    """What rounding explains of it."""

    @property
    def share(self) -> float:
        """The distance as a multiple of what is explained; NaN where a result is NaN."""
        return self.distance / max(self.explained, 1e-30)

    @property
    def is_wrong(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.share <= 1

    def __str__(self) -> str:
        return f"{self.name}: {self.distance:.1e} apart, rounding explains {self.explained:.1e}"


def compare(
    model: nn.Module, backward: Callable[[nn.Module], Tensor], dtype: torch.dtype
) -> list[Difference]:
    """Compares one backward of a network with prelu_gpu to the same with nn.PReLU.

    A slope gradient is compared with the exact one of what its module saw in that backward.

    Args:
        model: the network with nn.PReLU; it stays as it is.
        backward: takes a copy through forward, loss and backward, and gives the loss.
        dtype: what the network computes in. Loss and gradients other than the slopes' may be off
            by its epsilon, in norm: a small element of a gradient in half precision carries the
            rounding of large ones that cancel.
    """
    eps = torch.finfo(dtype).eps
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        expected = differentiate(copy.deepcopy(model), backward)
        # Shows by how much what is not deterministic all the same differs.
        again = differentiate(copy.deepcopy(model), backward)
        ours = prelu_gpu.accelerate(copy.deepcopy(model))
        slopes = watch_slopes(ours)
        actual = differentiate(ours, backward)
    differences = []
    for name, value in expected.items():
        if name in slopes:
            value, error = slopes[name]
            explained = error.norm().item()
        else:
            explained = eps * value.norm().item() + CHANCE * (again[name] - value).norm().item()
        distance = (actual[name] - value).norm().item()
        differences.append(Difference(name, distance, explained))
    return differences


def differentiate(model: nn.Module, backward: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The loss and all gradients, by name."""
    found = {"loss": backward(model).detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = torch.zeros_like(parameter) if gradient is None else gradient
    return found


def watch_slopes(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Fills the dictionary in the model's backward: by name, slope gradients and their rounding.

    The gradients are exact in float64, of what each PReLU saw.
    """
    slopes: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, prelu: nn.PReLU, inputs: tuple[Tensor], y: Tensor) -> None:
        x, weight = inputs[0].detach().to(y.dtype), prelu.weight.detach()

        def add(grad_y: Tensor) -> None:
            _, exact = reference.prelu_backward(grad_y.double(), x.double(), weight.double())
            error = reference.rounding(grad_y, x, weight)
            before = slopes.get(f"{name}.weight", (0, 0))
            slopes[f"{name}.weight"] = exact + before[0], error + before[1]

        y.register_hook(add)

    for name, module in model.named_modules():
        if isinstance(module, nn.PReLU) and module.weight.requires_grad:
            module.register_forward_hook(partial(watch, name))
    return slopes
