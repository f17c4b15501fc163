"""Every kind of kernel on small tensors: what compute-sanitizer watches.

Tensors are as large as their memory where PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set, so that an
access beside one is seen. The results are checked too.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prelu_gpu import (
    batch_norm_prelu,
    instance_norm_prelu,
    kernel_threshold,
    leaky_relu,
    prelu,
    reference,
)
from prelu_gpu.rules import Kind, Rules, gpu_rules, using_rules

CASES = {
    "flat": ((4099,), 1, Kind.FLAT),
    "plane": ((3, 2, 4104), 2, Kind.PLANE),
    "odd plane": ((3, 2, 2051), 2, Kind.ODD_PLANE),
    "column": ((19, 6, 7, 7), 6, Kind.COLUMN),
    "folded column": ((301, 90), 90, Kind.COLUMN),
    "sliced plane": ((3, 4, 4104), 2, Kind.PLANE),
    "sliced column": ((301, 64), 32, Kind.COLUMN),
}
"""Shape, slopes and the kind of tile; fewer slopes than channels: the input is a slice."""
DTYPES = torch.float32, torch.bfloat16
REDUCTIONS: dict[str, dict[str, Any]] = {
    "last program": {},
    "second launch": {"finish": 0},
    "atomic": {"atomic": True},
}
NORMS = (
    *(("plane", torch.float32, "batch"), ("sliced plane", torch.bfloat16, "instance")),
    *(("odd plane", torch.bfloat16, "batch"), ("odd plane", torch.float32, "evaluation")),
    *(("folded column", torch.bfloat16, "batch"), ("sliced column", torch.float32, "evaluation")),
    *(("column", torch.float32, "batch"), ("column", torch.bfloat16, "instance")),
)
SLOPE = 0.25


def check(case: str, dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    """Runs a forward and a backward of PReLU, and compares them with the reference."""
    x, grad_y = tensors(case, dtype, device)
    weight = torch.full((CASES[case][1],), SLOPE, device=device, requires_grad=True)
    with using_rules(rules(case, **REDUCTIONS[reduction])):
        y = prelu(x, weight)
        results = y, *torch.autograd.grad(y, (x, weight), grad_y)
    compare(results, x, weight, grad_y, f"{case}, {dtype}, {reduction}")


def check_leaky_relu(case: str, dtype: torch.dtype, inplace: bool, device: torch.device) -> None:
    """The same of Leaky ReLU; in place, of a dense copy of x."""
    x, grad_y = tensors(case, dtype, device)
    with using_rules(rules(case)):
        y = leaky_relu(x * 1 if inplace else x, SLOPE, inplace)
        results = y, *torch.autograd.grad(y, (x,), grad_y)
    weight = torch.full((1,), SLOPE, device=device)
    compare(results, x, weight, grad_y, f"{case}, {dtype}, Leaky ReLU, in place: {inplace}")


def check_norm(case: str, dtype: torch.dtype, norm: str, device: torch.device) -> None:
    """The same of a norm with PReLU, compared with PyTorch's operators in float64."""
    x, grad_y = tensors(case, dtype, device)
    channels = x.shape[1]
    weight, bias = (torch.randn(channels, device=device, requires_grad=True) for _ in range(2))
    # Without a kink rounding decides nothing.
    slope = torch.ones(1, device=device, requires_grad=True)
    running = torch.randn(channels, device=device), torch.rand(channels, device=device) + 0.5

    def results(fused: bool) -> tuple[Tensor, ...]:
        kind = torch.float32 if fused else torch.float64
        parameters = [t.to(kind) for t in (weight, bias)]
        inputs = x if fused else x.double()
        statistics = [t.to(kind, copy=True) for t in running]
        training = norm != "evaluation"
        if norm == "instance":
            if fused:
                y = instance_norm_prelu(inputs, slope, *parameters)
            else:
                y = F.instance_norm(inputs, None, None, *parameters)
            statistics = []
        elif fused:
            y = batch_norm_prelu(inputs, slope, *statistics, *parameters, training)
        else:
            y = F.batch_norm(inputs, *statistics, *parameters, training)
        grads = torch.autograd.grad(y, (x, weight, bias), grad_y.to(y.dtype))
        return y.detach(), *grads, *statistics

    with using_rules(rules(case)):
        found = results(True)
    for actual, correct in zip(found, results(False), strict=True):
        rounding = 4 * torch.finfo(actual.dtype).eps * correct.abs()
        error = (actual.double() - correct).abs()
        assert (error <= rounding + 1e-5 * correct.abs().max()).all(), f"{case}, {dtype}, {norm}"


def tensors(case: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The input and the output gradient of a case.

    Whole numbers: with slopes of 1/4, exact in either dtype, and in any order of summation.
    """
    shape, slopes, _ = CASES[case]
    x, grad_y = (torch.randint(-2, 3, shape, device=device).to(dtype) for _ in range(2))
    if slopes > 1:
        x, grad_y = x[:, :slopes], grad_y[:, :slopes]
    return x.requires_grad_(), grad_y


def rules(case: str, **changes: Any) -> Any:
    """The rule table of one multiprocessor, whose programs walk and split small tensors."""

    def table(device: torch.device, itemsize: int, backward: bool) -> Rules:
        return gpu_rules(1, itemsize, backward)._replace(kind=CASES[case][2], **changes)

    return table


def compare(
    results: tuple[Tensor, ...], x: Tensor, weight: Tensor, grad_y: Tensor, what: str
) -> None:
    """Compares an output and its gradients with the reference in float64, bit for bit."""
    grad_y, x, weight = (t.detach().double() for t in (grad_y, x, weight))
    exact = reference.prelu(x, weight), *reference.prelu_backward(grad_y, x, weight)
    for actual, correct in zip(results, exact, strict=False):
        assert torch.equal(actual.double(), correct), what


def main() -> None:
    """Runs all of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = list(itertools.product(CASES, DTYPES, REDUCTIONS))
    leaky_choices = list(itertools.product(CASES, DTYPES, (False, True)))
    with kernel_threshold(0):
        for norm_choice in NORMS:
            check_norm(*norm_choice, device)
        for choice in choices:
            check(*choice, device)
        for leaky_choice in leaky_choices:
            check_leaky_relu(*leaky_choice, device)
    count = len(choices) + len(leaky_choices) + len(NORMS)
    print(f"{count} forwards and backwards are right on {device}")


if __name__ == "__main__":
    main()
