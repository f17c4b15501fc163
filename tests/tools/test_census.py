"""Every kernel that a public call can launch compiles, for GPUs that need not be there.

`make test-full` also compiles them for every alignment and special size on sm_90, and every set of
constants for the other targets.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton compiles the kernels; it is not installed")
pytest.importorskip("hypothesis")
pytest.importorskip("rich")
pytest.importorskip("typer")
if sys.platform != "linux":
    pytest.skip("Triton makes machine code on Linux only", allow_module_level=True)

import calls
import census
from hypothesis import given
from test_property import leaky_relu_cases, prelu_cases

from prelu_gpu import leaky_relu, prelu

ROOT = Path(__file__).parents[2]
KERNELS = {
    *("column_forward", "column_backward", "plane_forward", "plane_backward", "sum_partials"),
    *("column_moments", "column_norm_forward", "column_norm_backward"),
    *("plane_moments", "plane_norm_forward", "plane_norm_backward"),
    *("finish_moments", "finish_gradients"),
}


def taken(*options, root=ROOT):
    """The census, by a process whose kernels are not interpreted."""
    return subprocess.run(
        [sys.executable, "tests/tools/census.py", *options],
        cwd=root,
        env={name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=3600,
    )


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "sm_100", "gfx942"])
def test_every_kernel_compiles_and_every_branch_is_taken(target, request):
    full = request.config.getoption("--hypothesis-profile") == "full"
    if target in ("sm_80", "sm_100") and not full:
        pytest.skip("Triton's code for it is sm_90's; test_machine_code.py compiles some of it")
    detail = "each" if not full else "full" if target == "sm_90" else "sets"
    done = taken("--target", target, "--detail", detail)
    assert done.returncode == 0, done.stderr
    *compiled, _ = done.stdout.splitlines()
    assert {line.split()[1] for line in compiled} == KERNELS


FAULTS = {
    # Python returns, and Triton compiles what follows.
    "weight = tl.full(": "return tl.full(",
    # Known when a kernel is compiled, though nothing in it looks like a constant.
    "return values.to(COMPUTE)": "return values if values.dtype.is_int() else values.to(COMPUTE)",
}


def test_a_kernel_that_does_not_compile_and_a_branch_that_nothing_takes_are_named(tmp_path):
    for folder in ("benchmarks", "kernels", "prelu_gpu", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    formula = tmp_path / "kernels" / "formula.py"
    code = formula.read_text()
    for right, wrong in FAULTS.items():
        assert right in code
        code = code.replace(right, wrong)
    formula.write_text(code)
    done = taken("--detail", "each", "--entrance", "leaky_relu", root=tmp_path)
    assert done.returncode == 1
    assert "plane_forward (float32 None float32)" in done.stderr
    assert "does not compile, called by leaky_relu: " in done.stderr
    assert "sum_partials is compiled nowhere" in done.stderr
    assert ": values.dtype.is_int() is compiled nowhere" in done.stderr


@pytest.fixture(scope="module")
def known():
    """The kernels of the census, by their compile-time branches."""
    variants = set()

    def note(entrance, call, values):
        variants.add(census.variant(call, values))

    calls.call_all(note, "sm_90", census.memories(census.Detail.SETS))
    return {(one.kernel, one.choices) for one in variants}


def missing(known, call):
    """Kernels that a call launches and the census has not."""
    variants = []

    def note(call, values):
        variants.append(census.variant(call, values))

    with calls.launches_go_to(note):
        call()
    return [str(one) for one in variants if (one.kernel, one.choices) not in known]


@given(case=prelu_cases())
def test_no_call_of_prelu_launches_what_the_census_has_not(case, known):
    dtypes = (*case.dtypes, case.dtypes[0])
    layouts = (case.x, case.weight, case.grad_y)
    x, weight, grad_y = (
        layout.of(torch.empty(layout.memory, dtype=dtype))
        for layout, dtype in zip(layouts, dtypes, strict=True)
    )

    def call():
        y = prelu(
            x.requires_grad_(case.requires_grad[0]),
            weight.requires_grad_(case.requires_grad[1]),
            dim=case.dim,
        )
        if y.requires_grad:
            y.backward(grad_y)

    assert not missing(known, call)


@given(case=leaky_relu_cases())
def test_no_call_of_leaky_relu_launches_what_the_census_has_not(case, known):
    x, grad_y = (
        layout.of(torch.empty(layout.memory, dtype=case.dtype)) for layout in (case.x, case.grad_y)
    )

    def call():
        y = leaky_relu(x.requires_grad_(case.requires_grad), case.negative_slope)
        if y.requires_grad:
            y.backward(grad_y)

    assert not missing(known, call)
