from unittest import mock

import pytest
import torch

import prelu_gpu.__main__ as program
from prelu_gpu import eager, functional
from prelu_gpu.backend import Backend


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
        (lambda x, w: eager.prelu(x, w, 1) * 1.1, "wrong forward"),
        (
            lambda x, w: (
                torch.where(x > 0, x, (w * x.movedim(1, -1)).movedim(-1, 1).detach()) + 0 * w.sum()
            ),
            "wrong input gradient",
        ),
        (lambda x, w: eager.prelu(x, w.detach(), 1) + 0 * w.sum(), "wrong slope gradient"),
    ],
)
def test_a_failing_self_check_is_told_and_is_the_exit_status(wrong, words, monkeypatch, capsys):
    monkeypatch.setattr(program, "prelu", wrong)
    assert program.main() == 1
    assert words in capsys.readouterr().out


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
    forwards = [name for name in launches if name.endswith("_forward")]
    assert len(forwards) == len(program._devices()) * 3 * 4 * 2, (
        "three shapes, four dtypes, ours and torch.prelu"
    )
    assert functional.EAGER_BELOW == 2**22


def test_the_size_below_which_pytorchs_operator_serves_is_told(monkeypatch, capsys):
    monkeypatch.setattr(functional, "EAGER_BELOW", 4321)
    monkeypatch.setattr(program, "backend", lambda device: Backend.TRITON)
    program.main()
    assert "PyTorch operators below 4321 elements" in capsys.readouterr().out
