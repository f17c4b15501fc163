from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import prelu_gpu.__main__ as program
from prelu_gpu import eager, functional
from prelu_gpu.backend import Backend, backend


def test_reports_versions_backends_and_a_self_check(capsys):
    assert program.main() == 0
    out = capsys.readouterr().out
    assert f"prelu_gpu {program.__version__}, torch {torch.__version__}, triton" in out
    assert "Triton kernels" in out
    assert "enable()    serves torch.prelu too" in out
    for dtype in ("float32", "float16", "bfloat16", "float64"):
        assert f"self-check  {dtype:10}ok" in out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x, w: eager.prelu(x, w, 1) * 1.1, "prelu: wrong forward"),
        (
            lambda x, w: (
                torch.where(x > 0, x, (w * x.movedim(1, -1)).movedim(-1, 1).detach()) + 0 * w.sum()
            ),
            "prelu: wrong input gradient",
        ),
        (lambda x, w: eager.prelu(x, w.detach(), 1) + 0 * w.sum(), "prelu: wrong slope gradient"),
    ],
)
def test_a_failing_self_check_is_told_and_is_the_exit_status(wrong, words, monkeypatch, capsys):
    monkeypatch.setattr(program, "prelu", wrong)
    assert program.main() == 1
    assert words in capsys.readouterr().out


def not_in_place(x, slope, inplace=False):
    return F.leaky_relu(x, slope)


def wrong_in_place(x, slope, inplace=False):
    return F.leaky_relu(x, 1.1 * slope if inplace else slope, inplace)


def wrong_backward(x, slope, inplace=False):
    y = F.leaky_relu(x, slope, inplace)
    return 1.1 * y - 0.1 * y.detach()


def failing(x, slope, inplace=False):
    raise ValueError("no\nluck")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x, slope, inplace=False: F.leaky_relu(x, 1.1 * slope), "leaky_relu: wrong forward"),
        (wrong_backward, "leaky_relu: wrong input gradient"),
        (not_in_place, "leaky_relu in place: wrong forward"),
        (wrong_in_place, "leaky_relu in place: wrong forward"),
        (failing, "leaky_relu: failed: ValueError: no luck"),
    ],
)
def test_a_wrong_leaky_relu_is_told_in_every_dtype(wrong, words, monkeypatch, capsys):
    monkeypatch.setattr(program, "leaky_relu", wrong)
    monkeypatch.setattr(program, "prelu", torch.prelu)  # interpreted, it takes its time
    assert program.main() == 1
    assert capsys.readouterr().out.count(words) == 4 * len(program._devices())


def test_the_self_check_is_of_what_enable_makes_of_torch_prelu_too(monkeypatch, capsys):
    wrong = mock.patch.object(torch, "prelu", lambda x, w: x.clamp(min=0) + w[0] * x)
    monkeypatch.setattr(program, "enabled", lambda device_type: wrong)
    assert program.main() == 1
    assert "wrong forward" in capsys.readouterr().out


def test_where_there_are_no_kernels_enable_leaves_torch_prelu(monkeypatch, capsys):
    monkeypatch.setattr(program, "backend", lambda device: Backend.EAGER)
    program.main()
    assert "enable()    leaves torch.prelu as it is" in capsys.readouterr().out


def test_the_self_check_is_of_kernels_though_its_tensors_are_small(launches, monkeypatch, capsys):
    monkeypatch.setattr(functional, "EAGER_BELOW", 2**22)
    assert program.main() == 0
    served = [device for device in program._devices() if backend(device) is not Backend.EAGER]
    for direction in ("_forward", "_backward"):
        ours = [name for name in launches if name.endswith(direction)]
        assert len(ours) == len(served) * 3 * 4 * 4, (
            "three shapes, four dtypes, two functions, one of them in place too, and torch.prelu"
        )
    assert functional.EAGER_BELOW == 2**22


def test_the_size_below_which_pytorchs_operator_serves_is_told(monkeypatch, capsys):
    monkeypatch.setattr(functional, "EAGER_BELOW", 4321)
    monkeypatch.setattr(program, "backend", lambda device: Backend.TRITON)
    program.main()
    assert "PyTorch operators below 4321 elements" in capsys.readouterr().out
