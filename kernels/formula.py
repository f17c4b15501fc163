"""The formula of PReLU, once, and a tile of it: what every kernel does between its addresses.

The meaning is that of torch.nn.PReLU. Arithmetic is in COMPUTE: float64 for float64 data, else
float32; a store rounds once. A mask of None means that the whole tile exists.

What PReLU is applied to is x itself, or a norm of x: its `coefficients` tell, by their number.

    (weight,)                                       z = x
    (weight, scale, shift, mean)                    z = (x - mean) * scale + shift
    (weight, scale, shift, mean, slant, offset)     the same; to the gradient of x the last two add
                                                    what x has done to the statistics

A tile function has the parameters of `forward_tile` and gives a tuple of tensors, its shares of
sums over all tiles. The kernels that walk over tiles (plane.py, column.py) take it as a constant.
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
def centre(x, coefficients):
    """Gives x less the mean, where the coefficients have one."""
    if len(coefficients) > 1:
        x -= coefficients[3]
    return x


@triton.jit
def argument(centred, coefficients):
    """What PReLU is applied to. By one instruction, so that its sign is the same in every pass."""
    if len(coefficients) > 1:
        centred = tl.fma(centred, coefficients[1], coefficients[2])
    return centred


@triton.jit
def grad_argument(grad_z, centred, coefficients):
    """The gradient of x by that of PReLU's argument."""
    if len(coefficients) == 6:
        fixed = tl.fma(centred, coefficients[4], coefficients[5])
        grad_z = tl.fma(grad_z, coefficients[1], fixed)
    elif len(coefficients) == 4:
        grad_z = grad_z * coefficients[1]
    return grad_z


@triton.jit
def forward_tile(
    x_ptr,
    grad_y_ptr,
    y_ptr,
    coefficients,
    offsets,
    mask,
    COMPUTE: tl.constexpr,
    EXPANDED: tl.constexpr,
):
    """Writes y of one tile."""
    x = load(x_ptr + offsets, mask, COMPUTE)
    z = argument(centre(x, coefficients), coefficients)
    tl.store(y_ptr + offsets, prelu(z, coefficients[0]), mask)
    return ()


@triton.jit
def backward_tile(
    x_ptr,
    grad_y_ptr,
    grad_x_ptr,
    coefficients,
    offsets,
    mask,
    COMPUTE: tl.constexpr,
    EXPANDED: tl.constexpr,
):
    """Writes grad_x of one tile, unless its pointer is None; gives the shares of grad_weight.

    Behind a norm, of three sums: the shift's gradient, that times x - mean, and grad_weight.
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
        # Addresses made after the values would take registers.
        grad_x_ptr += offsets
    centred = centre(x, coefficients)
    z = argument(centred, coefficients)
    grad_z = prelu_grad_x(grad_y, z, coefficients[0])
    if grad_x_ptr is not None:
        grad_x = grad_argument(grad_z, centred, coefficients)
        tl.store(grad_x_ptr, grad_x, mask)
    if len(coefficients) == 1:
        shares = (prelu_grad_weight(grad_y, z),)
    else:
        shares = (grad_z, grad_z * centred, prelu_grad_weight(grad_y, z))
    return shares


@triton.jit
def zeros(SUMS: tl.constexpr, SHAPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Sums that nothing has been added to."""
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros(SHAPE, COMPUTE),)
    return sums


@triton.jit
def add(sums, shares):
    """Adds the first shares of a tile to as many sums."""
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + shares[i],)
    return added
