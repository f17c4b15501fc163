"""Networks of published packages, as they are, beside the same networks on the kernels.

Of a network's results only the slopes' gradients may differ: the rest is equal bit for bit, since
PReLU's output and input gradient are, and no operator after them sees another number.
"""

import contextlib
import copy
import functools
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from support import assert_same, id_of, randn
from torch import nn
from torch.utils._pytree import tree_leaves

import prelu_gpu
from prelu_gpu import reference

README = (Path(__file__).parents[2] / "README.md").read_text()

# Others' warnings are their own affair.
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error:::prelu_gpu"),
]

with contextlib.suppress(ImportError):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # A CPU build of torch cannot load the operators in the wheel, which are CUDA's, and the
        # import describes these two. Three of the packages import it; no network here calls them.
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def monai_unet(**options):
    networks = pytest.importorskip("monai.networks.nets")
    sizes = {"channels": (4, 8, 16), "strides": (2, 2), "num_res_units": 1, "dropout": 0.1}
    return networks.UNet(spatial_dims=3, in_channels=1, out_channels=2, **sizes, **options)


def monai_basic_unet(**options):
    networks = pytest.importorskip("monai.networks.nets")
    features = (4, 4, 8, 8, 16, 4)
    return networks.BasicUNet(2, 1, 2, features, **{"act": "prelu", **options})


def monai_vnet_blocks():
    """VNet's way in, its first way down and its way out; the whole has 46 million parameters."""
    vnet = pytest.importorskip("monai.networks.nets.vnet")
    return nn.Sequential(
        vnet.InputTransition(3, 1, 16, act="prelu"),
        vnet.DownTransition(3, 16, 1, act="prelu"),
        vnet.OutputTransition(3, 32, 2, act="prelu"),
    )


def facenet_pytorch_mtcnn(which):
    return getattr(pytest.importorskip("facenet_pytorch"), which)(pretrained=False)


def spandrel_compact():
    return pytest.importorskip("spandrel.architectures.Compact").Compact(num_feat=16, num_conv=2)


def torchaudio_conv_tasnet():
    return pytest.importorskip("torchaudio.models").ConvTasNet(
        num_sources=2,
        enc_num_feats=16,
        msk_num_feats=8,
        msk_num_hidden_feats=16,
        msk_num_layers=2,
        msk_num_stacks=2,
    )


def speechbrain_conv_tasnet():
    """Between encoder and decoder, channels last."""
    pytest.importorskip("torchaudio")
    mask = pytest.importorskip("speechbrain.lobes.models.conv_tasnet").MaskNet
    return mask(N=16, B=8, H=16, P=3, X=2, R=2, C=2)


def asteroid_conv_tasnet():
    sizes = {"n_filters": 16, "n_blocks": 2, "n_repeats": 2}
    channels = {"bn_chan": 8, "hid_chan": 16, "skip_chan": 8}
    return pytest.importorskip("asteroid").ConvTasNet(n_src=2, **sizes, **channels)


def torch_geometric_mlp(**options):
    return pytest.importorskip("torch_geometric.nn").MLP([8, 16, 4], **{"act": "prelu", **options})


def torch_geometric_infomax():
    """Its encoder, and so one PReLU, runs twice in a forward pass."""
    layers = pytest.importorskip("torch_geometric.nn")
    act = {"act": "prelu", "act_kwargs": {"num_parameters": 16}}
    return layers.DeepGraphInfomax(
        hidden_channels=16,
        encoder=layers.GCN(8, 16, num_layers=2, **act),
        summary=lambda z, *arguments: z.mean(dim=0).sigmoid(),
        corruption=lambda x, edges: (x[torch.randperm(len(x))], edges),
    )


def timm_network(name, **options):
    create = pytest.importorskip("timm").create_model
    return create(name, num_classes=5, **{"act_layer": "prelu", **options})


GRAPH = torch.randint(0, 40, (2, 160), generator=torch.Generator().manual_seed(0))

STACKS = {
    "monai UNet": (monai_unet, (2, 1, 8, 12, 16)),
    "monai BasicUNet": (monai_basic_unet, (2, 1, 32, 32)),
    "monai VNet's blocks": (monai_vnet_blocks, (1, 1, 8, 8, 12)),
    "facenet-pytorch PNet": (functools.partial(facenet_pytorch_mtcnn, "PNet"), (2, 3, 24, 31)),
    "facenet-pytorch RNet": (functools.partial(facenet_pytorch_mtcnn, "RNet"), (3, 3, 24, 24)),
    "facenet-pytorch ONet": (functools.partial(facenet_pytorch_mtcnn, "ONet"), (2, 3, 48, 48)),
    "spandrel Compact": (spandrel_compact, (2, 3, 13, 17)),
    "torchaudio ConvTasNet": (torchaudio_conv_tasnet, (2, 1, 600)),
    "speechbrain ConvTasNet": (speechbrain_conv_tasnet, (2, 16, 75)),
    "asteroid ConvTasNet": (asteroid_conv_tasnet, (2, 600)),
    "torch-geometric MLP": (torch_geometric_mlp, (40, 8)),
    "torch-geometric DeepGraphInfomax": (torch_geometric_infomax, (40, 8), GRAPH),
}
"""How to build a network, the shape of its input, and further inputs."""

TIMM = {
    "timm ResNet-10": (functools.partial(timm_network, "resnet10t"), (2, 3, 32, 32)),
    "timm MobileNetV3": (functools.partial(timm_network, "mobilenetv3_small_050"), (2, 3, 32, 32)),
    "timm ConvNeXt": (
        functools.partial(timm_network, "convnext_atto", depths=(1, 1, 1, 1)),
        (2, 3, 32, 32),
    ),
}
"""Likewise, of timm, whose activation is a subclass of torch.nn.PReLU with its own forward."""


def accelerated(build, network, device):
    """Another network of the same kind, switched, with the first one's state_dict."""
    other = prelu_gpu.accelerate(build()).to(device, next(network.parameters()).dtype)
    other.load_state_dict(network.state_dict())
    return contextlib.nullcontext(other)


@contextlib.contextmanager
def enabled(build, network, device):
    with prelu_gpu.enabled(device.type):
        yield network


CASES = [
    *(pytest.param(stack, accelerated, id=f"{name}-accelerated") for name, stack in STACKS.items()),
    *(
        pytest.param(stack, enabled, id=f"{name}-enabled")
        for name, stack in (STACKS | TIMM).items()
    ),
]


@pytest.fixture
def prepared(stack, dtype, device):
    """How to build a network, one whose slopes all differ, and its inputs.

    A skip, where the package is not installed. Tests ask for it before `launches`, which would miss
    the kernels then.
    """
    build, shape, *others = stack
    torch.manual_seed(0)
    network = build().to(device, dtype)
    for _, module in prelus(network):
        nn.init.uniform_(module.weight, -0.2, 0.5)
    return build, network, [randn(shape, dtype, device), *(other.to(device) for other in others)]


def prelus(network):
    return [(name, m) for name, m in network.named_modules() if isinstance(m, nn.PReLU)]


def watch(network):
    """A copy of `network`, and by the names of its slopes the (x, slope, grad_y) of their calls."""
    network, calls = copy.deepcopy(network), defaultdict(list)

    def record(name, module, arguments, output):
        x, weight = arguments[0].detach(), module.weight.detach()
        output.register_hook(lambda grad_y: calls[f"{name}.weight"].append((x, weight, grad_y)))

    for name, module in prelus(network):
        module.register_forward_hook(functools.partial(record, name))
    return network, calls


def step(network, inputs):
    """Outputs, input gradient and the parameters' gradients by name, the seed being the same."""
    torch.manual_seed(1)
    x = inputs[0].clone().requires_grad_()
    outputs = tree_leaves(network(x, *inputs[1:]))
    grad_outputs = [randn(y.shape, y.dtype, y.device, seed=i) for i, y in enumerate(outputs)]
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(outputs, (x, *parameters.values()), grad_outputs, allow_unused=True)
    return [y.detach() for y in outputs], grads[0], dict(zip(parameters, grads[1:], strict=True))


def assert_agrees(actual, expected, calls):
    """All but the slopes' gradients bit for bit.

    Those are two sums of the same products in another order: each is off by at most the bound of
    its dtype's eps and its number of summands, and by a rounding for each further call.
    """
    for y, expected_y in zip(actual[0], expected[0], strict=True):
        assert_same(y, expected_y)
    assert_same(actual[1], expected[1])
    assert actual[2].keys() == expected[2].keys() >= calls.keys()
    for name, expected_grad in expected[2].items():
        grad = actual[2][name]
        if name not in calls:
            assert (grad is None) == (expected_grad is None), name
            if grad is not None:
                assert_same(grad, expected_grad)
            continue
        bound = 0
        for x, weight, grad_y in calls[name]:
            terms = torch.where(x > 0, 0, x * grad_y).double().abs()
            others = [d for d in range(x.dim()) if weight.numel() == 1 or d != 1]
            magnitude = terms.sum(others).view_as(weight)
            bound += 2 * reference.rounding(grad_y, x, weight)
            bound += (len(calls[name]) - 1) * torch.finfo(x.dtype).eps * magnitude
        assert ((grad - expected_grad).abs() <= bound).all(), name


def assert_makes_the_same(prepared, options, launches):
    """That the network built with `options` has our modules alone, and is that of `prepared`."""
    build, network, inputs = prepared
    watched, calls = watch(network)
    expected = step(watched, inputs)
    ours = build(**options).to(inputs[0])
    assert {type(module) for _, module in prelus(ours)} == {prelu_gpu.PReLU}
    ours.load_state_dict(network.state_dict())
    actual = step(ours, inputs)
    assert_kernels_ran(launches, calls)
    assert_agrees(actual, expected, calls)


def assert_kernels_ran(launches, calls):
    number = sum(map(len, calls.values()))
    assert number > 0
    for direction in ("forward", "backward"):
        assert sum(name.endswith(direction) for name in launches) == number


every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
every_timm = pytest.mark.parametrize("stack", TIMM.values(), ids=TIMM.keys())
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=id_of)
float64 = pytest.mark.parametrize("dtype", [torch.float64], ids=id_of)


@both_dtypes
@pytest.mark.parametrize(("stack", "switch"), CASES)
def test_outputs_and_all_gradients_agree(prepared, switch, device, launches):
    build, network, inputs = prepared
    watched, calls = watch(network)
    expected = step(watched, inputs)
    assert launches == []
    with switch(build, network, device) as switched:
        actual = step(switched, inputs)
    assert_kernels_ran(launches, calls)
    assert_agrees(actual, expected, calls)


@float64
@pytest.mark.parametrize("stack", [STACKS["monai UNet"]], ids=["monai UNet"])
@pytest.mark.parametrize("switch", [accelerated, enabled])
def test_the_tensors_of_monais_data_loaders_reach_the_kernels(prepared, switch, device, launches):
    """They are of a class that carries metadata through each function of torch."""
    build, network, inputs = prepared
    meta_tensor = pytest.importorskip("monai.data").MetaTensor
    inputs = [meta_tensor(inputs[0], meta={"spacing": 2})]
    watched, calls = watch(network)
    expected = step(watched, inputs)
    with switch(build, network, device) as switched:
        actual = step(switched, inputs)
    assert_kernels_ran(launches, calls)
    (y,), (expected_y,) = actual[0], expected[0]
    assert type(y) is type(expected_y) is meta_tensor
    assert y.meta["spacing"] == 2
    assert_agrees(([y.as_tensor()], *actual[1:]), ([expected_y.as_tensor()], *expected[1:]), calls)


@float64
@every_stack
def test_the_original_network_loads_what_the_accelerated_one_saves(prepared, device):
    build, network, _ = prepared
    fast = prelu_gpu.accelerate(copy.deepcopy(network))
    original = build().to(device, torch.float64)
    original.load_state_dict(fast.state_dict())
    loaded, expected = original.state_dict(), network.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@float64
@every_timm
def test_accelerate_leaves_timms_own_class_and_names_it(prepared, caplog):
    _, network, _ = prepared
    classes = [type(module) for module in network.modules()]
    prelu_gpu.accelerate(network)
    assert [type(module) for module in network.modules()] == classes
    (message,) = caplog.messages
    for name, _ in prelus(network):
        assert f"{name} (PReLU, a subclass whose forward may differ)" in message


RECIPES = [
    pytest.param(stack, recipe, id=name)
    for recipe, names in {
        "act=(prelu_gpu.PReLU, {})": ("monai UNet", "monai BasicUNet"),
        "act=prelu_gpu.PReLU()": ("torch-geometric MLP",),
        "act_layer=lambda inplace=False: prelu_gpu.PReLU()": TIMM,
    }.items()
    for name, stack in (STACKS | TIMM).items()
    if name in names
]


@both_dtypes
@pytest.mark.parametrize(("stack", "recipe"), RECIPES)
def test_the_recipes_of_the_readme_make_the_same_network(prepared, recipe, launches):
    assert f", {recipe})" in README
    options = eval(f"dict({recipe})", {"prelu_gpu": prelu_gpu})
    assert_makes_the_same(prepared, options, launches)


@pytest.fixture
def readme(monkeypatch):
    """What the README's lines have made; MONAI's table is as it was after the test."""
    act = pytest.importorskip("monai.networks.layers").Act
    monkeypatch.setattr(act, "components", dict(act.components))
    monkeypatch.setattr(act, "__doc__", act.__doc__)
    made = {name: pytest.importorskip(name) for name in ("prelu_gpu", "timm", "torch_geometric")}
    section = README.partition("## In MONAI, timm and others")[2]
    exec(section.partition("```python\n")[2].partition("```")[0], made)
    return made


@pytest.mark.parametrize("name", ["unet", "resnet", "mlp"])
def test_the_networks_of_the_readme_have_ours_alone(name, readme):
    assert {type(module) for _, module in prelus(readme[name])} == {prelu_gpu.PReLU}


@float64
@pytest.mark.parametrize("stack", [STACKS["monai VNet's blocks"]], ids=["monai VNet's blocks"])
def test_what_monai_builds_after_the_readmes_line_is_the_same_network(prepared, readme, launches):
    assert_makes_the_same(prepared, {}, launches)
