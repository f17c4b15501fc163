import copy
import pickle

import pytest
import torch
from support import assert_same, randn
from torch import nn

import prelu_gpu


def test_prelu_is_torchs_module_with_the_same_state_dict(device):
    ours, torchs = prelu_gpu.PReLU(4, init=0.1).to(device), nn.PReLU(4, init=0.1).to(device)
    assert isinstance(ours, nn.PReLU)
    assert repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    with torch.no_grad():
        torchs.weight.uniform_()
    ours.load_state_dict(torchs.state_dict())
    x = randn((2, 4, 5), torch.float32, device)
    assert_same(ours(x).detach(), torchs(x).detach())


def test_prelu_takes_pytorchs_arguments(device):
    module = prelu_gpu.PReLU(3, 0.5, device, torch.float64)
    assert module.weight.dtype == torch.float64
    assert module.weight.device.type == device.type
    assert torch.equal(module.weight, torch.full_like(module.weight, 0.5))
    assert prelu_gpu.PReLU().weight.tolist() == [0.25]


def test_prelu_along_another_dim(device):
    module = prelu_gpu.PReLU(5, dim=-1).to(device)
    with torch.no_grad():
        module.weight.copy_(torch.arange(5))
    x = -torch.ones(2, 3, 5, device=device)
    assert_same(module(x).detach(), -torch.arange(5.0, device=device).expand(2, 3, 5).contiguous())
    assert repr(module) == "PReLU(num_parameters=5, dim=-1)"
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again.dim == -1


def test_prelu_trains(device):
    module = prelu_gpu.PReLU(2).to(device)
    x = randn((8, 2, 6), torch.float32, device)
    expected = torch.prelu(x, torch.tensor([0.7, -0.3], device=device))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        (module(x) - expected).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(module.weight.tolist(), [0.7, -0.3], atol=1e-3, rtol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_leaky_relu_is_torchs_module(inplace, device):
    ours, torchs = (kind(0.2, inplace) for kind in (prelu_gpu.LeakyReLU, nn.LeakyReLU))
    assert isinstance(ours, nn.LeakyReLU)
    assert repr(ours) == repr(torchs)
    x = randn((2, 4, 5), torch.float32, device)
    given = x.clone()
    y = ours(given)
    assert (y is given) == inplace
    assert_same(y, torchs(x.clone()))


def test_half_precision_input_beside_float32_slopes(device):
    module = prelu_gpu.PReLU(4).to(device)
    x = randn((2, 4, 5), torch.float16, device).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float16
    assert module.weight.grad.dtype == torch.float32


def keras(device=None):
    return prelu_gpu.SharedAxesPReLU((3, 4), [2], init=0.3, device=device)


MODULES = {
    "SharedAxesPReLU": keras,
    "PReLU": lambda device=None: prelu_gpu.PReLU(3, 0.3, device, dim=-1),
    "accelerated": lambda device=None: prelu_gpu.accelerate(nn.PReLU(3, 0.3, device)),
    "restored": lambda device=None: prelu_gpu.restore(prelu_gpu.PReLU(3, 0.3, device)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_slopes_from_the_meta_device_are_reset_to_init(make, device):
    module = make("meta").to_empty(device=device)
    with torch.no_grad():
        module.weight.fill_(float("nan"))
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module):
        again.reset_parameters()
        expected = make(device).weight
        assert_same(again.weight.detach(), expected.detach())
        assert torch.equal(expected, torch.full_like(expected, 0.3))
        assert again.weight.requires_grad


def test_slopes_of_keras_layer_begin_with_init_in_any_dtype(device):
    module = prelu_gpu.SharedAxesPReLU((3,), init=torch.tensor(0.5), dtype=torch.float16)
    assert_same(module.weight.detach(), torch.full((3,), 0.5, dtype=torch.float16))
    assert prelu_gpu.SharedAxesPReLU((3,)).weight.tolist() == [0.0] * 3
    skipped = nn.utils.skip_init(prelu_gpu.SharedAxesPReLU, (3,), init=0.5, device=device)
    skipped.reset_parameters()
    assert skipped.weight.tolist() == [0.5] * 3
    assert skipped.weight.device.type == device.type
