"""The gate of the training benchmark: prelu_gpu trains networks as torch.nn.PReLU does."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

import prelu_gpu
from benchmarks.workloads import Training, Workload, build, draw

FIRST_SCALE = 2.0**16
"""Where GradScaler starts."""

CHANCE = 3
"""How many times as far apart as two runs of one network a third run may be."""


@dataclass
class Gradients:
    """What a backward left: the loss, and every parameter's gradient, both as scaled."""

    loss: Tensor
    by_name: dict[str, Tensor]
    rounding: dict[str, Tensor] = field(default_factory=dict)
    """What rounding may change of the slopes' gradients, by name."""


class Verdict(NamedTuple):
    """What is wrong, in words, and the loss scale that kept everything finite."""

    mistakes: list[str]
    scale: float


def check(workload: Workload, device: torch.device) -> Verdict:
    """Compares one step of a network with prelu_gpu to the same with nn.PReLU.

    PReLU's output and input gradient are nn.PReLU's bit for bit, so with cuDNN's deterministic
    algorithms only the slopes' gradients should differ. Where something else is not deterministic,
    a second step with nn.PReLU shows by how much. Beside that, loss and gradients may be off by the
    epsilon of the dtype, gradients in norm: in half precision a small element of a gradient carries
    the rounding of large ones that cancel.
    """
    model = build(workload, device)
    batch = draw(workload, device)

    def reference(scale: float) -> Gradients:
        return differentiate(workload, copy.deepcopy(model), batch, scale)

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        expected, scale = find_scale(reference)
        if not is_finite(expected):
            return Verdict(["nn.PReLU's own loss or gradients are not finite"], scale)
        again = reference(scale)
        actual = differentiate(workload, prelu_gpu.accelerate(model), batch, scale)
    eps = torch.finfo(workload.dtype).eps
    return Verdict(list(compare(actual, expected, again, eps)), scale)


def find_scale(gradients: Callable[[float], Gradients]) -> tuple[Gradients, float]:
    """The gradients at the first loss scale that keeps them finite, as GradScaler finds it."""
    scale = FIRST_SCALE
    while not is_finite(result := gradients(scale)) and scale > 1:
        scale /= 2
    return result, scale


def is_finite(gradients: Gradients) -> bool:
    """Whether no number overflowed."""
    return all(
        bool(tensor.isfinite().all()) for tensor in (gradients.loss, *gradients.by_name.values())
    )


def differentiate(
    workload: Workload, model: nn.Module, batch: tuple[Tensor, Tensor], scale: float
) -> Gradients:
    """One backward of a network as it stands."""
    rounding = watch_slopes(model)
    loss = Training(workload, model, batch, scale).backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Gradients(loss, gradients, rounding)


def watch_slopes(model: nn.Module) -> dict[str, Tensor]:
    """Fills the dictionary with slope_rounding of every PReLU as the model's backward comes by."""
    rounding: dict[str, Tensor] = {}

    def watch(name: str, module: nn.PReLU) -> None:
        def forward(module: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
            x = inputs[0].detach().to(y.dtype)

            def backward(grad_y: Tensor) -> None:
                rounding[name] = slope_rounding(x, grad_y, module.weight)

            y.register_hook(backward)

        module.register_forward_hook(forward)

    for name, module in model.named_modules():
        if isinstance(module, nn.PReLU):
            watch(f"{name}.weight", module)
    return rounding


def slope_rounding(x: Tensor, grad_y: Tensor, slopes: Tensor) -> Tensor:
    """How far two computations of the slopes' gradient may be apart; shaped as the slopes.

    nn.PReLU rounds every product grad_y * x to their dtype, and the sum once more. The roundings of
    the products are independent, each of a standard deviation of 0.29 eps of the product: 2 eps of
    the root of the sum of squares is seven times that of the sum. Products that underflow lose at
    most the smallest subnormal number, all to the same side. Adding up in float32, in any order,
    costs about eps of the sum of magnitudes.
    """
    info = torch.finfo(x.dtype)
    products = torch.where(x > 0, 0.0, grad_y.float() * x.float())
    others = [d for d in range(x.dim()) if slopes.numel() == 1 or d != 1]
    adding = torch.finfo(torch.float32).eps * products.abs()
    return (
        2 * info.eps * products.square().sum(others).sqrt()
        + info.eps * products.sum(others).abs()
        + (adding + info.eps * info.smallest_normal).sum(others)
    ).view_as(slopes)


def compare(actual: Gradients, expected: Gradients, again: Gradients, eps: float) -> Iterator[str]:
    """The mistakes of `actual`; `expected` and `again` are two runs of what it should be."""

    def is_wrong(actual: Tensor, expected: Tensor, again: Tensor, rounding: Tensor) -> bool:
        limit = rounding.norm() + CHANCE * (again - expected).norm()
        return not bool((actual - expected).norm() <= limit)  # NaN is wrong

    if is_wrong(actual.loss, expected.loss, again.loss, eps * expected.loss):
        yield f"the loss is {actual.loss.item()}, with nn.PReLU {expected.loss.item()}"
    wrong = [
        name
        for name, gradient in expected.by_name.items()
        if name not in actual.by_name
        or is_wrong(
            actual.by_name[name],
            gradient,
            again.by_name[name],
            expected.rounding.get(name, eps * gradient),
        )
    ]
    if wrong:
        yield (
            f"{len(wrong)} of {len(expected.by_name)} parameters have wrong gradients, "
            f"{wrong[0]} is the first"
        )
