import csv

import matplotlib.image
import pytest

from benchmarks import figures, report
from benchmarks.cases import CURVES, DTYPES, MODELS, NORM_PASSES, NORMS, PASSES
from benchmarks.results import columns
from benchmarks.speed import Row
from benchmarks.training import Row as TrainingRow

RUN = ("2026-01-02T03:04:05+00:00", "abc123", "Some GPU", "580.1", "2.11.0", "3.6.0")
MIB = 2**20
LARGE, SMALL = "64x1048576", "64x1024"  # 256 MiB in float32 and 256 KiB
MODEL = next(case for case in MODELS if case.dtype != case.weight_dtype).setting


def row(op, provider, device_us, call_us=None, pct_copy="", extra="", run=RUN, **setting):
    what = {"case": "case", "shape": LARGE, "layout": "contiguous", "slope": "channel"}
    what |= {"dtype": "float32", "slope_dtype": setting.get("dtype", "float32")}
    what |= {"norm": ""} | setting
    elements = 1
    for size in what["shape"].split("x"):
        elements *= int(size)
    nbytes = elements * DTYPES[what["dtype"]].itemsize
    nbytes *= NORM_PASSES.get(what["norm"], PASSES)[op]
    times = (device_us, device_us if call_us is None else call_us, nbytes, 1)
    return (*run, *what.values(), op, provider, *times, pct_copy, extra)


def step(ours, call_us=None, others=("eager", "compile"), **setting):
    """A step that takes prelu_gpu so many times eager's and the compiler's 100 us."""
    return [
        row("step", "prelu_gpu", 100 / ours, call_us, **setting),
        *(row("step", name, 100, call_us and 100, **setting) for name in others),
    ]


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="gpu", row_type=Row):
        path = tmp_path / f"{name}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns(row_type), *rows])
        return path

    return write


@pytest.fixture
def lines(write):
    """The lines of the bar by their names, of invented rows."""

    def lines(*rows):
        (found,) = figures.read([write(*rows)]).values()
        return {line.what: line for line in report.bar(found)}

    return lines


@pytest.fixture
def readme(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nEnd\n")
    monkeypatch.setattr(report, "README", path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return path


def names(line):
    return [setting[1] for setting in line.below.index]


def test_readme_and_the_committed_results_agree(cli):
    assert cli("report", "--check") == 0


def test_without_results_the_block_says_how_to_measure(readme, cli, tmp_path, capsys):
    assert cli("report") == 0
    text = f"# Title\n\n{report.BEGIN}\n{report.NOT_MEASURED}\n{report.END}\n\nEnd\n"
    assert readme.read_text() == text
    assert "Not measured yet" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_results_file_becomes_tables_bar_and_plots(readme, write, cli, tmp_path, capsys):
    leaky = {**MODEL, "case": "yolo", "slope": "number", "dtype": "float32"}
    write(
        row("forward", "prelu_gpu", 100, pct_copy=97.4, **MODEL),
        row("backward", "prelu_gpu", 160, pct_copy=92.6, extra=MIB // 4, **MODEL),
        row("backward", "eager", 420, extra=256 * MIB, **MODEL),
        *step(2.5, **MODEL),
        *step(0.876, **leaky),
        *step(3, case="of no model"),
        row("forward", "prelu_gpu", 1, pct_copy=80, case=CURVES[0].name),
        row("forward", "copy", 1, pct_copy=100, case=CURVES[0].name),
    )
    assert cli("report") == 0
    text = readme.read_text()
    for word in ("Some GPU", "580.1", "2.11.0", "3.6.0", "abc123", "2026-01-02", "(gpu.csv)"):
        assert word in text
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[3:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert cells["PReLU"][:2] == ["forward, % of copy", "backward, % of copy"]
    assert cells[MODEL["case"]] == ["97.4", "92.6", "2.5", "2.5", "-", "0.25", "256"]
    assert "of no model" not in cells
    # Leaky ReLU has a table of its own, after PReLU's, and lines of its own.
    assert text.index(MODEL["case"]) < text.index("| Leaky ReLU ") < text.index("| yolo")
    assert cells["Leaky ReLU x eager"][1] == "1 below"
    assert cells["PReLU x eager"][1] == "met"
    output = capsys.readouterr().out
    below = output.split("Below the bar: Leaky ReLU x eager")[1]
    assert [word in below for word in ("yolo", "0.876", "114.2", "100")] == [True] * 4
    for name in ("gpu-curves.png", "gpu-speedup.png"):
        pixels = matplotlib.image.imread(tmp_path / name)
        # A picture, not an empty sheet.
        assert len({tuple(pixel) for pixel in pixels[::7].reshape(-1, pixels.shape[-1])}) > 10
        assert f"({name})" in text


def test_the_check_changes_nothing_and_sees_a_difference(readme, write, cli, capsys):
    write(*step(2.1))
    before = readme.read_text()
    assert cli("report", "--check") == 1
    assert "its table is not what" in capsys.readouterr().err
    assert readme.read_text() == before
    assert cli("report") == 0
    assert cli("report", "--check") == 0


def test_other_results_than_the_checkouts_leave_its_readme(readme, write, cli, tmp_path):
    before = readme.read_text()
    write(*step(2.1))
    write(*step(2.1), name="gpu-quick")
    (tmp_path / "gpu-tune.csv").write_text("of another program\n")
    assert cli("report", str(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["gpu-speedup.png"]
    assert readme.read_text() == before
    assert cli("report", str(tmp_path), "--check") == 2


def test_files_that_are_none_are_named(readme, write, cli, tmp_path, capsys):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert cli("report", str(tmp_path / "other.csv")) == 2
    assert "other.csv" in capsys.readouterr().err
    assert cli("report", str(tmp_path / "no.csv")) == 1
    assert "no.csv: No such file" in capsys.readouterr().err
    (tmp_path / "other.csv").unlink()
    readme.write_text("# Title\n")
    assert cli("report") == 1
    assert report.END in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "expected"), [("16x262144", 3.0), ("16x262143", 2.0)])
def test_device_time_counts_from_16_mib_on(lines, shape, expected):
    ours = row("step", "prelu_gpu", 100, 200, shape=shape)
    found = lines(ours, row("step", "eager", 300, 400, shape=shape))
    assert list(found["PReLU x eager"].figures) == [expected]


def test_a_step_is_its_own_measurement_or_the_sum_of_both_passes(lines):
    us = {"prelu_gpu": (100, 300), "eager": (150, 650)}
    rows = [
        row(op, name, time, case=case)
        for case in ("both", "passes", "one step")
        for name, times in us.items()
        for op, time in zip(("forward", "backward"), times, strict=True)
    ]
    rows += [*step(1.7, case="both")[:2], row("step", "prelu_gpu", 100, case="one step")]
    figures = lines(*rows)["PReLU x eager"].figures
    by_case = {setting[1]: figure for setting, figure in figures.items()}
    assert by_case == pytest.approx({"both": 1.7, "passes": 2.0, "one step": 2.0})


def test_the_bar(lines):
    curve = {"case": CURVES[0].name}
    found = lines(
        row("forward", "prelu_gpu", 1, pct_copy=95.0, case="good"),
        row("forward", "prelu_gpu", 1, pct_copy=94.9, case="bad"),
        row("forward", "prelu_gpu", 1, pct_copy=50, case="smaller", shape="16x1048575"),
        row("forward", "eager", 1, pct_copy=50, case="good"),
        row("forward", "prelu_gpu", 1, pct_copy=50, case="leaky", slope="number"),
        row("backward", "prelu_gpu", 1, extra=MIB, case="good"),
        row("backward", "prelu_gpu", 1, extra=MIB + 1, case="bad"),
        row("backward", "eager", 1, extra=256 * MIB, case="bad"),
        *(row("inference", "prelu_gpu", 1, 100, case=case) for case in ("good", "bad")),
        *(row("inference", "eager", 1, us, case=c) for c, us in (("good", 95), ("bad", 94))),
        *(one for factor in (0.97, 0.96, 3.2) for one in step(factor, case=f"x{factor}")),
        *step(9, 1000, shape=SMALL, **curve),
        *step(2.1, dtype="float16"),
    )
    assert {what: names(line) for what, line in found.items() if len(line.below)} == {
        "PReLU forward, % of copy": ["bad"],
        "PReLU backward, extra MiB": ["bad"],
        "PReLU inference, x eager": ["bad"],
        # Curves count by whole calls, and not in the means.
        "PReLU x eager": [CURVES[0].name, "x0.96"],
        "PReLU x compile": [CURVES[0].name, "x0.96"],
        "PReLU x eager, geometric mean in float32": ["mean of 3"],
        "Leaky ReLU forward, % of copy": ["leaky"],
    }
    mean = found["PReLU x eager, geometric mean in float32"].figures.item()
    assert mean == pytest.approx((0.97 * 0.96 * 3.2) ** (1 / 3))
    assert found["Leaky ReLU x eager"].cells[2:] == ["no rows for this line", "not measured"]


def test_norms_have_a_bar_and_a_table_of_their_own(lines, readme, write, cli):
    large, columns, _, _, _, small, monai, *_ = (case.setting for case in NORMS)
    others = ("eager", "compile", "unfused")
    rows = [
        *step(1.5, others=others, **large),
        *step(1.7, others=others, **columns),
        *step(0.9, 1000, others=others, **small),
        *step(1.7, others=others[:1], **monai),
        row("forward", "prelu_gpu", 1, pct_copy=94, **large),
        row("forward", "prelu_gpu", 1, pct_copy=91, **columns),
        row("backward", "prelu_gpu", 1, pct_copy=89, **columns),
    ]
    both = "iresnet-norm and iresnet-norm-cl"
    assert {what: names(line) for what, line in lines(*rows).items() if len(line.below)} == {
        "BatchNorm, PReLU forward, % of copy": ["iresnet-norm"],
        "BatchNorm, PReLU x eager": ["iresnet-norm-7x7"],
        "BatchNorm, PReLU x compile": ["iresnet-norm-7x7"],
        f"{both} x eager": ["iresnet-norm"],
        "monai-norm x eager": ["monai-norm"],
        "iresnet-norm-cl and monai-norm-cl backward, % of copy": ["iresnet-norm-cl"],
    }
    write(*rows)
    assert cli("report") == 0
    (line,) = (line for line in readme.read_text().splitlines() if " 128x64x112x112 ch" in line)
    assert [cell.strip() for cell in line.split("|")[3:8]] == ["91.0", "89.0", "1.7", "1.7", "1.7"]


def test_the_core_run_fills_what_the_full_one_has_not(write):
    old = ("2025", "old", *RUN[2:])
    core = write(*step(3, case="both", run=old), *step(4, case="core", run=old), name="gpu-core")
    full = write(*step(2, case="both"), *step(2, case="both", run=("2027", *RUN[1:]))[:0])
    (rows,) = figures.read([core, full]).values()
    speedups = figures.compare(rows)["x eager"]
    assert {setting[1]: figure for setting, figure in speedups.items()} == {"both": 2, "core": 4}
    assert [run.commit for run in report.sources(rows).values()] == ["abc123", "old"]


def test_training_steps_are_a_table_of_their_own(readme, write, cli):
    what = ("iresnet50", 128, "channels_last", "float16")
    write(
        *((*RUN, *what, name, us, 1, 20, peak, "") for name, us, peak in (
            ("nn.PReLU", 3000, 8 * MIB), ("prelu_gpu", 2000, 4 * MIB), ("failed", "", ""),
        )),
        name="gpu-training", row_type=TrainingRow,
    )  # fmt: skip
    assert cli("report") == 0
    rows = [line.split("|")[5:-1] for line in readme.read_text().splitlines() if "iresnet" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["nn.PReLU", "3.0", "1.0", "8.0"],
        ["prelu_gpu", "2.0", "1.5", "4.0"],
        ["failed", "-", "-", "-"],
    ]
