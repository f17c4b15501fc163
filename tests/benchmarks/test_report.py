import csv
import math

import matplotlib.image
import pytest

from benchmarks import bar, measured, plots, report
from benchmarks.__main__ import main
from benchmarks.cases import CURVES, MODELS

RUN = ("2026-01-02T03:04:05+00:00", "abc123", "Some GPU", "580.1", "2.11.0", "3.6.0")
RUN_COLUMNS = ["date", "commit", "gpu", "driver", "torch", "triton"]
CASE_COLUMNS = [
    *RUN_COLUMNS, "case", "shape", "layout", "slope", "dtype", "slope_dtype", "op", "provider",
    "device_us", "call_us", "bytes", "gbps", "pct_copy", "extra_bytes",
]  # fmt: skip
TRAINING_COLUMNS = [
    *RUN_COLUMNS, "network", "batch", "layout", "dtype", "provider", "step_us", "iqr_us", "steps",
    "peak_bytes", "speedup",
]  # fmt: skip
MIB = 2**20
LARGE = "64x1048576"  # 256 MiB in float32
SMALL = "64x1024"
CURVE = CURVES[0].name


def row(op, provider, device_us, call_us=None, *, case="case", shape=LARGE, dtype="float32",
        slope="channel", slope_dtype=None, pct_copy="", extra_bytes=0, run=RUN):  # fmt: skip
    call_us = device_us if call_us is None else call_us
    setting = (case, shape, "contiguous", slope, dtype, slope_dtype or dtype)
    return (*run, *setting, op, provider, device_us, call_us, 0, 0, pct_copy, extra_bytes)


def step(ours, others, **setting):
    """A step by prelu_gpu and by others, of the given times."""
    return [
        row("step", provider, *([us] if isinstance(us, (int, float)) else us), **setting)
        for provider, us in {"prelu_gpu": ours, **others}.items()
    ]


def write(path, rows, columns=CASE_COLUMNS):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture
def results(tmp_path):
    """Reads invented rows."""

    def of(*rows):
        (found,) = measured.read([write(tmp_path / "gpu.csv", rows)])
        return found

    return of


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nEnd\n")
    return path


def lines(found):
    return {line.what: line for line in bar.bar(found)}


def test_readme_and_the_committed_results_agree():
    assert main(["report", "--check"]) == 0


def test_without_results_the_block_says_how_to_measure(readme, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert main(["report", "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nEnd\n")
    assert "Not measured yet" in text
    assert "old" not in text
    assert "make gpu-check PYTHON=python3 RESULTS=DIR" in text.replace("\n", " ")
    assert "Not measured yet" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_check_changes_nothing_and_sees_every_difference(readme, tmp_path, capsys):
    path = write(tmp_path / "gpu.csv", step(100, {"eager": 210}))
    arguments = [str(path), "--readme", str(readme)]
    before = readme.read_text()
    assert main(["report", *arguments, "--check"]) == 1
    assert "is not what the results give" in capsys.readouterr().err
    assert readme.read_text() == before
    assert main(["report", *arguments]) == 0
    assert main(["report", *arguments, "--check"]) == 0
    readme.write_text(readme.read_text().replace("2.100x", "2.101x"))
    assert main(["report", *arguments, "--check"]) == 1


def test_other_results_than_the_checkouts_leave_its_readme(readme, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "README", readme)
    before = readme.read_text()
    write(tmp_path / "gpu.csv", step(100, {"eager": 210}))
    (tmp_path / "gpu-tune.csv").write_text("of another program\n")
    assert main(["report", str(tmp_path)]) == 0
    assert "gpu-speedup.png" in capsys.readouterr().out
    assert (tmp_path / "gpu-speedup.png").exists()
    assert readme.read_text() == before
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--check"])
    assert "give the --readme" in capsys.readouterr().err


def test_the_block_names_where_its_figures_come_from(readme, tmp_path):
    (tmp_path / "results").mkdir()
    path = write(tmp_path / "results" / "gpu.csv", step(100, {"eager": 210}))
    assert main(["report", str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    for word in ("Some GPU", "580.1", "2.11.0", "3.6.0", "abc123", "2026-01-02"):
        assert word in text
    assert "(results/gpu.csv)" in text
    assert "(results/gpu-speedup.png)" in text


def test_the_table_has_the_cases_of_models_in_their_dtypes(results):
    model = next(case for case in MODELS if case.dtype != case.weight_dtype)
    case = {"case": model.name, "dtype": model.dtype_name, "slope_dtype": model.slope_dtype_name}
    found = results(
        row("forward", "prelu_gpu", 100, pct_copy=97.4, **case),
        row("backward", "prelu_gpu", 160, pct_copy=92.6, extra_bytes=MIB // 4, **case),
        row("backward", "eager", 420, extra_bytes=256 * MIB, **case),
        *step(250, {"eager": 500, "compile": 375}, **case),
        *step(250, {"eager": 500}, **{**case, "dtype": "float32"}),
        *step(250, {"eager": 500}, **{**case, "slope_dtype": model.dtype_name}),
        *step(250, {"eager": 500}, **{**case, "case": CURVE}),
    )
    header, _, *table = report.case_table(found).splitlines()
    (cells,) = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)
    assert cells[0] == model.name
    assert cells[2:] == ["97", "93", "2.00", "1.50", "0.25", "256"]
    assert header.count("|") == len(cells) + 1


@pytest.mark.parametrize("size", [("16x262144", 3.0), ("16x262143", 2.0)])
def test_device_time_counts_from_16_mib_on(results, size):
    shape, expected = size
    found = results(*step((100, 200), {"eager": (300, 400)}, shape=shape))
    (setting,) = found.figures
    assert found.speedup(setting, "eager") == expected


def test_a_step_is_its_own_measurement_or_the_sum_of_both_passes(results):
    passes = [
        row(op, provider, us)
        for op, provider, us in (
            ("forward", "prelu_gpu", 100),
            ("forward", "eager", 150),
            ("backward", "prelu_gpu", 300),
            ("backward", "eager", 650),
        )
    ]
    found = results(*passes)
    (setting,) = found.figures
    assert found.speedup(setting, "eager") == 800 / 400
    assert found.speedup(setting, "compile") is None
    found = results(*passes, *step(100, {"eager": 170}))
    assert found.speedup(setting, "eager") == 1.7
    # One provider's step is not compared with another's passes.
    found = results(*passes, *step(100, {}))
    assert found.speedup(setting, "eager") == 800 / 400


def test_lines_without_rows_are_not_met(results):
    found = results(row("forward", "prelu_gpu", 100, pct_copy=99))
    verdicts = {what: (line.measured, line.verdict) for what, line in lines(found).items()}
    assert verdicts.pop("forward, x of 64 MiB and more")[1] == "met"
    assert len(verdicts) == 8
    assert set(verdicts.values()) == {("no rows for this line", "not measured")}


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_large_tensors_are_held_against_the_copy(results, op):
    found = results(
        row(op, "prelu_gpu", 100, pct_copy=95.0, case="good"),
        row(op, "prelu_gpu", 100, pct_copy=94.9, case="bad"),
        row(op, "prelu_gpu", 100, pct_copy=50, case="just smaller", shape="16x1048575"),
        row(op, "eager", 100, pct_copy=50, case="good"),
        row("inference", "prelu_gpu", 100, pct_copy=50, case="good"),
        row(op, "copy", 93, pct_copy=100, case="bad"),
    )
    line = lines(found)[f"{op}, x of 64 MiB and more"]
    assert [value.setting.case for value in line.values] == ["good", "bad"]
    assert [(value.setting.case, value.figure) for value in line.below] == [("bad", 94.9)]
    assert line.below[0].numbers == "prelu_gpu 100.0 us, copy 93.0 us"
    assert line.verdict == "1 below"


@pytest.mark.parametrize(
    ("what", "dtypes", "others", "other", "least"),
    [
        ("float32", ["float32", "float32"], ["float16"], "eager", 1.6),
        ("half precision", ["float16", "bfloat16"], ["float32"], "eager", 2.0),
        ("all dtypes", ["float32", "bfloat16"], [], "compile", 1.3),
    ],
)
def test_means_are_geometric_and_leave_out_curves(results, what, dtypes, others, other, least):
    def line(factor):
        first, second = dtypes
        found = results(
            *step(100, {other: 100 * factor * least / 2}, case="a", dtype=first),
            *step(100, {other: 100 * factor * least * 2}, case="b", dtype=second),
            *step(100, {other: 1}, case=CURVE, dtype=first),
            *(row for dtype in others for row in step(100, {other: 1}, case="c", dtype=dtype)),
        )
        return lines(found)[f"forward + backward against {other}, {what}"]

    assert line(1.001).verdict == "met"
    assert line(0.999).verdict == "not met"
    assert line(0.999).below == []
    assert math.isclose(float(line(1).measured.split("x")[0]), least)
    assert len(line(1).values) == 2


@pytest.mark.parametrize("other", ["eager", "compile"])
def test_no_case_may_be_slower_curves_included(results, other):
    found = results(
        *step(100, {other: 97}, case="noise"),
        *step(100, {other: 96.9}, case="slow"),
        *step((10, 1000), {other: (2000, 500)}, case=CURVE, shape=SMALL),
    )
    line = lines(found)[f"forward + backward against {other}, every case and size"]
    assert [value.setting.case for value in line.below] == ["slow", CURVE]
    assert line.below[1].numbers == f"prelu_gpu 1000.0 us, {other} 500.0 us, call"


def test_inference_is_held_by_whole_calls_at_any_size(results):
    found = results(
        row("inference", "prelu_gpu", 1, 100, case="large"),
        row("inference", "eager", 1000, 94.9, case="large"),
        row("inference", "prelu_gpu", 1, 100, case="small", shape=SMALL),
        row("inference", "eager", 1, 95, case="small", shape=SMALL),
    )
    line = lines(found)["inference against eager, whole call, any size"]
    assert len(line.values) == 2
    assert [value.setting.case for value in line.below] == ["large"]


def test_a_backward_may_hold_one_mib(results):
    found = results(
        row("backward", "prelu_gpu", 1, case="good", extra_bytes=MIB),
        row("backward", "prelu_gpu", 1, case="bad", extra_bytes=MIB + 1),
        row("backward", "eager", 1, case="bad", extra_bytes=256 * MIB),
        row("backward", "prelu_gpu", 1, case="unknown", extra_bytes=""),
        row("forward", "prelu_gpu", 1, case="forward", extra_bytes=2 * MIB),
    )
    line = lines(found)["memory of the backward beside the gradients"]
    assert [value.setting.case for value in line.values] == ["good", "bad"]
    assert [value.setting.case for value in line.below] == ["bad"]
    assert line.figure == 1 + 1 / MIB


def test_every_row_below_the_bar_is_printed_with_its_numbers(readme, tmp_path, capsys):
    rows = [
        *step(100, {"eager": 210}, case="fast"),
        *step(100, {"eager": 95}, case="nearly"),
        *step(100, {"eager": 87.6}, case="slow", dtype="float16", slope_dtype="float32"),
    ]
    path = write(tmp_path / "gpu.csv", rows)
    assert main(["report", str(path), "--readme", str(readme)]) == 0
    output = capsys.readouterr().out
    assert "no rows for this line" in output
    _, below = output.split("Below the bar: forward + backward against eager, every case and size")
    assert "fast" not in below
    assert below.index("slow") < below.index("nearly")
    (line,) = (line for line in below.splitlines() if line.strip().startswith("slow"))
    for word in (LARGE, "float16, slope float32", "0.876", "prelu_gpu 100.0 us, eager 87.6 us"):
        assert word in line


def test_the_core_run_fills_what_the_full_one_has_not(tmp_path):
    core = write(
        tmp_path / "gpu-core.csv",
        [
            *step(100, {"eager": 300}, case="both", run=("2025", "old", *RUN[2:])),
            *step(100, {"eager": 400}, case="core", run=("2025", "old", *RUN[2:])),
        ],
    )
    full = write(tmp_path / "gpu.csv", step(100, {"eager": 200}, case="both"))
    (found,) = measured.read([core, full])
    speedups = {setting.case: found.speedup(setting, "eager") for setting in found.figures}
    assert speedups == {"both": 2.0, "core": 4.0}
    assert [source.path for source in found.sources] == [full, core]
    # A core run that nothing is taken from is not named.
    write(core, step(100, {"eager": 300}, case="both"))
    (found,) = measured.read([core, full])
    assert [source.path for source in found.sources] == [full]


def test_training_steps_are_a_table_of_their_own(readme, tmp_path):
    times = {
        "nn.PReLU": (3000, 8 * MIB), "prelu_gpu": (2000, 4 * MIB),
        "nn.PReLU compile": (1800, 5 * MIB), "prelu_gpu compile": (1500, 3 * MIB),
    }  # fmt: skip
    rows = [
        (*RUN, "iresnet-50", 128, "channels_last", "float16", provider, us, 1, 20, peak, "")
        for provider, (us, peak) in times.items()
    ]
    # What failed has no figures.
    rows += [
        (*RUN, "srgan", 16, "contiguous", "float32", "nn.PReLU", 3000, 1, 20, MIB, 1),
        (*RUN, "srgan", 16, "contiguous", "float32", "prelu_gpu", "", "", 0, "", ""),
    ]
    path = write(tmp_path / "gpu-training.csv", rows, TRAINING_COLUMNS)
    assert main(["report", str(path), "--readme", str(readme)]) == 0
    (line,) = (line for line in readme.read_text().splitlines() if "iresnet-50" in line)
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == "128, channels_last, float16"
    assert cells[1:6] == ["3.00", "2.00", "1.50", "8", "4"]
    assert cells[6:] == ["1.80", "1.50", "1.20", "5", "3"]
    (line,) = (line for line in readme.read_text().splitlines() if "srgan" in line)
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert cells == ["3.00", "-", "-", "1", *"------"]


def test_results_of_two_gpus_stay_apart(tmp_path):
    paths = [
        write(tmp_path / f"{gpu}.csv", step(100, {"eager": us}))
        for gpu, us in (("a", 200), ("b", 300))
    ]
    text = report.block(measured.read(paths), tmp_path)
    assert text.index("(a.csv)") < text.index("2.000x") < text.index("(b.csv)")
    assert text.index("(b.csv)") < text.index("3.000x")


def test_files_of_tune_and_of_quick_runs_are_not_results(tmp_path):
    for name in ("gpu.csv", "gpu-core.csv", "gpu-tune.csv", "gpu-quick.csv", "plot.png"):
        (tmp_path / name).touch()
    assert [path.name for path in measured.find(tmp_path)] == ["gpu-core.csv", "gpu.csv"]


def test_a_run_that_was_taken_up_again_has_the_date_of_its_last_part(results):
    later = ("2026-01-05T00:00:00+00:00", *RUN[1:])
    (source,) = results(*step(100, {"eager": 200}), *step(100, {"eager": 200}, run=later)).sources
    assert str(source.run).endswith("abc123, 2026-01-05")


def test_a_run_cut_off_before_its_first_row_is_no_result(tmp_path):
    assert measured.read([write(tmp_path / "gpu.csv", [])]) == []


@pytest.mark.parametrize(
    ("columns", "rows", "words"),
    [
        (CASE_COLUMNS[:-1], [], "it has other columns"),
        (CASE_COLUMNS, [row("step", "eager", "fast")], "fast"),
        (CASE_COLUMNS, [row("step", "eager", 1, dtype="int8")], "int8"),
        (CASE_COLUMNS, [row("step", "eager", 1, shape="")], "x is float32"),
        (CASE_COLUMNS, [row("step", "eager", 1)[:-3]], "too few columns"),
    ],
)
def test_a_file_that_is_no_results_file_is_one_line(columns, rows, words, readme, tmp_path, capsys):
    path = write(tmp_path / "gpu.csv", rows, columns)
    before = readme.read_text()
    assert main(["report", str(path), "--readme", str(readme)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert words in error
    assert "python -m benchmarks" in error
    assert readme.read_text() == before


def test_a_file_that_is_not_there_is_one_line(readme, tmp_path, capsys):
    assert main(["report", str(tmp_path / "no.csv"), "--readme", str(readme)]) == 1
    assert capsys.readouterr().err.count("no.csv: No such file") == 1


def test_a_readme_without_markers_is_one_line(readme, tmp_path, capsys):
    readme.write_text(f"# Title\n{report.BEGIN}\n")
    path = write(tmp_path / "gpu.csv", step(100, {"eager": 210}))
    assert main(["report", str(path), "--readme", str(readme)]) == 1
    assert report.END in capsys.readouterr().err
    assert readme.read_text() == f"# Title\n{report.BEGIN}\n"
    assert not list(tmp_path.glob("*.png"))


def test_curves_are_by_size_and_leave_out_what_has_no_device_time(results):
    found = results(
        *(
            row("forward", provider, 1, pct_copy=pct, case=CURVE, shape=f"{2**k}",
                slope="shared")
            for k in (20, 10)
            for provider, pct in (("prelu_gpu", k), ("copy", 100))
        ),
        row("forward", "jax", "", 5, case=CURVE, shape="1024", slope="shared"),
        row("forward", "prelu_gpu", 1, pct_copy=1, case="no curve"),
    )  # fmt: skip
    panels = plots.curves(found)
    assert panels == {
        ("slope: shared, float32", "forward"): {"prelu_gpu": [(4 * 2**10, 10.0), (4 * MIB, 20.0)]}
    }
    (axes,) = plots.draw_curves(panels).axes
    roof, line = axes.get_lines()
    assert list(roof.get_ydata()) == [100, 100]
    assert (list(line.get_xdata()), line.get_label()) == ([4096, 4 * MIB], "prelu_gpu")


def test_a_case_has_the_bar_of_its_worst_dtype_and_slower_ones_another_colour(results):
    found = results(
        *step(100, {"eager": 300}, case="fast", dtype="float16"),
        *step(100, {"eager": 200}, case="fast"),
        *step(100, {"eager": 90}, case="slow"),
        *step(100, {"eager": 90}, case=CURVE),
    )
    (axes,) = plots.draw_speedups(plots.case_speedups(found)).axes
    bars = [
        (bar.get_width(), matplotlib.colors.to_hex(bar.get_facecolor())) for bar in axes.patches
    ]
    assert bars == [(2.0, plots.FASTER.lower()), (0.9, plots.SLOWER.lower())]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fast  2.00", "slow  0.90"]
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[3.0, 0.0]]
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [1, 1]


def test_plots_lie_beside_the_results(readme, tmp_path):
    rows = [
        row("forward", "prelu_gpu", 1, pct_copy=90, case=CURVE),
        *step(100, {"eager": 210}),
    ]
    path = write(tmp_path / "gpu-core.csv", rows)
    assert main(["report", str(path), "--readme", str(readme)]) == 0
    for name in ("gpu-curves.png", "gpu-speedup.png"):
        pixels = matplotlib.image.imread(tmp_path / name)
        # A picture, not an empty sheet.
        assert len({tuple(pixel) for pixel in pixels[::7].reshape(-1, pixels.shape[-1])}) > 10
        assert f"({name})" in readme.read_text()


@pytest.mark.parametrize(
    ("nbytes", "name"), [(512, "512 B"), (2**10, "1 KiB"), (2**25, "32 MiB"), (2**30, "1 GiB")]
)
def test_sizes_are_in_the_largest_unit(nbytes, name):
    assert plots.size_name(nbytes) == name
