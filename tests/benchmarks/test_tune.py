import itertools
from operator import attrgetter

import pytest
import torch
import typer

from benchmarks import tune
from benchmarks.cases import Case
from benchmarks.program import Deadline
from benchmarks.providers import PROVIDERS
from benchmarks.tune import Gain, beats
from prelu_gpu.rules import gpu_rules, rules_for, using_rules

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU has no kernels where there is a GPU"
)
VIEWS = (Case("flat", (2, 6, 100), slope="shared"), Case("columns", (40, 6)))
SWEPT = {"plane.size": (2048, 4096, 8192), "column.rows": (1, 8, 16)}
ROW = (4, False)


@pytest.fixture
def search(fake, monkeypatch):
    """A search whose timings take what a function of the rules in use says; nothing is computed."""
    used = []

    def provide(case, op, sets):
        row = case.dtype.itemsize, op == "backward"
        return lambda number: used.append((case.name, rules_for(fake.device, *row)))

    def make(time_us=lambda view, rules: 10000.0, row=ROW, deadline=None):
        lines = []
        fake.device_us = lambda batch: batch.run() or time_us(*used[-1])
        made = tune.Search(fake, row, SWEPT, VIEWS, lines.append, deadline or Deadline(), rounds=3)
        made.lines = lines
        return made

    monkeypatch.setitem(PROVIDERS, "prelu_gpu", provide)
    with using_rules(lambda device, itemsize, backward: gpu_rules(132, itemsize, backward)):
        yield make


def finish(search):
    for _ in search.run():
        pass
    return {path: attrgetter(path)(search.best) for path in SWEPT}


@pytest.mark.parametrize("row", tune.ROWS, ids=str)
def test_what_the_clock_makes_faster_is_proposed(row, search):
    def time_us(view, rules):
        return 5000 + (rules.plane.size if view == "flat" else 100 * rules.column.rows)

    made = search(time_us, row)
    assert finish(made) == {"plane.size": 2048, "column.rows": 1}
    assert made.gains["flat"].factor > 1


def test_what_is_slower_or_within_the_noise_is_not_proposed(search):
    made = search(lambda view, rules: 10000.0 + (rules != made.present))
    assert finish(made)["plane.size"] == made.present.plane.size
    assert set(made.gains.values()) == {Gain()}
    noisy = itertools.cycle([0.7, 1.0, 1.3])
    made = search(lambda view, rules: 10000.0 * (next(noisy) if rules != made.present else 1.03))
    finish(made)
    assert made.best == made.present


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_variant_that_is_not_right_is_neither_timed_nor_proposed(fault, search, monkeypatch):
    mistakes, timed = Case.mistakes, []

    def faulty(case, device):
        if rules_for(device, *ROW).plane.size == 2048:
            return ["wrong output"] if fault == "wrong" else ["CompilationError: no"]
        return mistakes(case, device)

    monkeypatch.setattr(Case, "mistakes", faulty)
    made = search(lambda view, rules: timed.append(rules) or float(rules.plane.size))
    assert finish(made)["plane.size"] == made.present.plane.size == 4096
    assert 2048 not in {rules.plane.size for rules in timed}
    (line,) = {line for line in made.lines if line.mistake and line.view == "flat"}
    assert (line.variant, line.device_us, line.gain) == ("plane.size 4096 -> 2048", None, None)


def test_a_row_that_is_wrong_as_it_is_ends_the_program(search, monkeypatch, capsys):
    monkeypatch.setattr(Case, "mistakes", lambda case, device: ["wrong output"])
    with pytest.raises(typer.Exit):
        finish(search())
    assert "flat, forward: wrong output" in capsys.readouterr().err


def test_a_plan_is_timed_once(search, fake):
    made = search()
    finish(made)
    lines = [(line.view, line.variant) for line in made.lines if line.variant != "as it is"]
    assert len(set(lines)) == len(lines) > 0
    # Rows of a column tile are nothing to flat data.
    assert not any(view == "flat" and "column" in variant for view, variant in lines)
    count = len(made.lines)
    finish(made)
    assert len(made.lines) == count


def test_only_views_on_which_rows_differ_compare_them():
    noisy, same = Gain(1.5, 0.4), Gain()
    gains = {"a": noisy, "b": Gain(1.1, 0.02)}
    assert beats(gains, {"a": noisy, "b": same})
    assert not beats(gains, gains)
    # The spread of the row that is beaten counts too.
    assert not beats({"a": same, "b": Gain(1.1)}, {"a": same, "b": Gain(1.0, 0.11)})
    # A loss on one view outweighs a smaller gain on another.
    assert not beats({"a": Gain(0.8), "b": Gain(1.2)}, {"a": same, "b": same})


def test_all_searches_begin_and_keep_what_they_have_when_the_time_is_up(search, clock, console):
    clock.step = 25
    first, second = (
        search(lambda view, rules: float(rules.plane.size), row, Deadline(minutes, clock))
        for row, minutes in ((ROW, 2), ((2, True), 0))
    )
    tune.sweep([first, second], console)
    output = console.file.getvalue()
    assert "4 bytes, forward" in output
    assert "plane.size 4096 -> 2048" in output
    assert "as it is: no gain beyond the spread" in output


def test_without_a_gpu_it_says_so(no_gpu, cli, capsys):
    assert cli("tune") == 0
    assert "Nothing is timed: there is no GPU here" in capsys.readouterr().out
