import copy
import io
import logging

import pytest
import torch
from support import assert_same, randn, run_program
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import prelu_gpu
from prelu_gpu import backend

HINT = "; prelu_gpu.enable() serves those that call torch.prelu"


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
        "accelerate: left as they are: own (OwnForward, a subclass whose forward may differ)" + HINT
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
        "accelerate: left as they are: 0 (with its own forward), 1 (with its own dim)" + HINT
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


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


STEPS = {
    "parametrise": lambda m: parametrize.register_parametrization(m, "weight", Half()),
    "normalise": lambda m: weight_norm(m, dim=None),
    "remove": lambda m: parametrize.remove_parametrizations(m, "weight"),
    "accelerate": prelu_gpu.accelerate,
    "restore": prelu_gpu.restore,
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize(
    "steps",
    [
        "parametrise accelerate",
        "parametrise accelerate remove",
        "parametrise accelerate remove restore",
        "parametrise accelerate restore",
        "parametrise accelerate restore remove",
        "parametrise accelerate restore accelerate remove",
        "parametrise accelerate copy remove",
        "parametrise accelerate copy restore remove",
        "parametrise copy accelerate copy remove",
        "accelerate parametrise restore",
        "accelerate parametrise restore remove",
        "accelerate parametrise remove parametrise restore",
        "normalise accelerate copy",
        "normalise accelerate restore remove",
    ],
)
def test_parametrised_slopes_before_and_after_in_every_order(steps, device, request, caplog):
    module = nn.PReLU(3, device=device)
    x = randn((2, 3, 9), torch.float32, device)
    before = nn.Sequential(module)(x)
    fast = parametrised = False
    for step in steps.split():
        original = next(module.parameters())
        module = STEPS[step](module)
        fast = {"accelerate": True, "restore": False}.get(step, fast)
        parametrised = {"parametrise": True, "normalise": True, "remove": False}.get(
            step, parametrised
        )
        kind = prelu_gpu.PReLU if fast else nn.PReLU
        assert parametrize.type_before_parametrizations(module) is kind
        assert type(module).__name__ == "Parametrized" * parametrised + "PReLU"
        assert isinstance(vars(type(module)).get("weight"), property) == parametrised
        assert parametrize.is_parametrized(module) == parametrised
        if step in ("accelerate", "restore"):
            assert next(module.parameters()) is original
        torch.testing.assert_close(module(x), before)
    assert caplog.messages == []
    if fast:
        request.getfixturevalue("launches")
        module(x)


def test_copies_of_a_parametrised_module_stay_as_they_are(device, launches):
    """They share the class that parametrize made for it."""
    module = parametrize.register_parametrization(nn.PReLU(3, device=device), "weight", Half())
    other = copy.deepcopy(module)
    prelu_gpu.accelerate(module)
    x = randn((2, 3, 9), torch.float32, device)
    other(x)
    assert launches == []
    assert parametrize.type_before_parametrizations(other) is nn.PReLU
    parametrize.remove_parametrizations(module, "weight")
    assert_same(module(x).detach(), other(x).detach())


def test_a_parametrised_subclass_stays(caplog):
    model = nn.Sequential(OwnForward(3))
    parametrize.register_parametrization(model[0], "weight", Half())
    kind = type(model[0])
    prelu_gpu.accelerate(model)
    assert type(model[0]) is kind
    assert caplog.messages == [
        "accelerate: left as they are: 0 (OwnForward, a subclass whose forward may differ)" + HINT
    ]


def test_a_root_module_is_named(caplog):
    caplog.set_level(logging.INFO, logger="prelu_gpu")
    prelu_gpu.accelerate(nn.PReLU())
    assert caplog.messages == ["accelerate: 1 torch.nn.PReLU swapped: the model itself"]


@pytest.mark.parametrize("function", [prelu_gpu.accelerate, prelu_gpu.restore])
def test_a_model_that_is_none(function):
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not dict\. Pass the model"):
        function({})


@pytest.mark.parametrize(
    ("accelerator", "made_on", "named"),
    [
        (None, "cpu", "cpu"),
        (None, "meta", "cpu"),
        ("mps", "cpu", "mps"),
        ("mps", "meta", "mps"),
        ("cuda", "cpu", None),
        ("cuda", "meta", None),
    ],
)
def test_accelerate_warns_once_where_no_kernels_serve(
    accelerator, made_on, named, caplog, monkeypatch
):
    """Of a device that a model is made on, and of the accelerator that it goes to from there."""

    def current(check_available):
        assert check_available, "a PyTorch with CUDA is of no use without a GPU"
        return accelerator and torch.device(accelerator)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for _ in range(2):
        model = nn.Sequential(nn.PReLU(), nn.Linear(2, 2), nn.PReLU(2)).to(made_on)
        weight_norm(model[2], dim=None)
        prelu_gpu.accelerate(prelu_gpu.accelerate(model))
    expected = f"accelerate: no kernels on {named}, PyTorch's operators serve there: Triton has "
    assert caplog.messages == ([f"{expected}no kernels for {named}"] if named else [])
    assert all(record.levelname == "WARNING" for record in caplog.records)


def test_nothing_is_said_again_and_again_without_kernels():
    """Of a model on the CPU, in a process whose Triton interprets nothing."""
    program = """
import torch, prelu_gpu
for _ in range(3):
    model = prelu_gpu.accelerate(torch.nn.Sequential(torch.nn.PReLU(), torch.nn.PReLU(3)))
    with prelu_gpu.enabled("cpu"):
        model(torch.randn(2, 3)).sum().backward()
"""
    _, said = run_program(program, interpret=False, CUDA_VISIBLE_DEVICES="")
    assert said.splitlines() == [
        "accelerate: no kernels on cpu, PyTorch's operators serve there: Triton has no kernels for "
        "cpu",
        "enable: torch.prelu on cpu stays PyTorch's: Triton has no kernels for cpu",
    ]


# Tools that look for torch.nn's classes


def picture_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 2, 1), nn.PReLU())
    return model.eval()


def quantised_eagerly(model, x):
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(model)
    prepared(x)
    return quantization.convert(prepared)(x)


def quantised_by_fx(model, x):
    quantization = pytest.importorskip("torch.ao.quantization")
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = quantization.QConfigMapping().set_global(quantization.default_qconfig)
    prepared = quantize_fx.prepare_fx(model, mapping, (x,))
    prepared(x)
    return quantize_fx.convert_fx(prepared)(x)


def counted_by_class(model, x):
    return torch.tensor([float(type(module) is nn.PReLU) for module in model.modules()])


def seen_by_a_patched_function(model, x):
    calls, function = [], nn.functional.prelu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "prelu", lambda *a: calls.append(a) or function(*a))
        y = model(x)
    return torch.tensor(len(calls)), y


def turned_to_mkldnn(model, x):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no MKL-DNN")
    from torch.utils import mkldnn

    return mkldnn.to_mkldnn(model)(x.to_mkldnn()).to_dense()


TOOLS = {
    "eager quantisation": quantised_eagerly,
    "FX quantisation": quantised_by_fx,
    "classes": counted_by_class,
    "a patched function": seen_by_a_patched_function,
    "to_mkldnn": turned_to_mkldnn,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_restore_brings_back_what_tools_look_for(tool):
    x = torch.randn(2, 3, 8, 8)
    expected = tool(picture_network(), x)
    given = tool(prelu_gpu.restore(prelu_gpu.accelerate(picture_network())), x)
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_eager_quantisation_of_an_accelerated_model_names_restore():
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"got a quantized tensor.* prelu_gpu\.restore\(model\)"):
        quantised_eagerly(prelu_gpu.accelerate(picture_network()), x)
