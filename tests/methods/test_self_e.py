"""Self-E as a method: rows and calls of a step, the fake model's beginning, what is refused, and what runs promise."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import UserError
from fewstep.maths.average_velocity import average_velocity
from fewstep.methods.base import Event
from fewstep.methods.diffusion.self_e import SelfE
from fewstep.recipe import load_recipe
from fewstep.resources import config
from fewstep.roles import RoleSpec, assemble
from tests.methods.averages import (
    ROWS,
    calls,
    cut_difference,
    draw,
    images,
    made,
    only,
    recipe,
    step_on_meta,
    whole_and_halves,
)

FULL = {"full_from": 0, "label_dropout": 0.1}


def updates(method: SelfE, step: int = 0) -> list:
    """Everything that a step yields."""
    return list(method.train_step(images(), draw(step=step)))


def test_every_other_pair_of_rows_scores_itself(tiny_unet):
    """The last half of each four; the others have s = t, and so have rows without condition."""
    method = made(SelfE, tiny_unet, label_dropout=0.5, noise_share=0.0)
    scored = torch.tensor([2, 3, 6, 7])
    dropped = torch.tensor([False, True] * 4)
    t, s = method.times(scored, dropped, draw())
    assert torch.equal(t == s, torch.tensor([True, True, False, True] * 2))
    assert (s <= t).all() and (s >= 0).all()


def test_s_leaves_t_as_far_as_the_reach_of_the_step(tiny_unet):
    """s in [(1 - p) t, t], p on a ramp."""
    method = made(SelfE, tiny_unet, reach={"linear": [0, 1], "over": 100}, noise_share=0.0)
    rows, none = torch.arange(4000), torch.zeros(4000, dtype=torch.bool)
    for step, reach in ((0, 0.0), (50, 0.5), (100, 1.0)):
        t, s = method.times(rows, none, draw(4000, step))
        assert (s >= (1 - reach) * t - 1e-6).all()
        assert (1 - s / t).max() == pytest.approx(reach, abs=0.01)


def test_a_share_of_the_rows_starts_from_noise_alone(tiny_unet):
    t, _ = made(SelfE, tiny_unet, noise_share=0.25).times(
        torch.arange(4), torch.zeros(8000, dtype=torch.bool), draw(8000)
    )
    assert (t == 1).float().mean() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    "said, expected",
    [
        ({}, [8, 4, 4]),  # with a graph; the scoring branch with and without condition, on half of the rows
        ({"self_share": 0.25}, [8, 2, 2]),
        ({"full_from": 5}, [8, 4, 4]),
        ({"full_from": 0}, [8, 4]),  # the fake model stands for the branch without condition
        ({"full_from": 0, "mu": 0.5}, [8, 4, 4]),
    ],
)
def test_calls_of_the_student(tiny_unet, said, expected):
    method = made(SelfE, tiny_unet, **said)
    seen: list[int] = []
    method.student.module.register_forward_hook(lambda _m, _a, out: seen.append(len(out[0])))
    updates(method)
    assert seen == expected


def test_the_fake_model_is_called_once_for_the_direction_and_once_to_learn(tiny_unet):
    method = made(SelfE, tiny_unet, fake_updates=2, **FULL)
    seen: list[int] = []
    method.fake_velocity.module.register_forward_hook(lambda _m, _a, out: seen.append(len(out[0])))
    first, *fakes = updates(method)
    assert seen == [4, 4, 4] and [u.roles for u in fakes] == ["fake_velocity"] * 2 and first.roles == "student"


def test_the_judge_carries_no_graph(tiny_unet):
    """Only the student's own call does: the fake model's parameters get no gradient from its step."""
    method = made(SelfE, tiny_unet, **FULL)
    first = next(method.train_step(images(), draw()))
    sum(rows.sum() for rows in first.losses.values()).backward()
    assert all(p.grad is None for p in method.fake_velocity.trainable().values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in method.student.trainable().values())


def test_the_fake_model_begins_as_a_copy_of_the_student(tiny_unet):
    """In the step before it learns, and not again."""
    method = made(SelfE, tiny_unet, full_from=6, fake_warmup=2)
    with torch.no_grad():
        for p in method.student.trainable().values():
            p.add_(1.0)

    def same() -> bool:
        mine, theirs = method.student.trainable(), method.fake_velocity.trainable()
        return all(torch.equal(mine[n], theirs[n]) for n in mine)

    for step in range(1, 6):
        method.on(Event("step_end", "train", step))
        assert same() == (step >= 4), step
        assert method.fake_learns(step) == (step >= 4) and not method.fake_acts(step)
    next(iter(method.student.trainable().values())).data.add_(1.0)
    method.on(Event("step_end", "train", 6))
    assert not same() and method.fake_acts(6)


@pytest.mark.parametrize("said", [{}, FULL])
def test_cutting_the_batch_changes_no_row(tiny_unet, said):
    method = made(SelfE, tiny_unet, **said)
    whole, first, second = (
        next(method.train_step(images(n, at), draw(n, first=at))).losses
        for n, at in ((ROWS, 0), (ROWS // 2, 0), (ROWS // 2, ROWS // 2))
    )
    for term in ("data", "self"):
        torch.testing.assert_close(whole[term], torch.cat([first[term], second[term]]), rtol=1e-4, atol=1e-6)


def test_terms_are_errors_weighed_by_their_share_of_the_rows(tiny_unet):
    """Their mean, added up, is the mean over all rows; the report has them by noise level."""
    update = only(made(SelfE, tiny_unet, self_share=0.25))
    levels = update.levels
    together = torch.cat([levels["data"].rows, levels["self"].rows]).mean()
    torch.testing.assert_close(sum(rows.mean() for rows in update.losses.values()), together)
    assert {"direction", "x_hat_std", "agreement"} <= set(update.metrics)


def test_upgraded_or_new_it_starts_as_a_flow_model(tiny_unet):
    method = made(SelfE, tiny_unet, moved=False)
    batch, t = images(), torch.full((ROWS,), 0.7)
    plain = average_velocity(method.student, batch.x0, t, t, batch.cond)
    for s in (0.0, 0.3):
        assert torch.equal(average_velocity(method.student, batch.x0, t, t * s, batch.cond), plain)


def test_with_a_teacher_the_student_never_scores(tiny_unet):
    method = SelfE(SelfE.Config(evaluator="teacher"))
    specs = {"teacher": RoleSpec.model_validate({"from": "unet2d", "build": tiny_unet})}
    method.bind(assemble(method.roles(), specs, seed=0), {}, {})
    assert calls(method) == [8] and method.student.role.init == "teacher"


def test_the_average_may_score_the_condition(tiny_unet):
    """ema_cond: the tied branch moves with the average, the free one does not."""
    method = made(SelfE, tiny_unet, evaluator="ema_cond")
    handle = method.student.handle
    handle.ema = {n: torch.nn.Parameter(p.detach().clone()) for n, p in handle.trainable().items()}
    before = only(method).metrics["direction"]
    for p in handle.ema.values():
        p.data.add_(0.1)
    assert not torch.allclose(only(method).metrics["direction"], before)


def test_an_adapter_cannot_score_itself(tiny_unet):
    with pytest.raises(UserError, match=r"student.tune: full, or config.evaluator: teacher"):
        made(SelfE, tiny_unet, tune="lora")


def test_a_step_reads_no_number(tiny_unet):
    step_on_meta(made(SelfE, tiny_unet))


def test_a_run_in_two_halves_equals_one_run(tiny_unet, tmp_path):
    """Also across the step in which the fake model begins."""
    said = {**recipe("self_e", tiny_unet), "config": {"full_from": 2, "fake_warmup": 1}}
    whole, halves = whole_and_halves(said, tmp_path)
    assert whole == halves


def test_micro_batches_do_not_matter(tiny_unet, tmp_path):
    said = {**recipe("self_e", tiny_unet), "config": {"full_from": 1}}
    assert cut_difference(said, tmp_path) < 1e-4


def test_guidance_of_the_exported_model():
    """5, or 2 where the fake model takes part; a number overrides both."""
    assert [SelfE.Config(**said).sample_guidance for said in ({}, {"full_from": 9}, {"guidance_scale": 1.5})] == [
        5,
        2,
        1.5,
    ]


@pytest.mark.parametrize("name", ["digits", "digits_scratch"])
def test_recipes_are_read(name):
    assert load_recipe(config(f"self_e/{name}.yaml")).build_method().name == "self_e"


def test_a_warm_up_longer_than_the_run_before_it_is_refused():
    with pytest.raises(ValueError, match="at most full_from"):
        SelfE.Config(full_from=10, fake_warmup=11)
