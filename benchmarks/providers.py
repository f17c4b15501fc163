"""Who computes the operations, and how one of them is called."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prelu_gpu
from benchmarks.cases import NEGATIVE_SLOPE, Case, Inputs, NormTensors
from benchmarks.timing import Call

OURS = "prelu_gpu"
UNFUSED = "unfused"
"""Of norms alone."""


def provide_prelu_gpu(case: Case, op: str, sets: list[Inputs]) -> Call:
    """This package."""
    if case.norm:
        return _norm_call(case, op, sets, case.norm_prelu)
    if case.slope == "number":
        module = prelu_gpu.LeakyReLU(NEGATIVE_SLOPE, case.inplace)
        return _call(case, op, sets, _with_number(prelu_gpu.leaky_relu), module)
    prelu = prelu_gpu.prelu if case.dim == 1 else partial(prelu_gpu.prelu, dim=case.dim)
    module = _with_slopes(prelu_gpu.PReLU(case.slopes, dim=case.dim), sets)
    return _call(case, op, sets, prelu, module)


def provide_eager(case: Case, op: str, sets: list[Inputs]) -> Call:
    """PyTorch's operator and module."""
    prelu, module = _torch_prelu(case, sets)
    if case.norm:
        return _norm_call(case, op, sets, _behind_norm(case, prelu))
    return _call(case, op, sets, prelu, module)


def provide_compile(case: Case, op: str, sets: list[Inputs]) -> Call:
    """PyTorch's operator and module, compiled for these very shapes."""
    torch.compiler.reset()  # or it would give up after some shapes
    prelu, module = _torch_prelu(case, sets)
    if case.norm:
        norm_prelu = torch.compile(_behind_norm(case, prelu), dynamic=False)
        return _norm_call(case, op, sets, norm_prelu)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return prelu(x, weight)

    return _call(case, op, sets, *(torch.compile(f, dynamic=False) for f in (function, module)))


def provide_unfused(case: Case, op: str, sets: list[Inputs]) -> Call:
    """PyTorch's norm, and this package's PReLU."""
    return _norm_call(case, op, sets, _behind_norm(case, prelu_gpu.prelu))


def provide_copy(case: Case, op: str, sets: list[Inputs]) -> Call:
    """The roof: a copy of dense memory that moves the bytes of `op`, half read, half written."""
    pairs = []
    for x, _, _ in sets:
        elements = case.passes[op] * x.numel() // 2
        source = x.detach().reshape(-1).repeat(-(-case.passes[op] // 2))[:elements]
        pairs.append((torch.empty_like(source), source))

    def call(number: int) -> Tensor:
        target, source = pairs[number]
        return target.copy_(source)

    return call


PROVIDERS: dict[str, Callable[[Case, str, list[Inputs]], Call]] = {
    OURS: provide_prelu_gpu,
    "eager": provide_eager,
    "compile": provide_compile,
    UNFUSED: provide_unfused,
    "copy": provide_copy,
}
"""What prepares an operation of a case for some input sets."""

NormPReLU = Callable[[Tensor, Tensor, NormTensors, bool], Tensor]
"""Of x, slopes, a norm, and whether it is in training."""


def _norm_call(case: Case, op: str, sets: list[Inputs], norm_prelu: NormPReLU) -> Call:
    """A call of a norm, in evaluation for inference, and PReLU."""
    norm, training = case.norm_tensors(sets[0].x.device), op != "inference"

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return norm_prelu(x, weight, norm, training)

    def module(x: Tensor) -> Tensor:
        return function(x, sets[0].weight)

    return _call(case, op, sets, function, module, norm.parameters)


def _behind_norm(case: Case, prelu: Callable[[Tensor, Tensor], Tensor]) -> NormPReLU:
    """PyTorch's norm, then a PReLU."""
    return lambda x, weight, norm, training: prelu(case.normalize(x, norm, training), weight)


def _call(
    case: Case,
    op: str,
    sets: list[Inputs],
    prelu: Callable[[Tensor, Tensor], Tensor],
    module: Callable[[Tensor], Tensor],
    parameters: tuple[Tensor, ...] = (),
) -> Call:
    """A call of a function or, for inference, of a module; with the parameters of all sets."""

    def forward(number: int) -> Tensor:
        return prelu(sets[number].x, sets[number].weight)

    def inference(number: int) -> Tensor:
        return module(sets[number].x)

    def backward(number: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs[number], leaves[number], sets[number].grad_y, retain_graph=True
        )

    def step(number: int) -> tuple[Tensor, ...]:
        x, weight, grad_y = sets[number]
        y = prelu(x, weight)
        return y, *torch.autograd.grad(y, leaves[number], grad_y)

    leaves = [(*case.differentiated(inputs), *parameters) for inputs in sets]
    # The graphs are kept, so that a timed backward holds nothing of the forward.
    outputs = [forward(number) for number in range(len(sets))] if op == "backward" else []
    return {"forward": forward, "backward": backward, "inference": inference, "step": step}[op]


class _AdaptedPReLU(nn.PReLU):
    """torch.nn.PReLU as networks must use it where dtypes are mixed, or channels not second."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.slopes)
        self.dim = case.dim

    def forward(self, input: Tensor) -> Tensor:
        return _adapted_prelu(self.dim, input, self.weight)


def _adapted_prelu(dim: int, x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's operator with the slope cast, as autocast does, and along any dimension."""
    weight = weight.to(x.dtype)
    if weight.numel() == 1 or dim == 1:
        return F.prelu(x, weight)
    return F.prelu(x.movedim(dim, 1), weight).movedim(1, dim)


def _with_number(leaky_relu: Callable[[Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """Leaky ReLU, called as PReLU is."""
    return lambda x, weight: leaky_relu(x, NEGATIVE_SLOPE)


def _torch_prelu(
    case: Case, sets: list[Inputs]
) -> tuple[Callable[[Tensor, Tensor], Tensor], nn.Module]:
    """PyTorch's own function and module, with nothing around them where none is needed."""
    if case.slope == "number":
        return _with_number(F.leaky_relu), nn.LeakyReLU(NEGATIVE_SLOPE, case.inplace)
    if case.dtype == case.weight_dtype and (case.dim == 1 or case.slope == "shared"):
        return F.prelu, _with_slopes(nn.PReLU(case.slopes), sets)
    return partial(_adapted_prelu, case.dim), _with_slopes(_AdaptedPReLU(case), sets)


def _with_slopes(module: nn.PReLU, sets: list[Inputs]) -> nn.PReLU:
    """A module has one set of slopes: the first."""
    module.weight = nn.Parameter(sets[0].weight.detach())
    return module
