"""The program that compute-sanitizer watches launches what it says."""

import pytest
import sanitize
import torch


def test_every_kind_of_kernel_runs_and_is_checked(launches, capsys):
    sanitize.main()
    # Leaky ReLU in place and not, beside PReLU with each reduction.
    choices = len(sanitize.CASES) * len(sanitize.DTYPES) * (len(sanitize.REDUCTIONS) + 2)
    made = choices + len(sanitize.NORMS)
    assert capsys.readouterr().out.startswith(f"{made} forwards and backwards are right on")
    kernels = {"plane_forward", "plane_backward", "column_forward", "column_backward"}
    walks = ("moments", "norm_forward", "norm_backward")
    norms = {f"{kind}_{walk}" for kind in ("plane", "column") for walk in walks}
    finishers = {"sum_partials", "finish_moments", "finish_gradients"}
    assert set(launches) == kernels | norms | finishers
    plain = {"plane_backward", "column_backward"}
    assert sum(name in plain for name in launches) == choices


def test_a_wrong_result_is_an_error(monkeypatch, device):
    monkeypatch.setattr(sanitize, "prelu", lambda x, weight: torch.prelu(x.float(), weight * 2))
    with pytest.raises(AssertionError, match=r"column, torch\.float32, atomic"):
        sanitize.check("column", torch.float32, "atomic", device)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_leaky_relu_is_an_error(inplace, monkeypatch, device):
    monkeypatch.setattr(sanitize, "leaky_relu", lambda x, *_: x * 0.5)
    with pytest.raises(AssertionError, match=f"plane.*Leaky ReLU, in place: {inplace}"):
        sanitize.check_leaky_relu("plane", torch.float32, inplace, device)


def test_a_wrong_norm_is_an_error(monkeypatch, device):
    def wrong(x, slope, mean, variance, weight, bias, training):
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, training, eps=0.1)

    monkeypatch.setattr(sanitize, "batch_norm_prelu", wrong)
    with pytest.raises(AssertionError, match=r"column, torch\.float32, batch"):
        sanitize.check_norm("column", torch.float32, "batch", device)
