"""Parameter groups: slopes without weight decay."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from support import randn
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.distributed.fake_pg import FakeStore

import prelu_gpu
from prelu_gpu import parameter_groups

DECAY = 0.1


class OwnPReLU(nn.PReLU):
    """A subclass with a parameter and a layer that are no slopes."""

    def __init__(self):
        super().__init__(3)
        self.shift = nn.Parameter(torch.zeros(3))
        self.weight_of_shift = nn.Parameter(torch.zeros(3))
        self.gate = nn.Linear(3, 3)


class Scale(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return weight * self.factor


def parametrised(module, parametrisation=None):
    return parametrize.register_parametrization(module, "weight", parametrisation or Scale())


def pruned(module):
    return prune.random_unstructured(module, "weight", 1)


def weight_normed_by_hooks(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


KINDS = {
    "nn.PReLU": (lambda: nn.PReLU(3), ["weight"]),
    "PReLU": (lambda: prelu_gpu.PReLU(3, dim=-1), ["weight"]),
    "accelerated": (lambda: prelu_gpu.accelerate(nn.PReLU()), ["weight"]),
    "SharedAxesPReLU": (lambda: prelu_gpu.SharedAxesPReLU((3, 4), 2), ["weight"]),
    "subclass": (OwnPReLU, ["weight"]),
    "parametrised": (lambda: parametrised(nn.PReLU(3)), ["parametrizations.weight.original"]),
    "parametrised SharedAxesPReLU": (
        lambda: parametrised(prelu_gpu.SharedAxesPReLU((3,))),
        ["parametrizations.weight.original"],
    ),
    "weight_norm": (
        lambda: parametrizations.weight_norm(prelu_gpu.PReLU(3)),
        ["parametrizations.weight.original0", "parametrizations.weight.original1"],
    ),
    "weight_norm by hooks": (
        lambda: weight_normed_by_hooks(nn.PReLU(3)),
        ["weight_g", "weight_v"],
    ),
    "pruned": (lambda: pruned(nn.PReLU(3)), ["weight_orig"]),
    "no PReLU": (lambda: nn.LayerNorm(3), []),
}


def names(model, group):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize(("make", "slopes"), KINDS.values(), ids=KINDS)
def test_slopes_and_nothing_else_are_without_decay(make, slopes):
    model = nn.Sequential(nn.Linear(3, 3), make(), nn.BatchNorm1d(3))
    others, without_decay = parameter_groups(model, weight_decay=DECAY)
    assert names(model, without_decay) == [f"1.{name}" for name in slopes]
    rest = [
        name for name, _ in model.named_parameters() if name[2:] not in slopes or name[0] != "1"
    ]
    assert names(model, others) == rest
    assert (others["weight_decay"], without_decay["weight_decay"]) == (DECAY, 0.0)
    # A model that is one itself.
    root = make()
    assert names(root, parameter_groups(root, DECAY)[1]) == slopes


def test_shared_modules_and_tied_slopes_are_there_once():
    model = nn.Sequential(nn.PReLU(3), nn.Linear(3, 3), prelu_gpu.PReLU(3), nn.LayerNorm(3))
    model.append(model[0])
    model[2].weight = model[0].weight
    model[3].bias = model[0].weight  # a slope wherever else it is used
    others, slopes = parameter_groups(model, DECAY)
    assert names(model, slopes) == ["0.weight"]
    assert names(model, others) == ["1.weight", "1.bias", "3.weight"]


def test_frozen_parameters_stay_in_their_groups():
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU()).requires_grad_(False)
    others, slopes = parameter_groups(model, DECAY)
    assert names(model, others) == ["0.weight", "0.bias"]
    assert names(model, slopes) == ["1.weight"]


@pytest.fixture
def process_group():
    """Of one process, which sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, nn.parallel.DistributedDataParallel],
    ids=lambda wrap: wrap.__name__,
)
def test_wrapped_models_have_the_groups_of_the_model(wrap, device):
    model = nn.Sequential(nn.Linear(3, 3), prelu_gpu.PReLU(3), nn.Linear(3, 3), nn.PReLU())
    model.to(device)
    alone, wrapped = parameter_groups(model, DECAY), parameter_groups(wrap(model), DECAY)
    for group, expected in zip(wrapped, alone, strict=True):
        assert list(map(id, group["params"])) == list(map(id, expected["params"]))


def test_the_order_is_that_of_parameters_and_so_states_of_optimisers_load():
    model = nn.Sequential(*(make() for make, _ in KINDS.values()))
    for group in parameter_groups(model, DECAY):
        wanted = [n for n, _ in model.named_parameters() if n in names(model, group)]
        assert names(model, group) == wanted
    plain = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3))
    fast = prelu_gpu.accelerate(copy.deepcopy(plain))
    optimizers = [torch.optim.Adam(parameter_groups(m, DECAY)) for m in (plain, fast)]
    plain(randn((8, 3), torch.float32, "cpu")).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    averages = [
        [optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()]
        for optimizer, model in zip(optimizers, (plain, fast), strict=True)
    ]
    for saved, loaded in zip(*averages, strict=True):
        assert saved.any()
        assert torch.equal(loaded, saved)


@pytest.mark.parametrize(
    "name",
    ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adafactor"],
)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(3, 3), nn.PReLU(3)), nn.Linear(3, 3), nn.PReLU(3)],
    ids=["both", "no slopes", "slopes alone"],
)
def test_optimisers_decay_what_is_no_slope(name, foreach, model, device):
    """A gradient of zero leaves the decay, with either group empty."""
    model = copy.deepcopy(model).to(device)
    groups = parameter_groups(model, DECAY)
    optimizer = getattr(torch.optim, name)(groups, lr=0.1, foreach=foreach)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])
    before = copy.deepcopy(groups)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    schedule.step()
    (others, others_before), (slopes, slopes_before) = zip(groups, before, strict=True)
    for parameter, old in zip(others["params"], others_before["params"], strict=True):
        assert not torch.equal(parameter, old)
    for parameter, old in zip(slopes["params"], slopes_before["params"], strict=True):
        assert torch.equal(parameter, old)
    assert schedule.get_last_lr() == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize(
    ("model", "weight_decay", "error", "words"),
    [
        (
            nn.PReLU().state_dict(),
            0.1,
            TypeError,
            "must be a torch.nn.Module, not OrderedDict. Pass",
        ),
        (nn.PReLU(), "0.1", TypeError, "argument 'weight_decay' must be float, not str"),
        (nn.PReLU(), None, TypeError, "argument 'weight_decay' must be float, not NoneType"),
        (nn.PReLU(), -0.1, ValueError, "Invalid weight_decay value: -0.1"),
        (nn.PReLU(), float("nan"), ValueError, "Invalid weight_decay value: nan"),
        (nn.ReLU(), 0.1, ValueError, "optimizer got an empty parameter list: ReLU has no param"),
    ],
    ids=["a state_dict", "text", "none", "negative", "nan", "no parameters"],
)
def test_bad_arguments(model, weight_decay, error, words):
    with pytest.raises(error, match=words):
        parameter_groups(model, weight_decay)


def test_errors_of_values_are_in_pytorchs_words():
    for groups, decay, words in (([torch.ones(1)], -0.1, "Invalid"), ([], 0.1, "empty")):
        with pytest.raises(ValueError, match=words) as theirs:
            torch.optim.Adam(groups, weight_decay=decay)
        with pytest.raises(ValueError, match=words) as ours:
            parameter_groups(nn.PReLU() if groups else nn.ReLU(), decay)
        assert str(ours.value).startswith(str(theirs.value))
