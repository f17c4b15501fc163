import dataclasses
import io
import itertools
import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import prelu_gpu
from benchmarks import descent, tune, variants
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.descent import SAME, Field, Gain, Row, descend
from benchmarks.program import Deadline, ProgramError, TimeUpError
from benchmarks.timing import Gpu
from prelu_gpu import launch
from prelu_gpu.plan import Kind, gpu_rules

ROW = Row(4, backward=False)
PRESENT = {row: gpu_rules(132, *row) for row in descent.ROWS}
SMALL = {"flat": Case("flat", (2, 6, 100), slope="shared"), "columns": Case("columns", (40, 6))}


class Axis(NamedTuple):
    """A field of a variant that is a tuple of numbers."""

    index: int
    values: tuple

    def alternatives(self, variant):
        others = [value for value in self.values if value != variant[self.index]]
        return [(*variant[: self.index], v, *variant[self.index + 1 :]) for v in others]


AXES = [Axis(0, (0, 1, 2, 3)), Axis(1, (0, 1, 2, 3)), Axis(2, (0, 1, 2, 3))]


def search(cost, present=(0, 0, 0), spread=0.0, failing=(), sweeps=2):
    """Every step of a descent over a fake cost, on one view."""
    proposed = []

    def evaluate(variants):
        proposed.extend(variants)
        return [
            None
            if variant in failing
            else {
                "view": SAME if variant == present else Gain(cost(present) / cost(variant), spread)
            }
            for variant in variants
        ]

    steps = list(descend(present, AXES, evaluate, sweeps))
    return [best for best, _ in steps], steps[-1][1], proposed


def separable(variant):
    return 2 + sum((value - goal) ** 2 for value, goal in zip(variant, (3, 1, 2), strict=True))


def test_the_optimum_of_a_separable_cost_is_found_in_one_pass():
    best, gains, proposed = search(separable, sweeps=1)
    assert best == [(0, 0, 0), (3, 0, 0), (3, 1, 0), (3, 1, 2)]
    assert gains == {"view": Gain(8.0, 0.0)}
    # A field at a time, not all combinations.
    assert len(proposed) == 1 + 3 * 3


def test_the_second_pass_finds_what_the_first_field_gains_beside_the_others():
    def coupled(variant):
        first, second, _ = variant
        return 10 + abs(first - second) - 2 * second

    assert search(coupled, sweeps=1)[0][-1] == (0, 3, 0)
    assert search(coupled, sweeps=2)[0][-1] == (3, 3, 0)


def test_a_variant_that_failed_its_check_is_never_proposed():
    failing = {(3, b, c) for b, c in itertools.product(range(4), repeat=2)}
    best, _, proposed = search(separable, failing=failing)
    assert best[-1] == (2, 1, 2)
    assert failing & set(proposed)
    assert not failing & set(best)


def test_gains_within_the_noise_keep_the_present_row():
    def slight(variant):
        return 100 - variant[0]

    gain = 100 / 97 - 1
    assert search(slight, spread=1.01 * gain)[0][-1] == (0, 0, 0)
    assert search(slight, spread=0.99 * gain)[0][-1] == (3, 0, 0)


def test_losses_keep_the_present_row():
    best, gains, _ = search(lambda variant: 1 + sum(variant))
    assert set(best) == {(0, 0, 0)}
    assert gains == {"view": SAME}


def test_only_views_on_which_rows_differ_compare_them():
    noisy = Gain(1.5, 0.4)
    gains = {"a": noisy, "b": Gain(1.1, 0.02)}
    assert descent.beats(gains, {"a": noisy, "b": SAME})
    assert not descent.beats(gains, gains)
    assert not descent.beats({"a": noisy, "b": SAME}, gains)
    # The spread of the row that is beaten counts too.
    assert not descent.beats({"a": SAME, "b": Gain(1.1, 0.0)}, {"a": SAME, "b": Gain(1.0, 0.11)})
    # A loss on one view outweighs a smaller gain on another.
    assert not descent.beats({"a": Gain(0.8, 0.0), "b": Gain(1.2, 0.0)}, {"a": SAME, "b": SAME})


@pytest.mark.parametrize("end", [TimeUpError, KeyboardInterrupt])
def test_searches_take_turns_and_keep_what_they_have_when_the_time_is_up(end):
    calls = itertools.count()

    def evaluate(variants):
        if next(calls) == 5:
            raise end
        return [{"view": Gain(1 + sum(variant), 0.0)} for variant in variants]

    searches = {row: descend((0, 0, 0), AXES, evaluate) for row in ("a", "b")}
    steps = list(descent.in_turn(searches))
    assert [(row, best) for row, best, _ in steps] == [
        ("a", (0, 0, 0)), ("b", (0, 0, 0)), ("a", (3, 0, 0)), ("b", (3, 0, 0)), ("a", (3, 3, 0)),
    ]  # fmt: skip


def test_searches_of_different_lengths_all_end():
    def steps(count):
        return iter([(number, {}) for number in range(count)])

    taken = [(row, number) for row, number, _ in descent.in_turn({"a": steps(1), "b": steps(3)})]
    assert taken == [("a", 0), ("b", 0), ("b", 1), ("b", 2)]


@pytest.mark.parametrize("row", descent.ROWS, ids=str)
def test_a_field_changes_nothing_but_itself(row):
    fields = descent.fields(132, row.backward)
    assert len({field.path for field in fields}) == len(fields)
    for field in fields:
        alternatives = field.alternatives(PRESENT[row])
        assert alternatives
        for variant in alternatives:
            changed = [f.path for f in fields if f.get(variant) != f.get(PRESENT[row])]
            assert changed == [field.path]
            assert descent.replaced(variant, field.path, field.get(PRESENT[row])) == PRESENT[row]


def test_programs_are_counted_by_multiprocessor():
    (field,) = (f for f in descent.fields(132, False) if f.path == "plane.programs")
    assert field.written(PRESENT[ROW]) == "64"
    assert PRESENT[ROW].plane.programs == 64 * 132
    programs = {variant.plane.programs for variant in field.alternatives(PRESENT[ROW])}
    assert programs == {count * 132 for count in field.values} - {64 * 132}


@pytest.mark.parametrize("row", descent.ROWS, ids=str)
def test_every_view_has_its_own_kind_and_every_field_changes_a_plan(row):
    kinds = {
        "flat": Kind.FLAT, "planes": Kind.PLANE, "odd planes": Kind.ODD_PLANE,
        "columns": Kind.COLUMN, "columns of 7x7": Kind.COLUMN, "90 columns": Kind.COLUMN,
        # Between the two: 784 elements fill three quarters of a tile in float32.
        "planes of 28x28": Kind.PLANE if row.itemsize == 4 else Kind.COLUMN,
    }  # fmt: skip

    def plan(case, rules):
        return dataclasses.replace(case, dtype=row.dtype).plan(row.op, rules)

    assert set(kinds) == set(variants.VIEWS)
    for name, case in variants.VIEWS.items():
        assert 2**24 < math.prod(case.shape) < 2**26
        assert plan(case, PRESENT[row]).kind is kinds[name]
    # Every field matters somewhere.
    for field in descent.fields(132, row.backward):
        plans = {
            (case.name, repr(plan(case, variant)))
            for case in variants.VIEWS.values()
            for variant in [PRESENT[row], *field.alternatives(PRESENT[row])]
        }
        assert len(plans) > len(variants.VIEWS), field.path


def test_launches_are_planned_by_the_variant_in_use(monkeypatch, device):
    planned = []
    plan = launch.plan

    def recorded(view, itemsize, rules):
        planned.append(rules)
        return plan(view, itemsize, rules)

    monkeypatch.setattr(launch, "plan", recorded)
    x = torch.randn(40, 6, device=device, requires_grad=True)
    weight = torch.rand(6, device=device, requires_grad=True)
    tried = [
        PRESENT[ROW],
        descent.replaced(PRESENT[ROW], "column.rows", 4),
        descent.replaced(PRESENT[ROW], "plane_fill", 0.5),
    ]
    before = launch.rules
    used = []

    def fail_in_use():
        with variants.using(ROW) as use:
            functions = set()
            for variant in (*tried, *tried):
                use(variant)
                functions.add(launch.rules)
                used.append(launch.rules(device, 4, False))
                prelu_gpu.prelu(x, weight).sum().backward()
            # What is planned is kept by this function: once for each variant.
            assert len(functions) == len(tried)
            # Other rows are planned as ever.
            assert launch.rules(device, 4, True) == before(device, 4, True)
            assert launch.rules(device, 2, False) == before(device, 2, False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_use()
    assert launch.rules is before
    assert used == tried * 2
    assert set(tried) <= set(planned)


class FakeDevice:
    """Runs on the CPU; the time of a batch is decided by the rules in use."""

    name = "Fake GPU"
    l2_bytes = 300

    def __init__(self, row, time_us):
        self.device = torch.device("cpu")
        self._row = row
        self._time_us = time_us
        self.timed = []

    def device_us(self, batch):
        batch()
        rules = launch.rules(self.device, *self._row)
        self.timed.append(rules)
        return self._time_us(rules)

    def call_us(self, batch):
        return 10000.0

    def extra_bytes(self, call):
        call()
        return 0


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(variants, "measure", partial(variants.measure, rounds=3))


@pytest.fixture
def bench(few_rounds):
    """A bench for a row, with its lines."""

    def make(row, time_us=lambda rules: 10000.0, views=SMALL, deadline=None):
        made = variants.Bench(
            FakeDevice(row, time_us),
            row,
            PRESENT[row],
            descent.fields(132, row.backward),
            deadline or Deadline(math.inf),
            lambda timing: made.lines.append(timing),
            views,
        )
        made.lines = []
        return made

    return make


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU has no kernels where there is a GPU")
@pytest.mark.parametrize("row", [Row(4, False), Row(2, True)], ids=str)
def test_variants_are_checked_and_timed_beside_the_present_row(row, bench, monkeypatch):
    checked = []
    check = variants.check

    def recorded(case, device):
        checked.append((case.dtype, launch.rules(device, *row)))
        return check(case, device)

    monkeypatch.setattr(variants, "check", recorded)

    def time_us(rules):
        return 8000.0 if rules.plane.size == 2048 else 10000.0

    made = bench(row, time_us)
    assert made.evaluate([PRESENT[row]]) == [{"flat": SAME, "columns": SAME}]
    assert made.lines == []

    fast = descent.replaced(PRESENT[row], "plane.size", 2048)
    assert made.evaluate([fast]) == [{"flat": Gain(1.25, 0.0), "columns": SAME}]
    assert [(line.view, line.variant, line.device_us, line.gain) for line in made.lines] == [
        ("flat", "as it is", 10000.0, 1.0),
        ("flat", "plane.size 2048", 8000.0, 1.25),
    ]
    assert {(line.itemsize, line.op, line.mistake) for line in made.lines} == {(*row_name(row), "")}
    # The present row on both views, the variant where it is another launch.
    present_row = (row.dtype, PRESENT[row])
    assert checked == [present_row, present_row, (row.dtype, fast)]
    timed = made._device.timed
    assert timed.count(fast) == timed.count(PRESENT[row]) > 3

    # What is known is not timed again.
    count = len(timed)
    assert made.evaluate([fast, PRESENT[row]])[0]["flat"] == Gain(1.25, 0.0)
    assert len(timed) == count


def row_name(row):
    return row.itemsize, row.op


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU has no kernels where there is a GPU")
@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_variant_that_is_not_right_is_not_timed(fault, bench, monkeypatch):
    bad = descent.replaced(PRESENT[ROW], "plane.size", 2048)
    good = descent.replaced(PRESENT[ROW], "plane.size", 8192)
    check = variants.check

    def faulty(case, device):
        if launch.rules(device, *ROW) != bad:
            return check(case, device)
        if fault == "raises":
            raise RuntimeError("no such tile\nand more")
        return ["forward: 1 of 1200 elements are wrong"]

    monkeypatch.setattr(variants, "check", faulty)
    made = bench(ROW)
    made.evaluate([PRESENT[ROW]])
    assert made.evaluate([bad, good]) == [None, {"flat": Gain(1.0, 0.0), "columns": SAME}]
    assert bad not in made._device.timed
    assert good in made._device.timed
    (line,) = (line for line in made.lines if line.mistake)
    assert line.variant == "plane.size 2048"
    assert line.device_us is line.gain is None
    words = {"wrong": "1 of 1200 elements", "raises": "RuntimeError: no such tile"}
    assert words[fault] in line.mistake
    assert "\n" not in line.mistake


def test_a_present_row_that_is_wrong_ends_the_sweep(bench, monkeypatch):
    def wrong(x, weight, dim=1):
        return 1.01 * F.prelu(x, weight)

    monkeypatch.setattr(prelu_gpu, "prelu", wrong)
    with pytest.raises(ProgramError, match=r"wrong results.*\nflat, forward: forward: 1200 of"):
        bench(ROW).evaluate([PRESENT[ROW]])


def test_a_bench_asks_for_time_before_each_view(bench):
    made = bench(ROW, deadline=Deadline(-1))
    with pytest.raises(TimeUpError):
        made.evaluate([PRESENT[ROW]])
    assert made._device.timed == []


def few_fields(multiprocessors, backward):
    return [Field("plane.size", (2048, 4096, 8192))]


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU has no kernels where there is a GPU")
def test_a_sweep_proposes_what_is_faster_and_says_keep_elsewhere(few_rounds, monkeypatch):
    # PyTorch's operator for the interpreted kernels, which are not what is tested, nor is the gate.
    monkeypatch.setattr(variants, "check", lambda case, device: [])
    monkeypatch.setattr(prelu_gpu, "prelu", lambda x, weight, dim=1: F.prelu(x, weight))
    monkeypatch.setattr(launch, "rules", lambda device, *row: PRESENT[row])
    monkeypatch.setattr(tune, "fields", few_fields)

    def time_us(rules):
        return 5000.0 if rules.plane.size == 2048 else 10000.0

    console, lines = quiet(), []
    device = FakeDevice(ROW, time_us)
    flat = {"flat": SMALL["flat"]}
    tune.sweep(device, 132, Deadline(math.inf), lines.append, console, flat)
    output = console.file.getvalue()
    table, gains = output.split("Gain of the proposed row")
    assert "The time is up" not in output
    (proposed,) = (line.split() for line in table.splitlines() if "proposed" in line)
    assert proposed[-2:] == ["proposed", "2048"]
    assert table.count("keep") == 3
    assert gains.count("keep") == 3
    (gain,) = (line for line in gains.splitlines() if "4 bytes, forward" in line)
    assert gain.split()[-3:] == ["2.000x", "2.000", "(0.000)"]
    assert {line.view for line in lines} == {"flat"}
    assert {(line.itemsize, line.op) for line in lines} == set(map(row_name, descent.ROWS))


def test_a_sweep_that_has_no_time_prints_so(monkeypatch):
    console = quiet()
    monkeypatch.setattr(launch, "rules", lambda device, *row: PRESENT[row])
    tune.sweep(FakeDevice(ROW, lambda rules: 1.0), 132, Deadline(-1), print, console, SMALL)
    assert "The time is up: 0 of" in console.file.getvalue()


def test_without_a_gpu_the_space_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "--results", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Nothing is timed: there is no GPU here")
    for row in descent.ROWS:
        fields = descent.fields(132, row.backward)
        for field in fields:
            assert output.count(f"{field.path.removeprefix('rules.')} ") in (2, 4)
        total = sum(len(field.alternatives(PRESENT[row])) for field in fields)
        assert f" {total} " in output
    assert "2048, 4096, 8192" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_a_short_sweep_on_a_gpu(monkeypatch):
    # The guarded allocations of conftest.py would be timed too.
    monkeypatch.setattr(launch, "torch", torch)
    monkeypatch.setattr(tune, "fields", few_fields)
    console, lines, before = quiet(), [], launch.rules
    gpu = Gpu()
    views = {name: variants.VIEWS[name] for name in ("flat", "planes")}
    with gpu.stream():
        tune.sweep(gpu, 132, Deadline(1), lines.append, console, views)
    output = console.file.getvalue()
    for row in descent.ROWS:
        assert output.count(row.title) >= 2
    assert {line.view for line in lines} == set(views)
    for line in lines:
        assert line.mistake == ""
        assert line.device_us > 0
        assert line.gain > 0
    assert {line.variant for line in lines} > {"as it is", "plane.size 2048"}
    assert launch.rules is before
