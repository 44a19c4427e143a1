"""Shortcut models as a method: the ladder of steps, whose weights make targets, what is guided, and what runs promise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.maths.average_velocity import average_velocity
from fewstep.maths.paths import FlowPath, VPPath, add_noise
from fewstep.methods.diffusion.shortcut import Shortcut
from fewstep.recipe import load_recipe
from tests.methods.averages import (
    ROWS,
    calls,
    cut_difference,
    draw,
    halves_agree,
    images,
    made,
    only,
    recipe,
    step_on_meta,
    whole_and_halves,
)

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LONG, FLOW = torch.tensor([3, 7]), torch.tensor([0, 1, 2, 4, 5, 6])


# steps


@pytest.mark.parametrize("path", [FlowPath(), FlowPath(shift=3.0), VPPath.from_scheduler(BETAS)])
def test_steps_are_those_of_the_samplers_and_their_middles_those_of_twice_as_many(tiny_unet, path):
    """Every (t, s) is a step of the any-step sampler with 1, 2, 4, ... finest steps; (t, m) and (m, s) of the next finer."""
    method = made(Shortcut, tiny_unet, finest=8)
    method.student.path = path
    grids = {n: [*(path.time(u) for u in path.grid(n)), 0.0] for n in (1, 2, 4, 8, 16)}
    steps = {n: {(round(a, 5), round(b, 5)) for a, b in pairwise(grid)} for n, grid in grids.items()}
    found = method.steps(draw(2000))
    seen = set()
    for t, m, s, finest in zip(*(part.tolist() for part in found)):
        step, halves = (round(t, 5), round(s, 5)), [(round(t, 5), round(m, 5)), (round(m, 5), round(s, 5))]
        (count,) = [n for n in (1, 2, 4, 8) if step in steps[n]]
        assert all(half in steps[2 * count] for half in halves) and finest == (count == 8)
        seen.add((count, step))
    assert len(seen) == 1 + 2 + 4 + 8


def test_lengths_are_equally_likely_and_so_are_their_places(tiny_unet):
    found = made(Shortcut, tiny_unet, finest=4).steps(draw(12_000))
    gaps, counts = torch.unique((found.t - found.s).round(decimals=4), return_counts=True)
    assert gaps.tolist() == [0.25, 0.5, 1.0]
    assert ((counts - 4000).abs() < 5 * 52).all()
    starts, counts = torch.unique(found.t[found.finest], return_counts=True)
    assert starts.tolist() == [0.25, 0.5, 0.75, 1.0] and ((counts - 1000).abs() < 5 * 30).all()


def test_cutting_the_batch_changes_no_row(tiny_unet):
    assert halves_agree(made(Shortcut, tiny_unet, guidance_scale=2.0))


# what a step asks and says


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, [2, 2, 8]),
        ({"guidance_scale": 2.0}, [6, 2, 2, 8]),
        ({"consistency_share": 0.5}, [4, 4, 8]),
    ],
)
def test_calls_of_the_student(tiny_unet, config, expected):
    """Two half steps for every fourth row, and one call with gradient for all; guidance asks null in the flow rows."""
    assert calls(made(Shortcut, tiny_unet, **config)) == expected


def test_terms_are_the_errors_of_their_rows_by_their_share(tiny_unet):
    """flow: |V(x, t, t) - v|^2; consistency: |V(x, t, s) - sg mean of the halves|^2; together the mean over the batch."""
    method, batch, numbers = made(Shortcut, tiny_unet, label_dropout=0.0), images(), draw()
    update, eps = only(method), draw().normal("eps", 1, 8, 8)
    step, clock = method.steps(numbers).rows(LONG), numbers.within("time").uniform("flat")
    flow = average_velocity(
        method.student, add_noise(batch.x0, eps, clock)[FLOW], clock[FLOW], clock[FLOW], batch.cond[FLOW]
    )
    square = (flow - (eps - batch.x0)[FLOW]).square().flatten(1).mean(1)
    torch.testing.assert_close(update.losses["flow"], square * 6 / 8, rtol=1e-4, atol=1e-5)
    x = add_noise(batch.x0[LONG], eps[LONG], step.t)
    whole = average_velocity(method.student, x, step.t, step.s, batch.cond[LONG])
    square = (whole - method.taught(x, step, batch.cond[LONG])).square().flatten(1).mean(1)
    torch.testing.assert_close(update.losses["consistency"], square * 2 / 8, rtol=1e-3, atol=1e-6)
    assert torch.equal(update.levels["consistency"].t, step.t) and len(update.levels["flow"].rows) == 6


def test_targets_come_from_the_averaged_student_and_carry_no_graph(tiny_unet):
    method, batch = made(Shortcut, tiny_unet, guidance_scale=2.0), images()
    step, kept, t = method.steps(draw()), torch.zeros(ROWS, dtype=torch.bool), torch.full((ROWS,), 0.5)

    def targets() -> list[torch.Tensor]:
        return [method.taught(batch.x0, step, batch.cond), method.guided(batch.x0, batch.x0, t, batch.cond, kept)]

    before = targets()
    assert not any(target.requires_grad for target in before)
    handle = method.student.handle
    assert handle.ema is not None
    handle.ema = {n: nn.Parameter(p + 0.05) for n, p in handle.ema.items()}
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, targets()))


# conditions and guidance


def test_dropped_rows_are_asked_with_the_null_condition_and_are_not_guided(tiny_unet):
    """Everything dropped: guidance changes nothing, and labels do not matter."""
    plain, guided = (only(made(Shortcut, tiny_unet, label_dropout=1.0, guidance_scale=g)).losses for g in (1.0, 2.0))
    torch.testing.assert_close(plain, guided)
    method, batch = made(Shortcut, tiny_unet, label_dropout=1.0), images()
    other = type(batch)(batch.ids, {**batch.fields, "cond": Cond(label=batch.cond["label"].flip(0))})
    (update,) = method.train_step(other, draw())
    torch.testing.assert_close(update.losses, plain)


def test_guidance_changes_the_flow_rows_alone(tiny_unet):
    """Steps inherit it from where their finest halves stand."""
    plain, guided = (only(made(Shortcut, tiny_unet, guidance_scale=g)).losses for g in (1.0, 2.0))
    assert torch.equal(plain["consistency"], guided["consistency"])
    kept = ~draw().choice("dropout", 0.1)[FLOW]
    assert torch.equal(plain["flow"] != guided["flow"], kept)


def test_guidance_needs_an_unconditional_branch(tiny_unet):
    with pytest.raises(UserError, match="no unconditional branch"):
        only(made(Shortcut, {**tiny_unet, "classes": None}, guidance_scale=2.0))


# the student and its runs


def test_a_new_network_agrees_with_itself_at_first(tiny_unet):
    """V(x, t, s) = v(x, t) for every s at step 0."""
    method, batch, t = made(Shortcut, tiny_unet, moved=False), images(), torch.linspace(0.1, 1, ROWS)
    at = [average_velocity(method.student, batch.x0, t, share * t, batch.cond) for share in (1.0, 0.0)]
    assert torch.equal(at[0], at[1])


def test_an_adapter_trains_through_the_shifted_label(tiny_unet):
    method = made(Shortcut, tiny_unet, tune="lora")
    torch.stack([rows.sum() for rows in only(method).losses.values()]).sum().backward()
    assert all(p.grad is not None for p in method.student.trainable().values())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_no_step_reads_the_host(tiny_unet, guidance):
    update = step_on_meta(made(Shortcut, tiny_unet, guidance_scale=guidance))
    assert {name: rows.shape for name, rows in update.losses.items()} == {"flow": (6,), "consistency": (2,)}


def test_a_run_in_two_halves_equals_one_run(tiny_unet, tmp_path):
    whole, halves = whole_and_halves(recipe("shortcut", tiny_unet), tmp_path)
    assert whole == halves


def test_micro_batches_do_not_matter(tiny_unet, tmp_path):
    assert cut_difference(recipe("shortcut", tiny_unet), tmp_path) < 1e-5


def test_a_part_that_breaks_the_fours_is_refused(tiny_unet, tmp_path):
    with pytest.raises(UserError, match="rows in multiples of 4"):
        cut_difference(recipe("shortcut", tiny_unet), tmp_path, micro=2)


def test_every_trained_number_of_steps_is_offered(tiny_unet):
    method = made(Shortcut, tiny_unet)
    assert method.steps_offered() == (1, 2, 4, 8, 16, 32, 64, 128)
    assert method.schedule().target == "next" and method.schedule().steps == 4


@pytest.mark.parametrize(
    "config, message",
    [
        ({"steps": 3}, "steps=3 must be 1, 2, 4"),
        ({"finest": 100}, "power of two"),
        ({"sampler": "few"}, "not trained"),
        ({"consistency_share": 0.0}, "consistency_share"),
        ({"guidance_scale": 2.0, "label_dropout": 0.0}, "label_dropout"),
    ],
)
def test_bad_options_are_named(tiny_unet, config, message):
    with pytest.raises(UserError, match=message):
        load_recipe({**recipe("shortcut", tiny_unet), "config": config})
