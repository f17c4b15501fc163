"""The gate of every training: prelu_gpu gives a network the gradients that nn.PReLU gives it.

PReLU's output and input gradient are nn.PReLU's bit for bit, so only the slopes' gradients should
differ, by what rounding explains. In half precision nn.PReLU rounds each product first.
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

    Args:
        model: the network with nn.PReLU; it stays as it is.
        backward: takes a copy through forward, loss and backward, and gives the loss.
        dtype: what the network computes in. Loss and gradients other than the slopes' may be off
            by its epsilon, in norm: a small element of a gradient in half precision carries the
            rounding of large ones that cancel.
    """
    eps = torch.finfo(dtype).eps
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        expected, errors = differentiate(copy.deepcopy(model), backward)
        # Shows by how much what is not deterministic all the same differs.
        again, _ = differentiate(copy.deepcopy(model), backward)
        actual, more = differentiate(prelu_gpu.accelerate(copy.deepcopy(model)), backward)
    differences = []
    for name, value in expected.items():
        rounding = errors[name] + more[name] if name in errors else eps * value.norm().item()
        chance = CHANCE * (again[name] - value).norm().item()
        distance = (actual[name] - value).norm().item()
        differences.append(Difference(name, distance, rounding + chance))
    return differences


def differentiate(
    model: nn.Module, backward: Callable[[nn.Module], Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The loss and all gradients, and how far rounding may take the slopes', in norm; by name."""
    errors: dict[str, float] = {}

    def watch(name: str, prelu: nn.PReLU, inputs: tuple[Tensor], y: Tensor) -> None:
        x, weight, products_in = inputs[0].detach().to(y.dtype), prelu.weight.detach(), None
        if not isinstance(prelu, prelu_gpu.PReLU):
            weight, products_in = weight.to(y.dtype), y.dtype

        def add(grad_y: Tensor) -> None:
            error = reference.rounding(grad_y, x, weight, products_in=products_in)
            errors[f"{name}.weight"] = error.norm().item()

        y.register_hook(add)

    for name, module in model.named_modules():
        if isinstance(module, nn.PReLU):
            module.register_forward_hook(partial(watch, name))
    found = {"loss": backward(model).detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = torch.zeros_like(parameter) if gradient is None else gradient
    return found, errors
