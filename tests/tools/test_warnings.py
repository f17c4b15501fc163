"""What a GPU decides: whose warnings fail a test, and that kernels are not emulated beside it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import warnings

def test_of_others():
    warnings.warn("NumPy says so", DeprecationWarning)

def test_ours():
    warnings.warn_explicit("we say so", UserWarning, "functional.py", 1, "prelu_gpu.functional")
"""
# PyTorch finds a GPU, or none; packages warn when conftest.py imports them, and what they need.
PROGRAM = """
import builtins, sys, warnings
import pytest, torch

def importing(name, scope=None, *arguments):
    if (name, scope and scope["__name__"]) in IMPORTS:
        warnings.warn(f"{name} says so", FutureWarning)
    return import_(name, scope, *arguments)

IMPORTS = ("torch", "conftest"), ("triton", "prelu_gpu.backend")
import_, builtins.__import__ = builtins.__import__, importing
gpu, *options = sys.argv[1:]
torch.cuda.is_available = lambda: gpu == "True"
sys.exit(pytest.main(options))
"""


def run(gpu, folder, *options):
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "test_two.py").write_text(TESTS)
    options = *options, "-c", ROOT / "pyproject.toml", "--rootdir", folder, "-p", "no:cacheprovider"
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(gpu), "-rA", *options, folder],
        env=os.environ | {"PYTHONPATH": path, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("gpu", "others"), [(True, "PASSED"), (False, "FAILED")])
def test_warnings_of_other_packages_fail_no_test_on_a_gpu_machine(gpu, others, tmp_path):
    done = run(gpu, tmp_path)
    outcomes = {
        name: outcome
        for outcome, name in re.findall(r"^(PASSED|FAILED) .*::(\w+)", done.stdout, re.MULTILINE)
    }
    assert outcomes == {"test_of_others": others, "test_ours": "FAILED"}, done.stdout + done.stderr
    for package in ("torch", "triton"):
        assert f"{package} says so" in done.stdout


def test_the_emulator_is_refused_on_a_gpu_machine(tmp_path):
    done = run(True, tmp_path, "--compiled")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--compiled is for machines without a GPU" in done.stderr
