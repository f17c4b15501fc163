"""Slopes of the input's rank: numpy's broadcasting, from the input's side."""

import itertools

import pytest
import torch
from support import PAIRS, assert_same, backward, id_of, randn

import prelu_gpu
from prelu_gpu import prelu

SHAPE = (3, 4, 1, 5)
KEPT = [kept for n in range(5) for kept in itertools.combinations(range(4), n)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "sliced": lambda x: torch.cat([x, x], 1)[:, ::2],
}


def slopes(kept):
    return tuple(size if d in kept else 1 for d, size in enumerate(SHAPE))


def exact(x, weight, grad_y):
    return backward(lambda x, w: torch.ops.aten._prelu_kernel(x, w), x, weight, grad_y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_every_choice_of_dimensions_in_every_layout(kept, layout, device, launches):
    x = LAYOUTS[layout](randn(SHAPE, torch.float64, device))
    weight = randn(slopes(kept), torch.float64, device, seed=1)
    grad_y = randn(SHAPE, torch.float64, device, seed=2)
    y, grad_x, grad_weight = backward(prelu, x, weight, grad_y)
    exact_y, exact_grad_x, exact_grad_weight = exact(x, weight, grad_y)
    assert_same(y, exact_y)
    assert torch.equal(grad_x, exact_grad_x)
    torch.testing.assert_close(grad_weight, exact_grad_weight)


@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize("kept", [(1, 2, 3), (1, 3), (0, 3)], ids=str)
def test_dtypes(kept, dtypes, device, launches):
    x, grad_y = (randn(SHAPE, dtypes[0], device, seed) for seed in (0, 2))
    weight = randn(slopes(kept), dtypes[1], device, seed=1)
    y, grad_x, grad_weight = backward(prelu, x, weight, grad_y)
    wide = exact(x.to(dtypes[1]), weight, grad_y.to(dtypes[1]))
    assert_same(y, wide[0].to(dtypes[0]))
    assert torch.equal(grad_x, wide[1].to(dtypes[0]))
    assert grad_weight.dtype == dtypes[1]
    double = exact(x.double(), weight.double(), grad_y.double())[2]
    eps = torch.finfo(dtypes[1]).eps
    torch.testing.assert_close(grad_weight.double(), double, rtol=eps, atol=32 * eps**1.5)


def test_on_devices_without_kernels(no_kernels):
    x, weight = torch.randn(SHAPE), torch.randn(slopes((1, 3)))
    given = backward(prelu, x, weight, torch.ones_like(x))
    for value, expected in zip(given, exact(x, weight, torch.ones_like(x)), strict=True):
        assert torch.equal(value, expected)


def test_empty_inputs(device):
    y = prelu(torch.empty(2, 0, 3, device=device), torch.empty(1, 0, 3, device=device))
    assert y.shape == (2, 0, 3)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 4, 1, 6), (3, 4, 2, 5)])
def test_slopes_that_do_not_broadcast(shape):
    with pytest.raises(RuntimeError, match=r"must match the size of tensor input .* dimension"):
        prelu(torch.zeros(SHAPE), torch.zeros(shape))


@pytest.mark.parametrize(
    ("shared_axes", "shape"),
    [(None, (4, 6, 5)), ([2, 3], (4, 1, 1)), ([1], (1, 6, 5)), ([1, 2, 3], (1, 1, 1))],
)
def test_shared_axes_prelu_is_keras_layer(shared_axes, shape, device):
    module = prelu_gpu.SharedAxesPReLU((4, 6, 5), shared_axes, init=0.3, device=device)
    assert module.weight.shape == shape
    assert module.weight.tolist() == torch.full(shape, 0.3).tolist()
    x = randn((2, 4, 6, 5), torch.float32, device)
    # Keras: relu(x) - alpha * relu(-x)
    expected = torch.relu(x) - module.weight * torch.relu(-x)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    module(x).sum().backward()
    assert module.weight.grad.shape == shape
    assert str(list(shared_axes) if shared_axes else None) in repr(module)


def test_shared_axes_prelu_refuses_what_keras_refuses():
    with pytest.raises(ValueError, match=r"shared_axes .* from 1 to 3, the batch being 0; got 0"):
        prelu_gpu.SharedAxesPReLU((4, 6, 5), shared_axes=[0])
    with pytest.raises(ValueError, match="got 4"):
        prelu_gpu.SharedAxesPReLU((4, 6, 5), shared_axes=[1, 4])
    module = prelu_gpu.SharedAxesPReLU((4, 6, 5))
    with pytest.raises(RuntimeError, match="expected an input of 4 dimensions"):
        module(torch.zeros(2, 4, 6))
    with pytest.raises(RuntimeError, match="must match the size"):
        module(torch.zeros(2, 4, 6, 7))


def test_shared_axes_prelu_takes_kerass_arguments():
    assert prelu_gpu.SharedAxesPReLU((3, 4), 2, init=0).weight.shape == (3, 1)
    assert prelu_gpu.SharedAxesPReLU((None, 4), [1]).weight.shape == (1, 4)
    assert prelu_gpu.SharedAxesPReLU([3, 4], init=1).weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3,), TypeError, "input_shape must be the sizes of the input without the batch.* not int"),
        (("34",), TypeError, "input_shape must be .* not str"),
        (((None, 4), [2]), ValueError, "axis 1 is None: give its size, or share it"),
        (((3, 4), [1.0]), TypeError, "'float' object cannot be interpreted as an integer"),
        (((3, 4), "12"), TypeError, "'str' object cannot be interpreted as an integer"),
    ],
)
def test_shared_axes_prelu_refuses_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        prelu_gpu.SharedAxesPReLU(*arguments)
