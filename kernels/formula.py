"""The formula of PReLU, once, and a tile of it: what every kernel does between its addresses.

The meaning is that of torch.nn.PReLU. Arithmetic is in COMPUTE: float64 for float64 data, else
float32; a store rounds once. A mask of None means that the whole tile exists.
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


@triton.jit
def load_weight(weight_ptr, negative_slope, channel, COMPUTE: tl.constexpr):
    """The slopes of channels: `negative_slope` for all of them where weight_ptr is None."""
    # Triton compiles what follows a `return`, so each case is a branch.
    if weight_ptr is None:
        weight = tl.full(channel.shape, negative_slope, COMPUTE)
    else:
        weight = tl.load(weight_ptr + channel).to(COMPUTE)
    return weight


@triton.jit
def load(pointers, mask, COMPUTE: tl.constexpr):
    """Loads a tile, 0 where masked."""
    values = tl.load(pointers) if mask is None else tl.load(pointers, mask, 0.0)
    return values.to(COMPUTE)


@triton.jit
def forward_tile(x_ptr, weight, y_ptr, offsets, mask, COMPUTE: tl.constexpr):
    """Writes y of one tile."""
    x = load(x_ptr + offsets, mask, COMPUTE)
    tl.store(y_ptr + offsets, prelu(x, weight), mask)


@triton.jit
def backward_tile(
    grad_y_ptr,
    x_ptr,
    weight,
    grad_x_ptr,
    offsets,
    mask,
    COMPUTE: tl.constexpr,
    EXPANDED: tl.constexpr,
):
    """Writes grad_x of one tile, unless its pointer is None; gives the shares of grad_weight.

    EXPANDED: grad_y is the one number at its pointer.
    """
    x = load(x_ptr + offsets, mask, COMPUTE)
    if EXPANDED:
        grad_y = tl.load(grad_y_ptr).to(COMPUTE)
        if mask is not None:
            # An infinity times the 0 of a masked x were a NaN in the sum.
            grad_y = tl.where(mask, grad_y, 0.0)
    else:
        grad_y = load(grad_y_ptr + offsets, mask, COMPUTE)
    if grad_x_ptr is not None:
        tl.store(grad_x_ptr + offsets, prelu_grad_x(grad_y, x, weight), mask)
    return prelu_grad_weight(grad_y, x)
