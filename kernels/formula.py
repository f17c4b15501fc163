"""The formula of PReLU, once: every kernel calls it. The meaning is that of torch.nn.PReLU.

The values arrive in the type the arithmetic is done in: float64 for float64 data, else float32.
"""

import triton
import triton.language as tl


@triton.jit
def prelu(x, weight):
    """Gives x where x > 0, else weight * x (so -0.0 stays, and so does NaN)."""
    return tl.where(x > 0, x, weight * x)


@triton.jit
def prelu_grad_x(grad_y, x, weight):
    """Gives the input gradient: grad_y where x > 0, else weight * grad_y."""
    return tl.where(x > 0, grad_y, weight * grad_y)


@triton.jit
def prelu_grad_weight(grad_y, x):
    """Gives one element's share of the slope gradient: 0 where x > 0, else grad_y * x."""
    return tl.where(x > 0, 0.0, grad_y * x)
