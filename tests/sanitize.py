"""Every kind of kernel on small tensors: what compute-sanitizer watches.

Tensors are as large as their memory where PYTORCH_NO_CUDA_MEMORY_CACHING=1 is set: an access beside
one is seen. The results are checked too.
"""

import dataclasses
import itertools
from unittest import mock

import torch

from prelu_gpu import eager, functional, launch, prelu
from prelu_gpu.plan import Kind, gpu_rules

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
    shape, slopes, kind = CASES[case]

    def rules(device, itemsize, backward):
        # Small tensors are already walked and split by the programs of one multiprocessor.
        return dataclasses.replace(
            gpu_rules(1, itemsize, backward), kind=kind, **REDUCTIONS[reduction]
        )

    # Whole numbers: exact in either dtype, and in any order of summation.
    x, grad_y = (torch.randint(-2, 3, shape, device=device).to(dtype) for _ in range(2))
    if slopes > 1:
        x, grad_y = x[:, :slopes], grad_y[:, :slopes]
    x = x.requires_grad_()
    weight = torch.ones(slopes, dtype=torch.float32, device=device).div_(4).requires_grad_()
    channel_dim = None if slopes == 1 else 1
    with mock.patch.object(launch, "rules", rules):
        y = prelu(x, weight)
        results = y, *torch.autograd.grad(y, (x, weight), grad_y)
    exact = eager.prelu(x.double(), weight.double(), channel_dim)
    expected = exact, *torch.autograd.grad(exact, (x, weight), grad_y.double())
    for actual, correct in zip(results, expected, strict=True):
        assert torch.equal(actual.double(), correct.double()), f"{case}, {dtype}, {reduction}"


def main() -> None:
    """Runs all of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choices = list(itertools.product(CASES, DTYPES, REDUCTIONS))
    with mock.patch.object(functional, "EAGER_BELOW", 0):
        for choice in choices:
            check(*choice, device)
    print(f"{len(choices)} forwards and backwards are right on {device}")


if __name__ == "__main__":
    main()
