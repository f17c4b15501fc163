"""A machine with a GPU, stood in for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prelu_gpu.backend import INTERPRETED

ROOT = Path(__file__).parents[2]

NOT_REHEARSED = {
    "benchmarks/test_benchmarks.py::test_one_case_on_a_gpu": "torch.compile and memory",
    "benchmarks/test_benchmarks.py::test_a_replay_takes_the_device_no_longer": "time",
    "benchmarks/test_training.py::test_networks_are_timed_on_a_gpu": "torch.compile and memory",
    "host/test_faults.py::test_a_slope_on_another_device": "a second device",
    "host/test_faults.py::test_threads_on_streams_of_their_own": "threads that race",
    "kernels/test_counters.py::test_ten_thousand_repeats": "programs that race",
    "kernels/test_forward.py::test_more_than_two_to_the_31_elements": "the memory of a GPU",
    "torch/test_training_stack.py::test_networks_that_go_to_the_gpu_and_back": "a second device",
    "torch/test_training_stack.py::test_a_module_is_called[in_data_parallel]": "PyTorch's scatter",
    "torch/test_training_stack.py::test_a_module_is_called[saved_on_cpu]": "pinned memory",
}
"""Tests that need of a GPU what nothing stands in for."""


class Machine:
    """A bare checkout, where README's commands find the stand-in as a machine's own packages."""

    def __init__(self, folder):
        self.folder = folder / "prelu_gpu"
        self.out = self.folder / "out"
        left = shutil.ignore_patterns(".git", ".venv*", "out", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.folder, symlinks=True, ignore=left)

    def run(self, command, *options, minutes=None):
        """Runs a command, for other minutes than its own; gives its status and all it said."""
        if minutes:
            command = re.sub(r"MINUTES=\d+", f"MINUTES={minutes}", command)
        deselected = (f"--deselect=tests/{name}" for name in NOT_REHEARSED)
        stand_in = self.folder / "tests/rehearsal"
        path = (stand_in / "bin", Path(sys.executable).parent, os.environ["PATH"])
        done = subprocess.run(
            ["bash", "-c", " ".join(['M="make PYTHON=python3 RESULTS=out";', command, *options])],
            cwd=self.folder,
            env={
                "PATH": os.pathsep.join(map(str, path)),
                "HOME": os.environ["HOME"],
                "PYTHONPATH": str(stand_in),
                "PYTHONUNBUFFERED": "1",
                "PRELU_GPU_COMMIT": "abc123",
                "PYTEST_ADDOPTS": " ".join(["-W default", *deselected]),
                "OMP_NUM_THREADS": "1",  # tensors are small
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        return done.returncode, done.stdout

    def rows(self, suffix):
        """A results file."""
        import pandas as pd  # of the benchmarks only

        return pd.read_csv(self.out / f"emulated-h100{suffix}.csv")

    def edit(self, path, old, new):
        """Changes a file of the checkout."""
        text = (self.folder / path).read_text()
        assert old in text
        (self.folder / path).write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return lend(tmp_path_factory.mktemp("machine"))


@pytest.fixture
def broken(tmp_path):
    """A machine of its own, to plant faults."""
    return lend(tmp_path)


def lend(folder):
    if not INTERPRETED:
        pytest.skip("kernels run here as they are, or not at all")
    return Machine(folder)
