"""Parameter groups for torch.optim's optimisers."""

import numbers
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .modules import SharedAxesPReLU


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of `model` in two groups, so that no weight decay pulls slopes to 0.

    Weight decay would bias PReLU toward ReLU: *Delving Deep into Rectifiers* (He et al., 2015,
    arXiv:1502.01852) trains slopes without it, and :class:`torch.nn.PReLU`'s documentation advises
    the same.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.PReLU(8))
    >>> groups = prelu_gpu.parameter_groups(model, weight_decay=1e-2)
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)

    Slopes are the weights of :class:`torch.nn.PReLU`, of its subclasses, which include
    :class:`prelu_gpu.PReLU`, and of :class:`prelu_gpu.SharedAxesPReLU`. If torch.nn.utils
    parametrised, normalised or pruned a weight, slopes are the parameters behind it. A parameter
    that a model passes to :func:`torch.nn.functional.prelu` itself is not recognised.

    Args:
        model: any module, also in a wrapper, as DistributedDataParallel or of torch.compile.
        weight_decay: for all other parameters.

    Returns:
        Always two groups, because schedulers may take one value for each: all other parameters with
        `weight_decay`, then the slopes with 0.0. Either may be empty. Together they hold every
        parameter of `model` once, frozen ones included, in the order of `model.parameters()`.

    Raises:
        TypeError: `model` is not a module, or `weight_decay` not a number.
        ValueError: `weight_decay` is negative or NaN, or `model` has no parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            "parameter_groups(): argument 'model' must be a torch.nn.Module, not "
            f"{type(model).__name__}. Pass the model, not its parameters."
        )
    if not isinstance(weight_decay, numbers.Real):
        raise TypeError(
            "parameter_groups(): argument 'weight_decay' must be float, not "
            f"{type(weight_decay).__name__}"
        )
    if not weight_decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}. It is 0 or more.")
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError(
            f"optimizer got an empty parameter list: {type(model).__name__} has no parameters"
        )
    slopes = {id(slope) for module in model.modules() for slope in _slopes(module)}
    return [
        {"params": [p for p in parameters if id(p) not in slopes], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in slopes], "weight_decay": 0.0},
    ]


def _slopes(module: nn.Module) -> Iterator[nn.Parameter]:
    """The slopes that a module itself has, or what torch.nn.utils makes them from."""
    if not isinstance(module, (nn.PReLU, SharedAxesPReLU)):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if name in ("weight", "weight_orig", "weight_g", "weight_v"):
            yield parameter
    if is_parametrized(module, "weight"):
        # Its originals, not the parameters that a parametrisation has itself.
        yield from module.get_submodule("parametrizations.weight").parameters(recurse=False)
