"""Every kind of kernel on small tensors: what compute-sanitizer watches.

Tensors are as large as their memory where PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set: an access beside
one is seen. The results are checked too.
"""

import dataclasses
import itertools
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prelu_gpu import eager, functional, launch, leaky_relu, prelu
from prelu_gpu.plan import Kind, Rules, gpu_rules

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
REDUCTIONS = {"last program": {}, "second launch": {"finish": 0}, "atomic": {"atomic": True}}


def check(case: str, dtype: torch.dtype, reduction: str, device: torch.device) -> None:
    """Runs a forward and a backward, and compares them with PyTorch's operators in float64."""
    slopes = CASES[case][1]
    x, grad_y = tensors(case, dtype, device)
    weight = torch.ones(slopes, dtype=torch.float32, device=device).div_(4).requires_grad_()
    with tiles(case, **REDUCTIONS[reduction]):
        y = prelu(x, weight)
        results = y, *torch.autograd.grad(y, (x, weight), grad_y)
    exact = eager.prelu(x.double(), weight.double(), None if slopes == 1 else 1)
    compare(results, exact, (x, weight), grad_y, f"{case}, {dtype}, {reduction}")


def check_leaky_relu(case: str, dtype: torch.dtype, inplace: bool, device: torch.device) -> None:
    """The same of Leaky ReLU; in place, of a dense copy of x."""
    x, grad_y = tensors(case, dtype, device)
    with tiles(case):
        y = leaky_relu(x * 1 if inplace else x, 0.25, inplace)
        results = y, *torch.autograd.grad(y, (x,), grad_y)
    exact = eager.leaky_relu(x.double(), 0.25, False)
    compare(results, exact, (x,), grad_y, f"{case}, {dtype}, Leaky ReLU, in place: {inplace}")


def tensors(case: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The input and the output gradient of a case.

    Whole numbers: with slopes of 1/4, exact in either dtype, and in any order of summation.
    """
    shape, slopes, _ = CASES[case]
    x, grad_y = (torch.randint(-2, 3, shape, device=device).to(dtype) for _ in range(2))
    if slopes > 1:
        x, grad_y = x[:, :slopes], grad_y[:, :slopes]
    return [x.requires_grad_(), grad_y]


def tiles(case: str, **changes: Any) -> AbstractContextManager[object]:
    """Launches with the case's kind of tile, of one multiprocessor.

    Its programs walk and split tensors that are small.
    """

    def rules(device: torch.device, itemsize: int, backward: bool) -> Rules:
        return dataclasses.replace(gpu_rules(1, itemsize, backward), kind=CASES[case][2], **changes)

    return mock.patch.object(launch, "rules", rules)


def compare(
    results: tuple[Tensor, ...],
    exact: Tensor,
    leaves: tuple[Tensor, ...],
    grad_y: Tensor,
    what: str,
) -> None:
    """Compares an output and its gradients with those of `exact`, bit for bit."""
    expected = exact, *torch.autograd.grad(exact, leaves, grad_y.double())
    for actual, correct in zip(results, expected, strict=True):
        assert torch.equal(actual.double(), correct.double()), what


def main() -> None:
    """Runs all of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = list(itertools.product(CASES, DTYPES, REDUCTIONS))
    leaky_choices = list(itertools.product(CASES, DTYPES, (False, True)))
    with mock.patch.object(functional, "EAGER_BELOW", 0):
        for choice in choices:
            check(*choice, device)
        for choice in leaky_choices:
            check_leaky_relu(*choice, device)
    count = len(choices) + len(leaky_choices)
    print(f"{count} forwards and backwards are right on {device}")


if __name__ == "__main__":
    main()
