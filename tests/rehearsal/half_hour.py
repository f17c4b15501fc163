"""The first half hour with a GPU, on a machine without one: `make rehearse`.

README.md has its commands. Each runs here as conftest.py says, and what it wrote is looked at. Then
a kernel is made wrong, and every command must say so.
"""

import re
from pathlib import Path

from benchmarks.cases import CORE
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]

SELF_CHECK = "python3 -m prelu_gpu"  # by test_stand_in.py
MARKED = "$M gpu-check-marked MINUTES=7"
TESTS = "$M gpu-check-tests MINUTES=4"
CORE_CASES = "$M gpu-check-core MINUTES=6"
MODELS = "$M gpu-check-models MINUTES=5"
STEPS = "$M gpu-check-steps MINUTES=4"
SANITIZER = "$M gpu-check-sanitizer"
HALF_HOUR = (SELF_CHECK, MARKED, TESTS, CORE_CASES, MODELS, STEPS, SANITIZER)

CHOICE = (
    "api/test_modules.py",
    "api/test_threshold.py",
    "benchmarks/test_training.py",
    "benchmarks/test_tune.py",
    "host/test_small.py",
    "kernels/test_guards.py",
    "tools/test_sanitize.py",
    "torch/test_training_stack.py",
)
"""Of the tests that need no GPU: `pytest --compiled` runs those of the kernels."""

PROVIDERS = {"prelu_gpu", "eager", "copy"}


def columns(rows, *names):
    return set(rows[list(names)].itertuples(index=False, name=None))


def assert_plotted(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_readme_has_these_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [re.sub(r"  +#.*", "", line) for line in readme.splitlines()]
    assert [line for line in commands if line in HALF_HOUR] == list(HALF_HOUR)


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
    assert status, "nothing compiles here, which must be said"
    assert "benchmarks: not everything is timed:" in said
    notices = (machine.out / "emulated-h100-notices.txt").read_text().splitlines()
    # In a graph, a dispatch mode here alone, PyTorch's operators serve norms, in the host's time.
    expected = r"\S+-norm.*, prelu_gpu: never queued in time|.*torch.compile is not rehearsed"
    assert [line for line in notices if not re.match(expected, line)] == []
    rows = machine.rows("-core")
    settings = ("case", "dtype", "slope_dtype", "op", "provider")
    assert columns(rows, *settings) == {
        (*(case.setting[name] for name in settings[:3]), op, provider)
        for case in CORE
        for op in case.ops
        for provider in PROVIDERS | ({"unfused"} if case.norm else set())
    }
    assert set(rows["commit"]) == {"abc123"}
    # A launch takes 3 ms: kernels serve these cases, not PyTorch's operators.
    assert (rows["call_us"][rows["provider"] == "prelu_gpu"] > 2900).all()
    assert (rows["device_us"] > 0).all()
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
    options = f"{cases} --dtype float32 --op forward --provider prelu_gpu --provider copy"
    status, said = machine.run(f"python3 -m benchmarks speed {options} --results out/curves")
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
    broken.edit("kernels/formula.py", "tl.where(x > 0, grad_y,", "tl.where(x > 1, grad_y,")
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
