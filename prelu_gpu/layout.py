"""From shapes and strides to (outer, channels, inner): how tensors lie in memory.

The operation is elementwise, so it runs over memory and not over dimensions: a dense tensor of any
layout is seen as rows of elements that share a slope.
"""

import functools
import math
from typing import NamedTuple


class Gaps(NamedTuple):
    """What a kernel adds to an input's pointer, in elements, beside its own offsets in a result.

    Those offsets are dense: a gap is the rest of the input's stride.
    """

    outer: int = 0
    """Added for each outer position."""
    channel: int = 0
    """Added for each channel."""
    expanded: bool = False
    """A row is one number, as in a gradient that `sum` makes: a kernel has no offsets of its own
    for it, and adds whole strides."""


DENSE = Gaps()

SAMPLES_LIMIT = 65535
"""Most samples whose channels lie within: a grid's third axis has no more programs."""


class View(NamedTuple):
    """A result's memory in order: element (n, c, i) has slope c; and how inputs lie beside it."""

    outer: int
    channels: int
    inner: int
    x: Gaps = DENSE
    grad_y: Gaps = DENSE
    copies: tuple[str, ...] = ()
    """Inputs that no gaps describe: this pass copies them into the result's layout."""
    off_grid: tuple[str, ...] = ()
    """Inputs that do not begin on the 16-byte grid, as results and copies do."""
    samples: int = 1
    """How many such views follow one another, each with channels of its own."""

    @property
    def numel(self) -> int:
        """Number of elements, of a sample."""
        return self.outer * self.channels * self.inner

    @property
    def inputs(self) -> dict[str, Gaps]:
        """The gaps of each input."""
        return {"x": self.x, "grad_y": self.grad_y}

    @property
    def gaps(self) -> int:
        """The greatest common divisor of all gaps; 0 where there are none."""
        dense_rows = [gaps for gaps in self.inputs.values() if not gaps.expanded]
        return math.gcd(*(gap for gaps in dense_rows for gap in (gaps.outer, gaps.channel)))

    @property
    def narrow(self) -> bool:
        """Whether accesses are narrow: those to dense rows off the grid.

        Rows with gaps have an address each, which costs more than wide loads apart do.
        """
        read_in_rows = (
            name not in self.copies and not self.inputs[name].expanded for name in self.off_grid
        )
        return any(read_in_rows) and not self.gaps

    def copied(self, *names: str) -> "View":
        """The same view with inputs copied."""
        x = DENSE if "x" in names else self.x
        grad_y = DENSE if "grad_y" in names else self.grad_y
        return self._replace(x=x, grad_y=grad_y, copies=self.copies + names)


@functools.lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a tensor's elements fill their memory without gaps or overlaps, in any order."""
    expected = 1
    for size, step in sorted(
        ((size, step) for size, step in zip(shape, stride, strict=True) if size != 1),
        key=lambda pair: pair[1],
    ):
        if step != expected:
            return False
        expected *= size
    return True


def dense_stride(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides that PyTorch gives the result of an elementwise operation on a tensor.

    Its own if it is dense, else dense ones in their order, by the sort of PyTorch's TensorIterator:
    of equal strides the smaller size is the inner, and those of 0 are passed over.
    """
    if 0 in shape or is_dense(shape, stride):
        return stride
    order = list(reversed(range(len(shape))))  # innermost first
    for last in range(1, len(order)):
        place = last
        for other in reversed(range(last)):
            inner, outer = ((stride[order[i]], shape[order[i]]) for i in (other, place))
            if 0 in (inner[0], outer[0]):
                continue
            if inner > outer:
                order[other], order[place] = order[place], order[other]
                place = other
            elif inner[0] < outer[0]:
                break
    dense, step = [0] * len(shape), 1
    for d in order:
        dense[d] = step
        step *= shape[d]
    return tuple(dense)


def same_layout(shape: tuple[int, ...], stride: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two tensors of one shape lie alike in memory; a dimension of size 1 has no say."""
    return all(size == 1 or a == b for size, a, b in zip(shape, stride, other, strict=True))


def make_view(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    channel_dim: int | None,
    x: tuple[int, ...] | None = None,
    grad_y: tuple[int, ...] | None = None,
) -> View:
    """The view of a dense, non-empty result, and of what it is made from.

    Args:
        shape: the tensors' shape.
        stride: the result's strides in elements, dense, in any order.
        channel_dim: the dimension the slope varies over; None for one shared slope.
        x: strides of the input; None for the result's.
        grad_y: strides of the output gradient; None for the result's.
    """
    if channel_dim is not None and shape[channel_dim] == 1:
        channel_dim = None
    inputs = {
        name: strides
        for name, strides in (("x", x), ("grad_y", grad_y))
        if strides is not None and not same_layout(shape, stride, strides)
    }
    # An output gradient is copied rather than the input, and both only where neither fits alone.
    for copies in ((), ("grad_y",), ("x",), ("x", "grad_y")):
        if all(name in inputs for name in copies):
            rest = {name: inputs[name] for name in inputs if name not in copies}
            joint = _joint_view(shape, stride, channel_dim, rest)
            if joint is not None:
                return joint._replace(copies=copies)
    raise ValueError(f"a tensor of shape {shape} and strides {stride} is not dense")


def _joint_view(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    channel_dim: int | None,
    inputs: dict[str, tuple[int, ...]],
) -> View | None:
    """The view in which all tensors are rows of elements, outer x channels of them, if any."""
    tensors = [stride, *inputs.values()]
    # Runs of dimensions that every tensor walks like one: (size, strides), outermost first.
    runs: list[tuple[int, list[int]]] = []
    channel_run = None
    for d in sorted(range(len(shape)), key=stride.__getitem__, reverse=True):
        steps = [strides[d] for strides in tensors]
        if shape[d] == 1:
            continue
        if d == channel_dim:
            channel_run = len(runs)
        elif runs and channel_run != len(runs) - 1:
            size, outer_steps = runs[-1]
            if outer_steps == [shape[d] * step for step in steps]:
                runs[-1] = size * shape[d], steps
                continue
        runs.append((shape[d], steps))

    nothing = 1, [0] * len(tensors)
    if channel_run is None:
        before, channel, after = runs[:-1], nothing, runs[-1:]
    else:
        before, after = runs[:channel_run], runs[channel_run + 1 :]
        channel = runs[channel_run]
    if len(before) > 1 or len(after) > 1:
        return None
    outer, channels, inner = (*before, nothing)[0], channel, (*after, nothing)[0]
    result = View(outer[0], channels[0], inner[0])
    found = {}
    for tensor, name in enumerate(inputs, 1):
        gaps = _gaps(result, outer[1][tensor], channels[1][tensor], inner[1][tensor])
        if gaps is None or (gaps.expanded and name == "x"):
            return None
        found[name] = gaps
    return result._replace(x=found.get("x", DENSE), grad_y=found.get("grad_y", DENSE))


def _gaps(view: View, outer: int, channel: int, inner: int) -> Gaps | None:
    """The gaps of an input of these strides, if its rows are elements in order or one number."""
    innermost = inner if view.inner > 1 else channel if view.channels > 1 else outer
    if innermost == 0:
        return Gaps(outer, channel, expanded=True)
    if innermost != 1:
        return None
    return Gaps(
        outer - view.channels * view.inner if view.outer > 1 else 0,
        channel - view.inner if view.channels > 1 else 0,
    )


TABLE = ("mean", "scale", "shift", "slope", "rstd", "running_mean", "running_var")
"""Rows of a norm's table of channels, in the order of kernels/norm.py."""


class Norm(NamedTuple):
    """What a norm is, but for its tensors."""

    training: bool
    """Whether statistics are those of x; else they are given."""
    instances: bool
    """Whether each sample has its own, as in an instance norm."""
    eps: float


class Layout(NamedTuple):
    """How a norm's tensors lie in memory."""

    view: View
    stride: tuple[int, ...]
    """Strides of the results, dense."""


def batch_layout(
    shape: tuple[int, ...], x: tuple[int, ...], grad_y: tuple[int, ...] | None = None
) -> Layout:
    """The layout where a channel, along dimension 1, has its statistics over all the others."""
    stride = dense_stride(shape, x)
    return Layout(make_view(shape, stride, 1, x, grad_y), stride)


def instance_layout(
    shape: tuple[int, ...], x: tuple[int, ...], grad_y: tuple[int, ...] | None = None
) -> Layout:
    """The layout where each channel of each sample has its own statistics.

    Results lie as x does if its samples follow one another, else as contiguous tensors.
    """
    samples, channels, *sizes = shape
    stride = dense_stride(shape, x)
    contiguous = dense_stride(shape, (0,) * len(shape))
    if samples > 1 and stride[0] != math.prod(shape[1:]):
        stride = contiguous
    sample = make_view(shape[1:], stride[1:], 0)
    if sample.outer > 1 and samples > SAMPLES_LIMIT:
        stride = contiguous
        sample = make_view(shape[1:], stride[1:], 0)
    inputs = {"x": x} if grad_y is None else {"x": x, "grad_y": grad_y}
    if sample.outer > 1:
        copies = tuple(name for name, s in inputs.items() if not same_layout(shape, stride, s))
        return Layout(sample._replace(samples=samples, copies=copies), stride)
    # Every channel of every sample is a row, or several: one dimension holds them all.
    merged = {name: _merged(shape, s) for name, s in inputs.items()}
    copies = tuple(name for name, s in merged.items() if s is None)
    result = _merged(shape, stride)
    assert result is not None
    view = make_view((samples * channels, *sizes), result, 0, **merged)
    return Layout(view._replace(copies=(*view.copies, *copies)), stride)


def _merged(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides with the first two dimensions as one; None where they do not lie like one."""
    samples, channels = shape[:2]
    if samples == 1:
        return stride[1:]
    if channels == 1:
        return stride[:1] + stride[2:]
    return stride[1:] if stride[0] == channels * stride[1] else None
