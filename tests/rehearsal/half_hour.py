"""The first half hour with a GPU, on a machine without one: `make rehearse`.

README.md has its commands. Each runs here in a bare checkout with the stand-in on its PYTHONPATH,
and what it wrote is looked at. Then kernels and results are made wrong, and every command must say
so.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.cases import CORE, is_in
from benchmarks.workloads import WORKLOADS
from prelu_gpu.backend import INTERPRETED

ROOT = Path(__file__).parents[2]

SELF_CHECK = "python3 -m prelu_gpu"
MARKED = "$M gpu-check-marked MINUTES=7"
TESTS = "$M gpu-check-tests MINUTES=4"
CORE_CASES = "$M gpu-check-core MINUTES=6"
MODELS = "$M gpu-check-models MINUTES=5"
STEPS = "$M gpu-check-steps MINUTES=4"
SANITIZER = "$M gpu-check-sanitizer"
HALF_HOUR = (SELF_CHECK, MARKED, TESTS, CORE_CASES, MODELS, STEPS, SANITIZER)

CHOICE = ("api/test_main.py", "host/test_launch.py", "kernels/test_guards.py")
"""Of the tests that need no GPU, as all of them would take hours."""

NOT_REHEARSED = {
    "benchmarks/test_benchmarks.py::test_one_case_on_a_gpu": "torch.compile and memory",
    "benchmarks/test_benchmarks.py::test_a_replay_takes_the_device_no_longer": "time",
    "benchmarks/test_training.py::test_networks_are_timed_on_a_gpu": "torch.compile and memory",
    "host/test_faults.py::test_a_slope_on_another_device": "a second device",
    "host/test_faults.py::test_threads_on_streams_of_their_own": "threads that race",
    "kernels/test_counters.py::test_ten_thousand_repeats": "programs that race",
    "kernels/test_forward.py::test_more_than_two_to_the_31_elements": "the memory of a GPU",
    "torch/test_training_stack.py::test_networks_that_go_to_the_gpu_and_back": "a second device",
}
"""Tests that need of a GPU what nothing stands in for."""

PROVIDERS = {"prelu_gpu", "eager", "copy"}

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run here without a stand-in")


class Machine:
    """A bare checkout, where commands see the stand-in and no other environment."""

    def __init__(self, folder):
        self.folder = folder / "prelu_gpu"
        self.out = self.folder / "out"
        left = shutil.ignore_patterns(".git", ".venv*", "out", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, self.folder, symlinks=True, ignore=left)

    def run(self, command, *options, minutes=None):
        """Runs a command, for other minutes than its own; gives its status and all it said."""
        if minutes:
            command = re.sub(r"MINUTES=\d+", f"MINUTES={minutes}", command)
        command = command.replace("$M", "make PYTHON=python3 RESULTS=out")
        deselected = (f"--deselect=tests/{name}" for name in NOT_REHEARSED)
        stand_in = self.folder / "tests/rehearsal"
        interpreter = Path(sys.executable).parent
        done = subprocess.run(
            ["bash", "-c", " ".join([command.replace("python3", sys.executable), *options])],
            cwd=self.folder,
            env={
                "PATH": f"{stand_in / 'bin'}:{interpreter}:{os.environ['PATH']}",
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
        return pd.read_csv(self.out / f"emulated-h100{suffix}.csv")

    def edit(self, path, old, new):
        """Changes a file of the checkout."""
        text = (self.folder / path).read_text()
        assert old in text
        (self.folder / path).write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return Machine(tmp_path_factory.mktemp("half_hour"))


@pytest.fixture
def broken(tmp_path):
    """A machine of its own, to plant faults."""
    return Machine(tmp_path)


def columns(rows, *names):
    return set(rows[list(names)].itertuples(index=False, name=None))


def assert_plotted(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_readme_has_these_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [re.sub(r"  +#.*", "", line) for line in readme.splitlines()]
    assert [line for line in commands if line in HALF_HOUR] == list(HALF_HOUR)


def test_the_self_check(machine):
    status, said = machine.run(SELF_CHECK)
    assert status == 0, said
    _, said = said.split("cuda:0: Emulated H100\n")
    assert "runs on     Triton kernels\n" in said
    assert said.count(" ok\n") == 4


def test_the_tests_that_only_a_gpu_can_run(machine):
    status, said = machine.run(MARKED, minutes=14)
    assert status == 0, said
    assert re.search(r"\n\d+ passed, 1 skipped, \d+ deselected", said), said
    assert "torch.compile is not rehearsed" in said
    assert said.endswith((machine.out / "tests.txt").read_text())


def test_tests_that_need_no_gpu(machine):
    paths = " ".join(f"tests/{path}" for path in CHOICE)
    status, said = machine.run(TESTS, f"TEST_OPTIONS='-n 2 --dist load {paths}'", minutes=14)
    assert status == 0, said
    assert re.search(r"\n\d+ passed", (machine.out / "tests.txt").read_text())


def test_core_cases(machine):
    status, said = machine.run(CORE_CASES, minutes=14)
    assert status, "torch.compile is not rehearsed, which is said"
    notices = (machine.out / "emulated-h100-notices.txt").read_text().splitlines()
    assert [line for line in notices if "torch.compile is not rehearsed" not in line] == []
    rows = machine.rows("-core")
    settings = ("case", "dtype", "slope_dtype", "op", "provider")
    assert columns(rows, *settings) == {
        (*(case.setting[name] for name in settings[:3]), op, provider)
        for case in CORE
        for op in case.ops
        for provider in PROVIDERS
    }
    assert set(rows["commit"]) == {"abc123"}
    assert (rows["device_us"] > 0).all()
    assert (rows["call_us"] > 0).all()
    assert_plotted(machine.out / "emulated-h100-speedup.png")


def test_cases_of_models_until_the_time_is_up(machine):
    status, said = machine.run(MODELS, minutes=0.5)
    assert status == 0, said
    assert "The minutes given are over" in said
    assert set(machine.rows("")["provider"]) == PROVIDERS
    assert_plotted(machine.out / "emulated-h100-speedup.png")


def test_all_cases_go_on_where_those_of_models_stopped(machine):
    before = len(machine.rows(""))
    status, said = machine.run("$M gpu-check-bench MINUTES=7", minutes=0.5)
    assert status == 0, said
    rows = machine.rows("")
    assert len(rows) > before
    assert not rows.duplicated(["case", "dtype", "slope_dtype", "op", "provider"]).any()


def test_training_steps(machine):
    status, said = machine.run(STEPS, minutes=14)
    assert status == 0, said
    rows = machine.rows("-training-quick")
    assert columns(rows, "network", "layout", "provider") == {
        (workload.network, workload.layout, provider)
        for workload in WORKLOADS
        for provider in ("nn.PReLU", "prelu_gpu")
    }
    assert (rows["step_us"] > 0).all()
    assert (rows["steps"] == 8).all()


def test_the_sanitizer(machine):
    status, said = machine.run(SANITIZER)
    assert status == 0, said
    assert said.count("forwards and backwards are right on cuda") == 2
    assert "right on cuda" in (machine.out / "sanitizer.txt").read_text()


def test_the_results_of_the_half_hour_are_at_most_eight_files(machine):
    assert len(list(machine.out.iterdir())) <= 8
    runs = (machine.out / "runs.txt").read_text().splitlines()
    assert all("Emulated H100" in run and "abc123" in run for run in runs)


def test_tuning(machine):
    status, said = machine.run("$M tune MINUTES=7", minutes=0.5)
    assert status == 0, said
    assert "Gain of the proposed rows" in said
    rows = machine.rows("-tune")
    assert rows["mistake"].isna().all()
    assert (rows["gain"] > 0).all()


def test_curves_are_drawn(machine):
    cases = " ".join(f"--case 'shared-2^{exponent}'" for exponent in (10, 16, 28))
    options = "--dtype float32 --op forward --provider prelu_gpu --provider copy --results out/curves"
    status, said = machine.run(f"python3 -m benchmarks speed {cases} {options}")
    assert status == 0, said
    status, said = machine.run("python3 -m benchmarks report out/curves")
    assert status == 0, said
    assert_plotted(machine.out / "curves/emulated-h100-curves.png")


def test_the_demo(machine):
    """So few steps teach the networks little, which is all that it may complain of."""
    options = "--steps 12 --batch 1 --channels 4 --out out/demo"
    _, said = machine.run(f"python3 -m benchmarks demo {options}")
    assert "Picture: out/demo/demo.png" in said
    assert "No GPU is used" not in said
    complaints = re.findall(r"(?<=benchmarks: ).*|nn.PReLU and prelu_gpu differ.*", said)
    assert all("dB are needed" in complaint for complaint in complaints), said
    assert_plotted(machine.out / "demo/demo.png")


def test_wrong_kernels_are_found(broken):
    broken.edit("kernels/formula.py", "return tl.where(x > 0, grad_y,", "return tl.where(x > 1, grad_y,")
    status, said = broken.run(SELF_CHECK)
    assert status == 1
    assert "wrong grad_x" in said
    status, said = broken.run(SANITIZER)
    assert status
    assert "AssertionError: flat" in said
    status, said = broken.run("$M gpu-check-core MINUTES=6")
    assert status
    assert len(set(re.findall(r".* is wrong and not timed", said))) == len(set(CORE)), said
    assert broken.rows("-core").empty
    status, said = broken.run(STEPS)
    assert status
    assert "wrong results, so nothing is timed" in said


def test_a_graph_that_is_not_replayed_is_found(broken):
    broken.edit("tests/rehearsal/stand_in.py", "for step in self._steps:", "for step in ():")
    test = "-k test_a_captured_step_is_that_of_its_inputs_at_each_replay"
    status, said = broken.run("python3 -m pytest tests/torch/test_training_stack.py", test)
    assert status == 1
    assert "1 failed" in said
