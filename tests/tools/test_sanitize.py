"""The program that compute-sanitizer watches launches what it says."""

import pytest
import sanitize
import torch


def test_every_kind_of_kernel_runs_and_is_checked(launches, capsys):
    sanitize.main()
    # Leaky ReLU in place and not, beside PReLU with each reduction.
    choices = len(sanitize.CASES) * len(sanitize.DTYPES) * (len(sanitize.REDUCTIONS) + 2)
    assert capsys.readouterr().out.startswith(f"{choices} forwards and backwards are right on")
    kernels = {"plane_forward", "plane_backward", "column_forward", "column_backward"}
    assert set(launches) == {*kernels, "sum_partials"}
    assert sum(name.endswith("_backward") for name in launches) == choices


def test_a_wrong_result_is_an_error(monkeypatch, device):
    monkeypatch.setattr(sanitize, "prelu", lambda x, weight: torch.prelu(x.float(), weight * 2))
    with pytest.raises(AssertionError, match=r"column, torch\.float32, atomic"):
        sanitize.check("column", torch.float32, "atomic", device)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_leaky_relu_is_an_error(inplace, monkeypatch, device):
    monkeypatch.setattr(sanitize, "leaky_relu", lambda x, *_: x * 0.5)
    with pytest.raises(AssertionError, match=f"plane.*Leaky ReLU, in place: {inplace}"):
        sanitize.check_leaky_relu("plane", torch.float32, inplace, device)
