"""The switch for existing models: torch.nn's modules become ours, and back, in place."""

import logging
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from .backend import has_kernels, reason, warn_once
from .modules import LeakyReLU, PReLU, SharedAxesPReLU

logger = logging.getLogger("prelu_gpu")

Model = TypeVar("Model", bound=nn.Module)

_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {PReLU: nn.PReLU, LeakyReLU: nn.LeakyReLU}


def accelerate(model: Model) -> Model:
    """Makes every :class:`torch.nn.PReLU` in `model` run on the fused kernels, in place.

    Only the class of a module changes: its Parameters, hooks, parametrisations, name and every
    reference to it stay, also if `model` is itself a PReLU. :func:`restore` undoes it.

    Left unchanged, with a warning of the logger "prelu_gpu" that names them: subclasses of
    torch.nn.PReLU, whose forward may differ, and modules with an attribute `forward` or `dim` of
    their own. torch.nn.LeakyReLU is left too, since PyTorch already runs it in vectorised kernels.

    The logger lists at level INFO what was swapped. It warns once if PyTorch's operators will serve
    because the device has no kernels: the model's device or, for a model on the CPU, this machine's
    accelerator.

    Args:
        model: any module; one without PReLU gets a warning.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
    """
    _check("accelerate", model)
    swapped, left, done = [], [], False
    devices: set[torch.device] = set()
    for name, module in _named_modules(model):
        if isinstance(module, PReLU):
            done = True
        elif isinstance(module, nn.PReLU):
            reason = _own(module, nn.PReLU)
            if reason is None:
                _change_class(module, PReLU)
                swapped.append(name)
                devices.update(parameter.device for parameter in module.parameters())
            else:
                left.append(f"{name} ({reason})")
    if swapped:
        logger.info("accelerate: %d torch.nn.PReLU swapped: %s", len(swapped), ", ".join(swapped))
        _warn_without_kernels(devices)
    if left:
        hint = "prelu_gpu.enable() serves those that call torch.prelu"
        logger.warning("accelerate: left as they are: %s; %s", ", ".join(left), hint)
    if not (swapped or left or done):
        logger.warning("accelerate: no torch.nn.PReLU in %s", type(model).__name__)
    return model


def restore(model: Model) -> Model:
    """Turns every prelu_gpu module in `model` into torch.nn's, in place; undoes `accelerate`.

    Left unchanged, with a warning of the logger "prelu_gpu" that names them: a
    :class:`prelu_gpu.PReLU` with a `dim` of its own, which torch.nn.PReLU does not have,
    subclasses, modules with an attribute `forward` of their own, and
    :class:`prelu_gpu.SharedAxesPReLU`.

    Args:
        model: any module.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
    """
    _check("restore", model)
    left = []
    for name, module in _named_modules(model):
        for ours, original in _ORIGINALS.items():
            if isinstance(module, ours):
                reason = _own(module, ours)
                if reason is None:
                    _change_class(module, original)
                else:
                    left.append(f"{name} ({reason})")
        if isinstance(module, SharedAxesPReLU):
            left.append(f"{name} (SharedAxesPReLU)")
    if left:
        logger.warning("restore: left as they are: %s", ", ".join(left))
    return model


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield name or "the model itself", module


def _own(module: nn.Module, plain: type[nn.Module]) -> str | None:
    """What a module has of its own beside the class `plain`, in a few words; None if nothing."""
    kind = type_before_parametrizations(module)
    if kind is not plain:
        return f"{kind.__name__}, a subclass whose forward may differ"
    own = [attribute for attribute in ("forward", "dim") if attribute in vars(module)]
    return f"with its own {' and '.join(own)}" if own else None


def _change_class(module: nn.Module, plain: type[nn.Module]) -> None:
    """Makes `plain` the class of a module, below its parametrisations if it has any.

    Those gave it a class of its own, with the weight as a property. Copies of the module share
    that class and keep it as it is: the module gets another one.
    """
    if is_parametrized(module):
        parametrised = type(module)
        plain = type(parametrised.__name__, (plain,), dict(vars(parametrised)))
    module.__class__ = plain


def _warn_without_kernels(devices: set[torch.device]) -> None:
    """Warns once for a device type that has no kernels, of modules that are or may go there."""
    for device in devices:
        if device.type in ("cpu", "meta") and not has_kernels(torch.device("cpu")):
            # Models are made there, and then go to the accelerator.
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = accelerator or torch.device("cpu")
        if device.type != "meta" and not has_kernels(device):
            warn_once(
                f"accelerate: no kernels on {device.type}, PyTorch's operators serve there: "
                f"{reason(device)}"
            )


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}(): argument 'model' must be a torch.nn.Module, not "
            f"{type(model).__name__}. Pass the model, not its parameters or state_dict."
        )
