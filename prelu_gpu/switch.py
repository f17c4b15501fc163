"""The switch for models that exist: torch.nn's modules to ours and back, in place."""

import logging
from typing import TypeVar

from torch import nn

from .modules import LeakyReLU, PReLU

logger = logging.getLogger("prelu_gpu")

Model = TypeVar("Model", bound=nn.Module)

_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {PReLU: nn.PReLU, LeakyReLU: nn.LeakyReLU}


def accelerate(model: Model) -> Model:
    """Makes every :class:`torch.nn.PReLU` in `model` run on the fused kernels, in place.

    A module changes its class and nothing else: its Parameters, hooks, name and every reference to
    it stay, `model` itself included if it is one. Left as they are: subclasses of torch.nn.PReLU,
    whose forward may differ (a warning of the logger "prelu_gpu" names them), and
    torch.nn.LeakyReLU, which PyTorch already runs in vectorised kernels. The logger tells at level
    INFO what was swapped. :func:`restore` undoes it.

    Args:
        model: any module; one without PReLU is only warned of.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
    """
    _check("accelerate", model)
    swapped, left = [], []
    for name, module in model.named_modules():
        if type(module) is nn.PReLU:
            module.__class__ = PReLU
            swapped.append(name)
        elif isinstance(module, nn.PReLU) and not isinstance(module, PReLU):
            left.append(f"{name or 'the model itself'} ({type(module).__name__})")
    logger.info("accelerate: %d of torch.nn.PReLU swapped: %s", len(swapped), ", ".join(swapped))
    if left:
        logger.warning(
            "accelerate: left as they are, being subclasses of torch.nn.PReLU whose forward may "
            "differ: %s",
            ", ".join(left),
        )
    if not swapped and not left and not any(isinstance(m, PReLU) for m in model.modules()):
        logger.warning("accelerate: no torch.nn.PReLU in %s", type(model).__name__)
    return model


def restore(model: Model) -> Model:
    """Turns every prelu_gpu module in `model` into torch.nn's, in place; undoes `accelerate`.

    A :class:`prelu_gpu.PReLU` with `dim` other than 1 stays, because torch.nn.PReLU has no such
    option; a warning of the logger "prelu_gpu" names it.

    Args:
        model: any module.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
    """
    _check("restore", model)
    left = []
    for name, module in model.named_modules():
        original = _ORIGINALS.get(type(module))
        if original is None:
            continue
        if getattr(module, "dim", 1) == 1:
            module.__class__ = original
        else:
            left.append(f"{name or 'the model itself'} (dim={module.dim})")
    if left:
        logger.warning(
            "restore: left as they are, torch.nn.PReLU having only dim=1: %s", ", ".join(left)
        )
    return model


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}(): argument 'model' must be a torch.nn.Module, not "
            f"{type(model).__name__}. Pass the model, not its parameters or state_dict."
        )
