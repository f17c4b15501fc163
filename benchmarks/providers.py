"""Who computes the operations, and how one of them is called."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prelu_gpu
from benchmarks.cases import NEGATIVE_SLOPE, PASSES, Case, Inputs, prelu_along
from benchmarks.program import first_line
from benchmarks.timing import Call

Provider = Callable[[Case, str, list[Inputs]], Call]
"""Prepares an operation of a case for some input sets."""


class ProviderError(Exception):
    """A provider that is only compared with cannot do an operation; says why."""


def provide_prelu_gpu(case: Case, op: str, sets: list[Inputs]) -> Call:
    """This package."""
    if case.slope == "number":
        module = prelu_gpu.LeakyReLU(NEGATIVE_SLOPE, case.inplace)
        return _call(case, op, sets, _with_number(prelu_gpu.leaky_relu), module)
    prelu = prelu_gpu.prelu if case.dim == 1 else partial(prelu_gpu.prelu, dim=case.dim)
    module = _with_slopes(prelu_gpu.PReLU(case.slopes, dim=case.dim), sets)
    return _call(case, op, sets, prelu, module)


def provide_eager(case: Case, op: str, sets: list[Inputs]) -> Call:
    """PyTorch's operator and module."""
    return _call(case, op, sets, *_torch_prelu(case, sets))


def provide_compile(case: Case, op: str, sets: list[Inputs]) -> Call:
    """PyTorch's operator and module, compiled for these very shapes."""
    prelu, module = _torch_prelu(case, sets)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return prelu(x, weight)

    compiled = [torch.compile(what, dynamic=False) for what in (function, module)]
    return _tried(lambda: _call(case, op, sets, *compiled))


def provide_copy(case: Case, op: str, sets: list[Inputs]) -> Call:
    """The roof: a copy of dense memory that moves the bytes of `op`, half read, half written."""
    pairs = []
    for x, _, _ in sets:
        elements = PASSES[op] * x.numel() // 2
        source = x.detach().reshape(-1).repeat(-(-PASSES[op] // 2))[:elements]
        pairs.append((torch.empty_like(source), source))

    def call(number: int) -> Tensor:
        target, source = pairs[number]
        return target.copy_(source)

    return call


def provide_jax(case: Case, op: str, sets: list[Inputs]) -> Call:
    """XLA, on the same memory."""
    import jax
    from jax import numpy as jnp

    def prelu(x: Any, weight: Any) -> Any:
        return jnp.where(x > 0, x, (weight.reshape(case.slope_shape) * x).astype(x.dtype))

    def backward(x: Any, weight: Any, grad_y: Any) -> Any:
        return jax.vjp(prelu, x, weight)[1](grad_y)

    def step(x: Any, weight: Any, grad_y: Any) -> Any:
        y, gradients = jax.vjp(prelu, x, weight)
        return y, gradients(grad_y)

    function = jax.jit({"backward": backward, "step": step}.get(op, prelu))
    tensors = [inputs if PASSES[op] > 2 else inputs[:2] for inputs in sets]

    def prepare() -> Call:
        arguments = [[jnp.from_dlpack(one.detach()) for one in some] for some in tensors]
        return lambda number: function(*arguments[number])

    return _tried(prepare)


PROVIDERS: dict[str, Provider] = {
    "prelu_gpu": provide_prelu_gpu,
    "eager": provide_eager,
    "compile": provide_compile,
    "copy": provide_copy,
    "jax": provide_jax,
}


COMPILERS = ("compile", "jax")
"""Providers whose code is compiled for each case and operation."""


def serves(provider: str, case: Case) -> bool:
    """Whether a provider knows the case: of JAX, contiguous PReLU alone."""
    return provider != "jax" or (case.layout == "contiguous" and case.slope != "number")


def jax_obstacle(device: torch.device) -> str | None:
    """Why JAX cannot be timed on `device`."""
    # It would take most of the memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax

        found = jax.default_backend()
    except (ImportError, RuntimeError) as error:
        return first_line(error)
    wanted = {"cuda": "gpu"}.get(device.type, device.type)
    return None if found == wanted else f"it runs on {found} here, not on {wanted}"


def wait_for_jax(result: object) -> None:
    """Until the result is there: JAX has streams of its own, which PyTorch's events do not see."""
    import jax

    jax.block_until_ready(result)


WAITS = {"jax": wait_for_jax}
"""Providers whose device time cannot be told from their whole time, and how to wait for them."""


def _call(
    case: Case,
    op: str,
    sets: list[Inputs],
    prelu: Callable[[Tensor, Tensor], Tensor],
    module: Callable[[Tensor], Tensor],
) -> Call:
    """A call of a function in PyTorch or, for inference, of a module."""

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

    leaves = [case.differentiated(inputs) for inputs in sets]
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
    """PyTorch's operator refuses mixed dtypes: the slope is cast, as autocast does."""
    return prelu_along(dim, x, weight.to(x.dtype))


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


def _tried(prepare: Callable[[], Call]) -> Call:
    """A call that is compiled by its first run."""
    try:
        call = prepare()
        call(0)
    except Exception as error:  # whatever a compiler raises
        raise ProviderError(first_line(error)) from error
    return call
