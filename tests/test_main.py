import pytest
import torch

import prelu_gpu.__main__ as program
from prelu_gpu import eager


def test_reports_versions_backends_and_a_self_check(capsys):
    assert program.main() == 0
    out = capsys.readouterr().out
    assert f"prelu_gpu {program.__version__}, torch {torch.__version__}, triton" in out
    assert "Triton kernels" in out
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
