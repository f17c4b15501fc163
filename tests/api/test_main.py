import contextlib
import re

import pytest
import torch
import torch.nn.functional as F

import prelu_gpu.__main__ as program
from prelu_gpu import composed, get_kernel_threshold, reference
from prelu_gpu.backend import Backend, has_kernels
from prelu_gpu.run import execute, intercepting


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
        (lambda x, w: composed.prelu_forward(x, w, 1) * 1.1, "prelu: wrong output"),
        (
            lambda x, w: (
                torch.where(x > 0, x, (w * x.movedim(1, -1)).movedim(-1, 1).detach()) + 0 * w.sum()
            ),
            "prelu: wrong input gradient",
        ),
        (
            lambda x, w: composed.prelu_forward(x, w.detach(), 1) + 0 * w.sum(),
            "prelu: wrong slope gradient",
        ),
    ],
)
def test_a_failing_self_check_is_told_and_is_the_exit_status(wrong, words, monkeypatch, capsys):
    monkeypatch.setattr(program, "prelu", wrong)
    assert program.main() == 1
    assert words in capsys.readouterr().out


def exact(x, weight):
    wide = torch.promote_types(x.dtype, torch.float32)
    return reference.prelu(x.to(wide), weight.to(wide)).to(x.dtype)


def not_in_place(x, slope, inplace=False):
    return F.leaky_relu(x, slope)


def wrong_in_place(x, slope, inplace=False):
    return F.leaky_relu(x, 1.1 * slope if inplace else slope, inplace)


def wrong_backward(x, slope, inplace=False):
    y = F.leaky_relu(x, slope, inplace)
    return y + 0.1 * (y - y.detach())


def failing(x, slope, inplace=False):
    raise ValueError("no\nluck")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x, slope, inplace=False: F.leaky_relu(x, 1.1 * slope), "leaky_relu: wrong output"),
        (wrong_backward, "leaky_relu: wrong input gradient"),
        (not_in_place, "leaky_relu in place: wrong output"),
        (wrong_in_place, "leaky_relu in place: wrong output"),
        (failing, "leaky_relu: failed: ValueError: no luck"),
    ],
)
def test_a_wrong_leaky_relu_is_told_in_every_dtype(wrong, words, monkeypatch, capsys):
    monkeypatch.setattr(program, "leaky_relu", wrong)
    monkeypatch.setattr(program, "prelu", exact)  # interpreted, it takes its time
    assert program.main() == 1
    assert capsys.readouterr().out.count(words) == 4 * len(program._devices())


@pytest.mark.parametrize(
    ("kernel", "result", "words"),
    [
        ("plane_norm_forward", "y_ptr", "wrong output"),
        ("column_norm_backward", "grad_x_ptr", "wrong input gradient"),
        ("finish_gradients", "grad_slope_ptr", "wrong slope gradient"),
        ("finish_moments", "running_var_ptr", "wrong running variance"),
    ],
)
def test_a_wrong_norm_kernel_is_told(kernel, result, words, force, monkeypatch, capsys):
    force()  # with a GPU's tilings, both kinds of kernel

    def wrong(call, values):
        execute(call, values)
        if call.kernel.__name__ == kernel and values[result] is not None:
            values[result].mul_(1.02)

    monkeypatch.setattr(program, "_mistakes", lambda *_: iter(()))  # PReLU alone takes its time
    with intercepting(wrong):
        assert program.main() == 1
    said = capsys.readouterr().out
    name = r"(batch_norm_prelu( in evaluation)?|instance_norm_prelu): "
    served = [device for device in program._devices() if has_kernels(device)]
    assert len(re.findall(name + words, said)) == 3 * len(served)


def test_without_kernels_norms_in_half_precision_are_not_checked(no_kernels, capsys):
    program.main()
    said = capsys.readouterr().out
    assert "self-check  float16   ok, without norms" in said
    assert "self-check  float32   ok\n" in said


def test_the_self_check_is_of_what_enable_makes_of_torch_prelu_too(monkeypatch, capsys):
    @contextlib.contextmanager
    def enabled(device_type):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "prelu", lambda x, w: x.clamp(min=0) + w[0] * x)
            yield

    monkeypatch.setattr(program, "enabled", enabled)
    assert program.main() == 1
    assert "wrong output" in capsys.readouterr().out


def test_where_there_are_no_kernels_enable_leaves_torch_prelu(no_kernels, monkeypatch, capsys):
    monkeypatch.setattr(program, "_self_check", lambda *_, **__: None)  # it takes its time
    program.main()
    assert "enable()    leaves torch.prelu as it is" in capsys.readouterr().out


def test_the_self_check_is_of_kernels_though_its_tensors_are_small(launches, threshold, capsys):
    threshold(2**22)
    assert program.main() == 0
    served = [device for device in program._devices() if has_kernels(device)]
    for direction in ("_forward", "_backward"):
        ours = [name for name in launches if name.endswith(direction) and "norm" not in name]
        assert len(ours) == len(served) * 3 * (4 * 4 + 3), (
            "three shapes, four dtypes, two functions, one of them in place too, and torch.prelu; "
            "and behind three norms in float64, which are PyTorch's"
        )
    assert get_kernel_threshold() == 2**22


def test_the_size_below_which_pytorchs_operator_serves_is_told(monkeypatch, threshold, capsys):
    threshold(4321)
    monkeypatch.setattr(program.backend, "backend_of", lambda device: Backend.TRITON)
    monkeypatch.setattr(program, "_self_check", lambda *_, **__: None)  # it takes its time
    program.main()
    assert "PyTorch operators below 4321 elements" in capsys.readouterr().out
