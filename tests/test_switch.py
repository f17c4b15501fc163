import copy
import io
import logging

import pytest
import torch
from reference import assert_same, randn
from torch import nn

import prelu_gpu


class OwnForward(nn.PReLU):
    def forward(self, input):
        return input * 2


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.PReLU(3)
        self.again = self.first
        self.body = nn.Sequential(nn.Conv1d(3, 3, 3), nn.PReLU(), nn.LeakyReLU())
        self.own = OwnForward(3)

    def forward(self, x):
        return self.own(self.body(self.again(x)))


@pytest.fixture
def model(device):
    return Network().to(device)


def test_accelerate_swaps_in_place_and_keeps_everything_else(model, device, launches):
    parameters = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    first, calls = model.first, []
    first.register_forward_hook(lambda *arguments: calls.append("hook"))
    first.register_full_backward_hook(lambda *arguments: calls.append("backward hook"))
    x = randn((2, 3, 9), torch.float32, device).requires_grad_()
    before = model(x)

    assert prelu_gpu.accelerate(model) is model
    assert type(model.first) is type(model.body[1]) is prelu_gpu.PReLU
    assert model.first is first is model.again
    assert type(model.own) is OwnForward
    assert type(model.body[2]) is nn.LeakyReLU
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    calls.clear()
    after = model(x)
    assert_same(after.detach(), before.detach())
    assert launches.count("column_forward") + launches.count("plane_forward") == 2
    after.sum().backward()
    assert calls == ["hook", "backward hook"]


def test_restore_undoes_it(model, device, launches):
    classes = [type(module) for module in model.modules()]
    prelu_gpu.accelerate(model)
    assert prelu_gpu.restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    model(randn((2, 3, 9), torch.float32, device))
    assert launches == []
    prelu_gpu.accelerate(model)(randn((2, 3, 9), torch.float32, device))


def test_a_root_module_and_repeated_use():
    root = nn.PReLU()
    assert prelu_gpu.accelerate(prelu_gpu.accelerate(root)) is root
    assert type(root) is prelu_gpu.PReLU
    assert type(prelu_gpu.restore(root)) is nn.PReLU
    root.extra_repr()


def test_deepcopy_and_torch_save(model, device):
    prelu_gpu.accelerate(model)
    x = randn((2, 3, 9), torch.float32, device)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(again.first) is prelu_gpu.PReLU
        assert_same(again(x).detach(), model(x).detach())


def test_state_dicts_load_both_ways(model):
    plain, fast = copy.deepcopy(model), prelu_gpu.accelerate(copy.deepcopy(model))
    with torch.no_grad():
        plain.first.weight.fill_(0.7)
    fast.load_state_dict(plain.state_dict())
    assert fast.first.weight.tolist() == pytest.approx([0.7] * 3)
    with torch.no_grad():
        fast.first.weight.fill_(0.9)
    plain.load_state_dict(fast.state_dict())
    assert plain.first.weight.tolist() == pytest.approx([0.9] * 3)


def test_restore_turns_our_own_modules_into_torchs(caplog):
    model = nn.Sequential(prelu_gpu.PReLU(3), prelu_gpu.LeakyReLU(0.2), prelu_gpu.PReLU(3, dim=2))
    prelu_gpu.restore(model)
    assert [type(m) for m in model] == [nn.PReLU, nn.LeakyReLU, prelu_gpu.PReLU]
    assert caplog.messages == ["restore: left as they are: 2 (with its own dim)"]


def test_accelerate_reports_what_it_swapped_and_left(model, caplog):
    caplog.set_level(logging.INFO, logger="prelu_gpu")
    prelu_gpu.accelerate(model)
    swapped, left = caplog.records
    assert swapped.levelname == "INFO"
    assert swapped.getMessage() == "accelerate: 2 torch.nn.PReLU swapped: first, body.1"
    assert left.levelname == "WARNING"
    assert left.getMessage() == (
        "accelerate: left as they are: own (OwnForward, a subclass whose forward may differ)"
    )


def test_accelerate_warns_where_there_is_nothing_to_do(caplog):
    prelu_gpu.accelerate(nn.Sequential(nn.ReLU()))
    assert caplog.messages == ["accelerate: no torch.nn.PReLU in Sequential"]
    caplog.clear()
    prelu_gpu.accelerate(nn.Sequential(prelu_gpu.PReLU()))
    assert caplog.messages == []


def test_modules_with_a_forward_or_dim_of_their_own_stay(caplog):
    hooked, other = nn.PReLU(3), nn.PReLU(3)
    forward = hooked.forward
    hooked.forward = lambda x: forward(x) * 2
    other.dim = 2
    model = nn.Sequential(hooked, other)
    x = torch.randn(2, 3, 4)
    before = model(x)
    prelu_gpu.accelerate(model)
    assert [type(m) for m in model] == [nn.PReLU] * 2
    assert_same(model(x).detach(), before.detach())
    assert caplog.messages == [
        "accelerate: left as they are: 0 (with its own forward), 1 (with its own dim)"
    ]


def test_restore_leaves_what_it_cannot_undo(caplog):
    class Subclass(prelu_gpu.PReLU):
        pass

    hooked = prelu_gpu.accelerate(nn.PReLU(3))
    hooked.forward = hooked.forward
    model = nn.Sequential(hooked, Subclass(), prelu_gpu.SharedAxesPReLU((3,)))
    classes = [type(m) for m in model]
    prelu_gpu.restore(model)
    assert [type(m) for m in model] == classes
    model(torch.randn(2, 3))
    assert caplog.messages == [
        "restore: left as they are: 0 (with its own forward), "
        "1 (Subclass, a subclass whose forward may differ), 2 (SharedAxesPReLU)"
    ]


def test_a_root_module_is_named(caplog):
    caplog.set_level(logging.INFO, logger="prelu_gpu")
    prelu_gpu.accelerate(nn.PReLU())
    assert caplog.messages == ["accelerate: 1 torch.nn.PReLU swapped: the model itself"]


@pytest.mark.parametrize("function", [prelu_gpu.accelerate, prelu_gpu.restore])
def test_a_model_that_is_none(function):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not dict\. Pass the model"):
        function({})
