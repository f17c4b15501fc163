"""Reads results files, and says how the providers compare in them."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import typer

from benchmarks.cases import CURVES, NORM_PASSES, PASSES
from benchmarks.providers import OURS, PROVIDERS, UNFUSED
from benchmarks.results import Run

MIB = 2**20
DEVICE_BYTES = 16 * MIB
"""Size of x from which device time counts; below it is the time of the whole call."""

RUN = [field.name for field in fields(Run)]
OPERATION = ["case", "shape", "layout", "slope", "dtype", "slope_dtype", "norm", "op"]
NETWORK = ["network", "batch", "layout", "dtype"]
FIGURES = ["device_us", "call_us", "bytes", "pct_copy", "extra_bytes", "step_us", "peak_bytes"]
SETTING = ["family", "case", "x", "dtype", "slope_dtype", "nbytes"]
"""What is measured: `x` says it in words, `nbytes` is its size."""
NORM_FAMILIES = {"batch": "BatchNorm, PReLU", "instance": "InstanceNorm, PReLU"}
CURVE_NAMES = {case.name for case in CURVES}


def read(paths: Sequence[Path]) -> dict[Path, pd.DataFrame]:
    """The rows by GPU: its folder and <gpu>, with which the names of its files begin."""
    files = [f for path in paths for f in (sorted(path.glob("*.csv")) if path.is_dir() else [path])]
    found: dict[Path, list[pd.DataFrame]] = {}
    # What a file before it holds is not taken from the core run.
    for path in sorted(files, key=lambda path: path.stem.endswith(("-core", "-training"))):
        if not path.stem.endswith(("-tune", "-quick", "traffic")):
            stem = path.with_name(path.stem.removesuffix("-core").removesuffix("-training"))
            found.setdefault(stem, []).append(load(path))
    gpus = {stem: pd.concat(frames) for stem, frames in found.items()}
    for stem, rows in gpus.items():
        first = rows.groupby([*OPERATION, "network"], dropna=False)["path"].transform("first")
        gpus[stem] = rows[rows["path"] == first]
    return {stem: rows for stem, rows in gpus.items() if len(rows)}


def load(path: Path) -> pd.DataFrame:
    """A file's rows, with what follows from their columns."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not any({*RUN, *names, "provider"} <= {*rows} for names in (OPERATION, NETWORK)):
        advice = "give files that `python -m benchmarks` wrote"
        raise typer.BadParameter(f"{path}: it has other columns; {advice}.")
    columns = dict.fromkeys([*RUN, *OPERATION, *NETWORK, "provider", *FIGURES])
    rows = rows.reindex(columns=list(columns)).astype(object).assign(path=path)
    rows[FIGURES] = rows[FIGURES].apply(pd.to_numeric, errors="coerce")
    layout = (" " + rows["layout"]).where(rows["layout"] != "contiguous", "")
    slope = (", slope " + rows["slope_dtype"]).where(rows["slope_dtype"] != rows["dtype"], "")
    rows["x"] = rows["shape"] + layout + ", " + rows["slope"] + ", " + rows["dtype"] + slope
    family = np.where(rows["slope"] == "number", "Leaky ReLU", "PReLU")
    rows["family"] = rows["norm"].map(NORM_FAMILIES).fillna(pd.Series(family, rows.index))
    passes = rows["op"].map(PASSES)
    for norm, theirs in NORM_PASSES.items():
        passes = passes.where(rows["norm"] != norm, rows["op"].map(theirs))
    rows["nbytes"] = rows["bytes"] / passes
    rows["us"] = rows["device_us"].where(rows["nbytes"] >= DEVICE_BYTES, rows["call_us"])
    return rows


def pivot(rows: pd.DataFrame, figure: str) -> pd.DataFrame:
    """A figure by setting, and by operation and provider."""
    every = pd.MultiIndex.from_product([PASSES, PROVIDERS])
    known = rows.dropna(subset=["case"])
    table = known.pivot_table(figure, SETTING, ["op", "provider"], "last", sort=False)
    settings = pd.MultiIndex.from_frame(known[SETTING].drop_duplicates())
    return table.reindex(index=settings, columns=every)


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """What the bar is about, by setting; NaN where it is not measured."""
    us, call_us, pct_copy = (pivot(rows, figure) for figure in ("us", "call_us", "pct_copy"))
    extra = pivot(rows, "extra_bytes") / MIB
    found = {f"{op}, % of copy": pct_copy[op, OURS] for op in ("forward", "backward")}
    for other in ("eager", "compile", UNFUSED):
        step, passes = us["step"], us["forward"] + us["backward"]
        found[f"x {other}"] = (step[other] / step[OURS]).fillna(passes[other] / passes[OURS])
    found["inference, x eager"] = call_us["inference", "eager"] / call_us["inference", OURS]
    found["extra MiB"], found["eager's"] = extra["backward", OURS], extra["backward", "eager"]
    return pd.DataFrame(found)
