"""The table of what training steps move, and its parts; `make test-full` counts all of it again."""

import re
import sys

import pandas as pd
import pytest
import torch
from support import run_program

pytest.importorskip("triton", reason="Inductor generates code for Triton; it is not installed")
pytest.importorskip("typer")
if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from torch import nn

from benchmarks import traffic
from benchmarks.inductor import Kernel, read_kernels


def test_readmes_table_is_the_files():
    (table,) = traffic.BETWEEN_MARKERS.findall(traffic.README.read_text())
    rows = pd.read_csv(traffic.FILE)
    assert table == traffic.readme_block(rows)
    (version,) = re.findall(r"Inductor (\d+\.\d+)", traffic.README.read_text())
    assert set(rows["torch"].str.rpartition(".")[0]) == {version}


def test_the_installed_versions_do_what_the_table_says(request):
    if request.config.getoption("--hypothesis-profile", default="") != "full":
        pytest.skip("minutes: make test-full")
    run_program("from benchmarks.__main__ import main; main(['traffic'])", **PROCESS, timeout=1800)


PROCESS = {"interpret": False, "CUDA_VISIBLE_DEVICES": ""}
STEPS = """
import torch, prelu_gpu
from torch import nn
from benchmarks.traffic import Case, count

class Twice(nn.PReLU):
    def forward(self, x):
        return super().forward(super().forward(x))

class OurTwice(prelu_gpu.PReLU):
    forward = Twice.forward

def twice(of):
    return (Twice if of is nn else OurTwice)

prelu = lambda of, dtype: {make}
case = Case("", {shape}, prelu, torch.float32)
if __name__ == "__main__":
    (row,) = count({provider!r}, [case])
    print(*[getattr(row, name) for name in row.__dataclass_fields__][3:])
"""


def counted(provider, make, shape):
    """Reads and writes forward, and backward; launches of both; units of x saved."""
    printed, _ = run_program(STEPS.format(make=make, shape=shape, provider=provider), **PROCESS)
    return [float(number) for number in printed.split()]
