"""Losses by noise level: bins counted by hand, added up over parts, and logged as means over the window."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewstep.engine.barrier import Gradients, advance
from fewstep.engine.levels import binned, by_level, means
from fewstep.engine.tracking import Window
from fewstep.methods.base import Levels, Update

ROWS, T = [1.0, 2.0, 4.0, 8.0, 16.0], [0.0, 0.1249, 0.125, 0.9, 1.0]
SUMS, COUNTS = [3.0, 4.0, 0, 0, 0, 0, 0, 24.0], [2.0, 1.0, 0, 0, 0, 0, 0, 2.0]


def levels(rows=ROWS, t=T) -> Levels:
    return Levels(torch.tensor(rows), torch.tensor(t))


def test_a_row_falls_into_bin_floor_8t_and_t_1_into_the_last():
    assert binned(levels()).tolist() == [SUMS, COUNTS]


def test_bins_of_nothing_are_empty():
    assert binned(Levels(torch.zeros(0), torch.zeros(0))).tolist() == [[0] * 8, [0] * 8]


def test_a_nan_row_spoils_its_own_bin_only():
    sums = binned(levels([math.nan, 1.0], [0.2, 0.9]))[0].tolist()
    assert math.isnan(sums[1]) and sums[7] == 1 and sums[0] == 0


def test_only_bins_with_rows_are_named():
    assert means("dm", SUMS, COUNTS) == {"level.dm.0": 1.5, "level.dm.1": 4.0, "level.dm.7": 12.0}


def test_a_bin_is_of_the_loss_but_carries_no_graph():
    rows = torch.ones(5, requires_grad=True)
    assert not binned(Levels(rows, torch.tensor(T))).requires_grad


def _barriers(parts: int):
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)

    def part(rows, t):
        error = net(rows[:, None])[:, 0]
        yield Update("student", {"dm": error}, levels={"dm": Levels(error, t)})

    rows, t = torch.arange(8.0), torch.tensor([0.0, 0.1, 0.3, 0.3, 0.6, 0.8, 0.9, 1.0])
    barriers = []
    cut = [part(r, s) for r, s in zip(rows.chunk(parts), t.chunk(parts))]
    advance(cut, [(i,) for i in range(parts)], Gradients(lambda _: [net.weight], lambda _: 1.0, parts), barriers.append)
    return barriers[0].levels["dm"].tolist()


def test_one_batch_of_eight_equals_eight_of_one():
    assert _barriers(1) == _barriers(2) == _barriers(8) == [[1, 0, 5, 0, 4, 0, 5, 13], [2, 0, 2, 0, 1, 0, 1, 2]]


def test_a_window_weighs_rows_and_not_steps_and_is_empty_after():
    """A step with one row and a step with three: the mean is over four rows."""
    window = Window()
    for rows in ([8.0], [1.0, 2.0, 1.0]):
        window.add({"loss.dm": torch.tensor(rows).mean()})
        window.add_levels(
            {"dm": binned(levels(rows, [0.5] * len(rows))), "ca": binned(levels(rows, [0.9] * len(rows)))}
        )
    numbers = window.take()
    assert numbers == {"loss.dm": pytest.approx((8 + 4 / 3) / 2), "level.dm.4": 3.0, "level.ca.7": 3.0}
    assert window.take() == {}


def test_a_picture_has_the_early_middle_and_latest_part_at_the_bins_centres():
    lines = [{"step": 10 * s, "level.a.b.0": float(s), **({"level.a.b.7": 1.0} if s == 6 else {})} for s in range(1, 7)]
    lines += [{"step": 60, "validation.fid": 1.0}, {"step": 70, "level.a.b.1": math.nan, "level.odd": 1.0}]
    assert by_level(lines) == {
        "a.b": {
            "steps 10 to 20": [(0.0625, 1.5)],
            "steps 30 to 40": [(0.0625, 3.5)],
            "steps 50 to 60": [(0.0625, 5.5), (0.9375, 1.0)],
        }
    }


def test_a_short_run_has_fewer_parts():
    assert by_level([{"step": 1, "level.a.4": 2.0}]) == {"a": {"step 1": [(0.5625, 2.0)]}}
