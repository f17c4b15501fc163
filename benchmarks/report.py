"""Makes README's table of speed, and the plots, from results files; lists what is below the bar.

    python -m benchmarks report            reads benchmarks/results, writes README's table, draws
    python -m benchmarks report PATH ...   reads these files or folders, draws beside them
    python -m benchmarks report --check    only says whether README agrees; exit status 1 if not

Files <gpu>.csv, <gpu>-core.csv and <gpu>-training.csv belong together. Where the first two hold the
same operation of the same case, the first is used.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.bar import bar
from benchmarks.cases import MODELS
from benchmarks.measured import MIB, Results, Step, find, quotient, read
from benchmarks.plots import draw, plots
from benchmarks.program import ProgramError, make_table, number, open_console

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
NOT_MEASURED = (
    "Not measured yet: no results of a GPU are in `benchmarks/results`; `make gpu-check "
    "PYTHON=python3\nRESULTS=DIR` on a machine with one makes them, from the checkout, with "
    "nothing installed."
)

MODEL_SETTINGS = {(case.name, case.dtype_name, case.slope_dtype_name) for case in MODELS}


def main(arguments: Sequence[str]) -> None:
    """Runs the program."""
    options = parse(arguments)
    try:
        all_results = read(
            csv
            for path in options.paths or [RESULTS]
            for csv in (find(path) if path.is_dir() else [path])
        )
        written = []
        if options.readme:
            old = options.readme.read_text(encoding="utf-8")
            new = with_block(old, block(all_results, options.readme.parent), options.readme)
            if options.check:
                check(old == new, options.readme)
                return
            options.readme.write_text(new, encoding="utf-8")
            written.append(options.readme)
        written += [path for results in all_results for path in draw(results)]
    except OSError as error:
        advice = "give files that can be read and written."
        raise ProgramError(f"{error.filename}: {error.strerror}; {advice}") from error
    except ValueError as error:
        raise ProgramError(str(error)) from error

    console = open_console()
    if not all_results:
        console.print(NOT_MEASURED, soft_wrap=True, markup=False)
    for results in all_results:
        print_bar(results, console)
    for path in written:
        console.print(f"Written: {path}", soft_wrap=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Make README's table of speed and the plots from results files, and list what "
        "is below the bar.",
    )
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="PATH", help="default: benchmarks/results"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="README.md",
        help="where the table is written; the checkout's, unless other results are read",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit status 1 if the README's table is not what the files give",
    )
    options = parser.parse_args(arguments)
    if options.readme is None and not options.paths:
        options.readme = README
    if options.check and options.readme is None:
        parser.error("--check of other results than the checkout's: give the --readme, too")
    return options


def check(agrees: bool, readme: Path) -> None:
    """Raises ProgramError where the README disagrees."""
    if not agrees:
        advice = "`python -m benchmarks report` makes it"
        raise ProgramError(f"{readme}: its table is not what the results give; {advice}.")


def print_bar(results: Results, console: Console) -> None:
    """Prints the bar, and every row below it."""
    for path, run in results.sources:
        console.print(f"{path}: {run}", soft_wrap=True, markup=False)
    lines = bar(results)
    table = make_table(["line", "bar", "measured", ""])
    for line in lines:
        style = None if line.verdict == "met" else "red"
        table.add_row(line.what, line.asked, line.measured, line.verdict, style=style)
    console.print(table)

    for line in lines:
        columns = ["case", "x", line.unit.strip(), "numbers"]
        rows = make_table(columns, title=f"Below the bar: {line.what}")
        for value in sorted(line.below, key=lambda value: value.figure, reverse=line.ceiling):
            figure = line.written(value.figure).removesuffix(line.unit)
            rows.add_row(value.setting.case, value.setting.x, figure, value.numbers)
        if rows.row_count:
            console.print(rows)


def with_block(text: str, content: str, readme: Path) -> str:
    """A README with `content` between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme}: no lines {BEGIN} and {END}; add them where the table belongs.")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def block(all_results: Sequence[Results], folder: Path) -> str:
    """What stands between README's markers; `folder` is what its links are relative to."""
    parts = [gpu_block(results, folder) for results in all_results]
    return "\n\n".join(parts) if parts else NOT_MEASURED


def gpu_block(results: Results, folder: Path) -> str:
    """One GPU's tables and plots."""
    parts = [
        "\n".join(f"- {run}: [{path.name}]({link(path, folder)})" for path, run in results.sources)
    ]
    if results.figures:
        parts += [
            "Device time for x of 16 MiB and more, whole-call time below; forward + backward: how "
            "many times as\nlong torch.nn.PReLU takes, eager and compiled. Extra memory: what the "
            "backward holds beside the gradients.",
            case_table(results),
            bar_table(results),
        ]
        parts += [f"![{plot.title}]({link(plot.path, folder)})" for plot in plots(results)]
    if results.training:
        parts.append(training_table(results))
    return "\n\n".join(parts)


def link(path: Path, folder: Path) -> str:
    """A path as a README in `folder` links it."""
    return Path(os.path.relpath(path, folder)).as_posix()


def case_table(results: Results) -> str:
    """The cases that are taken from models, in the dtype they are used in."""
    rows = []
    for setting in results.figures:
        if (setting.case, setting.dtype, setting.slope_dtype) not in MODEL_SETTINGS:
            continue
        rows.append(
            [
                setting.case,
                setting.x,
                *(number(results.pct_copy(setting, op), 0) for op in ("forward", "backward")),
                *(number(results.speedup(setting, other), 2) for other in ("eager", "compile")),
                number(results.extra_mib(setting, "prelu_gpu"), 2),
                number(results.extra_mib(setting, "eager"), 0),
            ]
        )
    header = [
        "case", "x", "forward, % of copy", "backward, % of copy", "x eager", "x compile",
        "extra MiB", "eager's",
    ]  # fmt: skip
    return markdown(header, rows, text_columns=2)


def bar_table(results: Results) -> str:
    """The bar, and what was measured against it."""
    rows = [[line.what, line.asked, line.measured, line.verdict] for line in bar(results)]
    return markdown(["all cases", "bar", "measured", ""], rows, text_columns=4)


def training_table(results: Results) -> str:
    """Whole training steps, with nn.PReLU and with prelu_gpu."""
    rows = []
    for (network, batch, layout, dtype), providers in results.training.items():
        row = [network, f"{batch}, {layout}, {dtype}"]
        for mode in ("", " compile"):
            theirs, ours = (
                providers.get(name + mode, Step()) for name in ("nn.PReLU", "prelu_gpu")
            )
            row += [
                number(quotient(theirs.step_us, 1e3), 2),
                number(quotient(ours.step_us, 1e3), 2),
                number(quotient(theirs.step_us, ours.step_us), 2),
                number(quotient(theirs.peak_bytes, MIB), 0),
                number(quotient(ours.peak_bytes, MIB), 0),
            ]
        rows.append(row)
    header = ["training step", "batch"]
    for mode in ("", "compiled: "):
        header += [f"{mode}nn.PReLU, ms", "prelu_gpu, ms", "x", "peak MiB", "prelu_gpu"]
    return markdown(header, rows, text_columns=2)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    """A table in Markdown; columns after the first ones are numbers."""
    ruler = ["---"] * text_columns + ["--:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))
