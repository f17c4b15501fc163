"""The family as modules: torch.nn's own, with another forward."""

import torch
from torch import Tensor, nn

from .functional import leaky_relu, prelu


class PReLU(nn.PReLU):
    """PReLU on fused kernels: a :class:`torch.nn.PReLU` with the same parameters and state_dict.

    Args:
        num_parameters: 1 for one shared slope, else the number of channels.
        init: the slopes' first value.
        device: of the slopes.
        dtype: of the slopes.
        dim: the dimension of the channels, where there is more than one slope.

    Shape:
        - input: ``(*)``
        - output: ``(*)``, with the input's dtype and strides.

    Attributes:
        weight: the slopes, shape ``(num_parameters,)``. Weight decay pulls them to 0, which makes a
            ReLU: leave them out of it.

    Errors and dtypes are those of :func:`prelu_gpu.prelu`.
    """

    dim: int = 1
    """Of the class too: `accelerate` turns a torch.nn.PReLU, which has no `dim`, into this."""

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
        if dim != 1:
            self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """Applies PReLU."""
        return prelu(input, self.weight, dim=self.dim)

    def extra_repr(self) -> str:
        """The arguments that were given."""
        shown = super().extra_repr()
        return shown if self.dim == 1 else f"{shown}, dim={self.dim}"


class LeakyReLU(nn.LeakyReLU):
    """Leaky ReLU on the same kernels: a :class:`torch.nn.LeakyReLU`.

    Args:
        negative_slope: the slope where the input is not positive.
        inplace: write the result into the input.

    Shape:
        - input: ``(*)``
        - output: ``(*)``, with the input's dtype and strides.

    Errors and dtypes are those of :func:`prelu_gpu.leaky_relu`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Applies Leaky ReLU."""
        return leaky_relu(input, self.negative_slope, self.inplace)
