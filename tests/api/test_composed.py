"""PyTorch's operators, which serve devices without kernels."""

import pytest
import torch
from support import PAIRS, assert_same, backward, id_of, randn, run_program

from prelu_gpu import composed, leaky_relu, prelu
from prelu_gpu.backend import Backend, backend_of


@pytest.mark.parametrize("dtypes", PAIRS, ids=id_of)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_prelu_is_the_formula(dtypes, dim):
    x = randn((4, 5, 6), dtypes[0], "cpu")
    weight = randn((x.shape[dim],), dtypes[1], "cpu", seed=1)
    shape = [-1 if d == dim % 3 else 1 for d in range(3)]
    wide = torch.where(x > 0, x.double(), weight.double().view(shape) * x.double())
    # Products of 8 or 11 bits by 24 are exact in float64 and rounded once more in float32.
    expected = wide if dtypes[0] == torch.float64 else wide.float()
    assert_same(composed.prelu_forward(x, weight, dim % 3), expected.to(dtypes[0]))


@pytest.mark.parametrize("dim", range(4))
def test_gradients_along_every_dim(dim):
    x, grad_y = (randn((2, 3, 4, 5), torch.float64, "cpu", seed) for seed in (0, 1))
    weight = randn((x.shape[dim],), torch.float64, "cpu", seed=2)
    y, grad_x, grad_weight = backward(composed.prelu_forward, x, weight, grad_y, dim)
    slopes = weight.view([-1 if d == dim else 1 for d in range(4)])
    assert torch.equal(y, torch.where(x > 0, x, slopes * x))
    assert torch.equal(grad_x, torch.where(x > 0, grad_y, slopes * grad_y))
    again = composed.prelu_backward(grad_y, x, weight, dim, (True, True))
    torch.testing.assert_close(again, (grad_x, grad_weight))
    assert composed.prelu_backward(grad_y, x, weight, dim, (False, False)) == (None, None)


def test_meta_tensors_have_shapes():
    y = prelu(torch.empty(2, 3, device="meta"), torch.empty(3, device="meta"))
    assert y.shape == (2, 3)
    assert backend_of(y.device) is Backend.PYTORCH
    assert leaky_relu(y).is_meta


WITHOUT_KERNELS = """
import sys
{setup}
import torch, prelu_gpu
from prelu_gpu.backend import Backend, backend_of
assert backend_of(torch.device("cpu")) is Backend.PYTORCH
assert "prelu_gpu.launch" not in sys.modules or {triton}
x = torch.randn(2, 3, 4, requires_grad=True)
model = prelu_gpu.accelerate(torch.nn.Sequential(torch.nn.PReLU(3), prelu_gpu.LeakyReLU(0.2)))
y = model(x)
assert torch.equal(y, torch.nn.functional.leaky_relu(torch.prelu(x, model[0].weight), 0.2))
y.sum().backward()
assert x.grad is not None and model[0].weight.grad is not None
y = prelu_gpu.PReLU(4, dim=-1)(x.half())
assert y.dtype == torch.float16
from prelu_gpu.__main__ import main
sys.exit(main())
"""


AUTOCAST_WITHOUT_KERNELS = """
import copy, torch, prelu_gpu
from torch import nn
torch.manual_seed(0)
x = torch.randn(4, 8, 5, 5)


def step(model, dtype):
    saved = {}
    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", dtype), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(leaf)
    y.float().square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [y.detach(), leaf.grad, *gradients], sum(saved.values())


for slopes in 1, 8:
    plain = nn.Sequential(nn.Conv2d(8, 8, 1), nn.PReLU(slopes, init=0.1234))
    for model in plain, plain[1:]:
        for dtype in torch.bfloat16, torch.float16:
            expected, saved = step(model, dtype)
            given, saved_by_ours = step(prelu_gpu.accelerate(copy.deepcopy(model)), dtype)
            assert all(map(torch.equal, given, expected)), (slopes, dtype)
            assert saved_by_ours == saved, (saved_by_ours, saved)
    for model in (
        prelu_gpu.PReLU(5 if slopes > 1 else 1, init=0.1234, dim=-1),
        prelu_gpu.SharedAxesPReLU((8, 5, 5), [2, 3], init=0.1234),
    ):
        given, saved_by_ours = step(model, dtype)
        assert torch.equal(given[0], expected[0]), model
        compiled, _ = step(torch.compile(model, backend="eager", fullgraph=True), dtype)
        assert torch.equal(compiled[0], expected[0]), model
        assert saved_by_ours == 2 * (x.numel() + model.weight.numel()), (model, saved_by_ours)
print("done")
"""


def test_autocast_without_kernels_gives_and_saves_what_pytorchs_does():
    assert run_program(AUTOCAST_WITHOUT_KERNELS, interpret=False)[0] == "done\n"


@pytest.mark.parametrize(
    ("setup", "triton", "words"),
    [
        ("sys.modules['triton'] = None", False, "triton cannot be imported"),
        ("", True, "Triton has no kernels for cpu"),
    ],
    ids=["without triton", "cpu"],
)
def test_import_and_use_without_kernels(setup, triton, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    program = WITHOUT_KERNELS.format(setup=setup, triton=triton)
    assert f"PyTorch operators ({words}" in run_program(program, interpret=False)[0]
