"""The family as modules: torch.nn's own, with another forward."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .checks import checked_dim, refuse_scripting
from .functional import leaky_relu, prelu
from .recorded import leaf_of_fx


class PReLU(nn.PReLU):
    """PReLU on fused kernels: a :class:`torch.nn.PReLU` with the same parameters and state_dict.

    Args:
        num_parameters: 1 for one shared slope, else the number of channels.
        init: the initial value of the slopes.
        device: of the slopes.
        dtype: of the slopes.
        dim: the dimension of the channels, where there is more than one slope.

    Shape:
        - input: ``(*)``
        - output: ``(*)``, with the input's dtype and, where it is dense, its memory layout.

    Attributes:
        weight: the slopes, shape ``(num_parameters,)``. Weight decay pulls them toward 0, a ReLU;
            :func:`prelu_gpu.parameter_groups` exempts them.

    A parametrisation keeps slopes in a range, as Keras's `alpha_constraint` does. It works for
    :class:`torch.nn.PReLU` too:

    >>> class Range(torch.nn.Module):
    ...     def forward(self, weight):
    ...         return weight.clamp(0.0, 1.0)
    >>> act = torch.nn.utils.parametrize.register_parametrization(PReLU(64), "weight", Range())

    The parameter itself, ``act.parametrizations.weight.original``, may leave the range, and gets no
    gradient there; Keras moves it back after each step.

    Errors and dtypes are those of :func:`prelu_gpu.prelu`.
    """

    dim: int = 1
    """Of the class too: `accelerate` turns a torch.nn.PReLU, which has no `dim`, into this."""

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        num_parameters: int = 1,
        init: float = 0.25,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        dim: int = 1,
    ) -> None:
        super().__init__(num_parameters, init, device, dtype)
        if checked_dim("PReLU", dim) != 1:
            self.dim = dim

    @leaf_of_fx
    def forward(self, input: Tensor) -> Tensor:
        """Applies PReLU."""
        return prelu(input, self.weight, dim=self.dim)

    def extra_repr(self) -> str:
        """The arguments that were given."""
        shown = super().extra_repr()
        return shown if self.dim == 1 else f"{shown}, dim={self.dim}"


class SharedAxesPReLU(nn.Module):
    """Keras's PReLU: a slope for each position of the input, but shared along some axes.

    Args:
        input_shape: the input's shape without the batch; None is allowed along shared axes.
        shared_axes: the axis or axes along which slopes are shared. The batch is axis 0, as in
            Keras: for images (batch, channels, height, width), [2, 3] gives a slope per channel.
        init: the initial value of the slopes.
        device: of the slopes.
        dtype: of the slopes.

    Shape:
        - input: ``(N, *input_shape)``
        - output: the same, with the input's dtype and, where it is dense, its memory layout.

    Attributes:
        weight: the slopes, of shape `input_shape` with 1 along the shared axes; Keras's `alpha`.

    The values are Keras's. The gradient at exactly 0 is 0 in Keras, and the slope's side here, as
    in PyTorch. Slopes whose axes do not lie together in memory are repeated along the axes between
    them in every call. Errors are those of :func:`prelu_gpu.prelu`, and ValueError for an axis
    that does not exist.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        input_shape: Sequence[int | None],
        shared_axes: Sequence[int] | int | None = None,
        init: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
            raise TypeError(
                "SharedAxesPReLU: input_shape must be the sizes of the input without the batch, as "
                f"(64, 32, 32), not {type(input_shape).__name__}"
            )
        axes = [shared_axes] if isinstance(shared_axes, int) else shared_axes
        self.shared_axes = None if axes is None else [operator.index(axis) for axis in axes]
        shape = list(input_shape)
        for axis in self.shared_axes or ():
            if not 1 <= axis <= len(shape):
                raise ValueError(
                    f"SharedAxesPReLU: shared_axes of an input_shape {tuple(input_shape)} are from "
                    f"1 to {len(shape)}, the batch being 0; got {axis}"
                )
            shape[axis - 1] = 1
        sizes = [size for size in shape if size is not None]
        if len(sizes) < len(shape):
            raise ValueError(
                f"SharedAxesPReLU: input_shape {tuple(input_shape)} must be known but along shared "
                f"axes; axis {shape.index(None) + 1} is None: give its size, or share it"
            )
        self.init = float(init)
        self.weight = nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the slopes to `init`, as FSDP does to modules that come from the meta device."""
        nn.init.constant_(self.weight, self.init)

    @leaf_of_fx
    def forward(self, input: Tensor) -> Tensor:
        """Applies PReLU."""
        if isinstance(input, Tensor) and input.dim() != self.weight.dim() + 1:
            raise RuntimeError(
                f"SharedAxesPReLU: expected an input of {self.weight.dim() + 1} dimensions, the "
                f"batch and the slopes' {tuple(self.weight.shape)}; got shape {tuple(input.shape)}"
            )
        return prelu(input, self.weight.unsqueeze(0))

    def extra_repr(self) -> str:
        """The arguments that were given."""
        return f"{tuple(self.weight.shape)}, shared_axes={self.shared_axes}"


class LeakyReLU(nn.LeakyReLU):
    """Leaky ReLU on the same kernels: a :class:`torch.nn.LeakyReLU`.

    Args:
        negative_slope: the slope where the input is not positive.
        inplace: write the result into the input.

    Shape:
        - input: ``(*)``
        - output: ``(*)``, with the input's dtype and, where it is dense, its memory layout.

    Errors and dtypes are those of :func:`prelu_gpu.leaky_relu`.
    """

    __prepare_scriptable__ = refuse_scripting

    @leaf_of_fx
    def forward(self, input: Tensor) -> Tensor:
        """Applies Leaky ReLU."""
        return leaky_relu(input, self.negative_slope, self.inplace)
