"""The launches of norms: what their sums are of, and who finishes them."""

import dataclasses

from .layout import View
from .plan import Launch, Plan, block_of, make_plan, next_power_of_2, sum_launch
from .rules import Kind, Rules


def make_norm_plan(view: View, itemsize: int, rules: Rules, launch: str) -> Plan:
    """Plans one of a norm's launches, by its name in NormPrograms.

    Its sums are of each channel of each sample.

    Where a tile of columns holds whole rows, its programs sum these first: the partial sums do not
    grow with the outer positions that make one row of columns.
    """
    column = rules.column._replace(programs=getattr(rules.norm, launch))
    plan = make_plan(view, itemsize, rules._replace(column=column))
    if plan.kind is not Kind.COLUMN:
        return plan
    splits, channels, inner = plan.partials
    block, row = plan.constants["BLOCK"], channels * inner
    folds = block // row if block % row == 0 else 1
    if folds > 1:
        splits = plan.grid[0] * plan.grid[1]
    return dataclasses.replace(
        plan,
        partials=(splits, view.samples * channels, inner),
        sizes={
            **plan.sizes,
            "sample_vectors": view.numel // plan.constants["V"] if view.samples > 1 else None,
        },
        constants={**plan.constants, "FOLDS": folds},
    )


def make_finish_plan(partials: tuple[int, int, int], interpreted: bool) -> Launch:
    """Plans the second stage of a norm: a program for each channel, unless these have few terms."""
    splits, channels, inner = partials
    tile, widest = (2**20, 2**10) if interpreted else (2**10, 8)
    term_block = min(block_of(splits * inner), tile)
    channel_block = min(next_power_of_2(channels), widest, tile // term_block)
    return sum_launch(partials, channel_block, term_block)
