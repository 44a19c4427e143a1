"""What each option of decoupled DMD means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.maths.guidance import guided_x0
from fewstep.methods.base import Event
from fewstep.methods.diffusion.decoupled_dmd import DecoupledDMD
from fewstep.models.build import parse
from tests.methods.dmd import ROWS, assembled, draw, images, only, points
from tests.oracles.harness import train

# what the options mean


@pytest.mark.parametrize(
    "schedule, dm_below, ca_below, shared",
    [
        ("coupled", 1.0, 1.0, True),
        ("full", 1.0, 1.0, False),
        ("constrained", 0.5, 0.5, False),
        ("hybrid", 1.0, 0.5, False),
    ],
)
def test_schedule_says_which_branch_looks_only_at_cleaner_levels(schedule, dm_below, ca_below, shared):
    """The generator's input is at t = 0.5 (1 = noise); a capped branch stays below, on the side of the data."""
    rows = 4000
    method = points(schedule=schedule, guidance_scale=2.0)
    place = method.points(torch.zeros(rows, 2), 0.5, draw(0, rows))
    for branch, below in (("dm", dm_below), ("ca", ca_below)):
        top = place[branch].t.max().item()
        assert top <= below + 1e-6 and top > 0.95 * min(below, 0.98)
        assert place[branch].t.min() == pytest.approx(0.02)
    assert torch.equal(place["dm"].t, place["ca"].t) == shared
    assert torch.equal(place["dm"].x, place["ca"].x) == shared


def test_cap_shrinks_the_range_of_the_augmentation():
    """ca_cap kappa: tau_CA < kappa t."""
    place = points(guidance_scale=2.0, ca_cap=0.5).points(torch.zeros(2000, 2), 0.8, draw(0, 2000))
    assert 0.38 < place["ca"].t.max() <= 0.4 and place["dm"].t.max() > 0.95


def test_coupled_schedule_with_one_normaliser_is_dmd2():
    """DMD2 (arXiv 2405.14867): d L / d x^ = (x0_fake - x0_cfg) / mean |x^ - x0_cfg| / numel, on one level and noise."""
    method = points(schedule="coupled", normaliser="dmd2", norm_min=1e-8, guidance_scale=3.0)
    x0, cond = torch.randn(ROWS, 2).requires_grad_(), images().cond
    update = method.generator_update(x0, 1.0, cond, draw(0))
    sum(rows.mean() for rows in update.losses.values()).backward()
    with torch.no_grad():
        point = method.points(x0, 1.0, draw(0))["dm"]
        real, fake = guided_x0(method.teacher, *point, cond, 3.0), method.fake_score.x0(*point, cond)
        expected = (fake - real) / (x0 - real).abs().mean(1, keepdim=True) / x0.numel()
    torch.testing.assert_close(x0.grad, expected, rtol=1e-4, atol=1e-6)


def test_per_branch_normaliser_divides_by_the_branch_s_own_teacher_and_keeps_a_floor():
    """m = max(norm_min, mean |x^ - x0_teacher|), a number a row."""
    x0, cond = torch.randn(ROWS, 2), images().cond
    plain, _ = points(normaliser="none").directions(x0, 0.5, cond, draw(0))
    method = points(normaliser="per_branch", norm_min=0.5)
    scaled, _ = method.directions(x0, 0.5, cond, draw(0))
    real = method.teach(method.points(x0, 0.5, draw(0)), cond)
    for branch in ("dm", "ca"):
        m = (x0 - real[branch]).abs().mean(1, keepdim=True).clamp_min(0.5)
        torch.testing.assert_close(scaled[branch], plain[branch] / m)
    assert ((x0 - real["ca"]).abs().mean(1) < 0.5).any()  # the floor is at work


@pytest.mark.parametrize("space, factor", [("v", lambda t: 1 / t), ("score", lambda t: (1 - t) / t**2)])
def test_space_weighs_directions_by_their_level(space, factor):
    """The same difference of predictions, measured in v or as a score."""
    x0, cond = torch.randn(ROWS, 2), images().cond
    base, _ = points(normaliser="none").directions(x0, 0.5, cond, draw(0))
    method = points(normaliser="none", space=space)
    other, _ = method.directions(x0, 0.5, cond, draw(0))
    place = method.points(x0, 0.5, draw(0))
    for branch in ("dm", "ca"):
        torch.testing.assert_close(other[branch], base[branch] * factor(place[branch].t)[:, None])


def test_rows_whose_direction_is_not_finite_are_not_moved():
    """A teacher that overflows on some row costs that row its update and no more."""
    method = points(guidance_scale=2.0)
    x0 = torch.randn(ROWS, 2)
    x0[2] = float("inf")
    directions, _ = method.directions(x0, 0.5, images().cond, draw(0))
    assert all(torch.isfinite(d).all() and (d[2] == 0).all() and (d[0] != 0).any() for d in directions.values())


def test_monitors_say_when_the_fake_lags():
    """Fake equal to the teacher: cosine 1 and nothing to match; x0_std is per row."""
    method = points(guidance_scale=2.0)
    method.fake_score.module.load_state_dict(method.teacher.module.state_dict())
    update = method.generator_update(torch.randn(ROWS, 2, requires_grad=True), 0.5, images().cond, draw(0))
    assert update.metrics["x0_std"].shape == (ROWS,)
    torch.testing.assert_close(update.metrics["fake_cosine"], torch.ones(ROWS))
    assert update.metrics["dm_over_ca"] < 1e-5
    assert not any(metric.requires_grad for metric in update.metrics.values())


# grids


def test_several_grids_take_turns_and_the_longest_is_exported():
    """steps [1, 2, 4]: each is drawn, all ranks alike."""
    method = points(steps=(1, 4, 2))
    drawn = [method.grid(draw(step)).steps for step in range(60)]
    assert {1, 2, 4} == set(drawn) and min(drawn.count(n) for n in (1, 2, 4)) > 8
    other_rank = [method.grid(Draw(5, step, np.arange(ROWS, 2 * ROWS))).steps for step in range(60)]
    assert drawn == other_rank
    assert method.schedule().u == (1.0, 0.75, 0.5, 0.25) and method.steps_offered() == (1, 2, 4)


def test_dynamic_grid_draws_random_decreasing_levels_below_noise():
    """CDM: N uniform on 1..max, first level 1, the rest within [.02, .98]."""
    method = points(dynamic_grid=5, sampler="renoise")
    grids = [method.grid(draw(step)) for step in range(100)]
    assert {grid.steps for grid in grids} == {1, 2, 3, 4, 5}
    assert all(grid.u[0] == 1.0 and grid.kind == "renoise" for grid in grids)
    rest = [u for grid in grids for u in grid.u[1:]]
    assert min(rest) >= 0.02 and max(rest) <= 0.98 and np.mean(rest) == pytest.approx(0.5, abs=0.06)
    assert only(method, 0).role_names == ("student",)


def test_levels_are_drawn_uniformly_and_alike_on_all_ranks():
    """One level i for the whole step."""
    method = points(steps=4)
    seen = [draw(step).integers("level", method.schedule().steps, per="step") for step in range(400)]
    assert all(70 < seen.count(level) < 130 for level in range(4))


# regularisers


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_gan_trains_a_discriminator_that_tells_real_from_made(tiny_unet, features):
    """Critic steps alone: the discriminator's loss falls below its value at chance, 2 log 2."""
    method = assembled(
        tiny_unet, regulariser="gan", gan_features=features, guidance_scale=1.0, steps=1, weights={"discriminator": 1.0}
    )
    assert method.critics == (("fake_score",) if features == "fake_score" else ()) + ("discriminator",)
    optimizers = {n: torch.optim.Adam(getattr(method, n).trainable().values(), 3e-3) for n in method.critics}
    losses = []
    critic_turns = [step for step in range(48) if step % 6]
    train(
        method,
        critic_turns,
        lambda _: images(16, samples=True),
        optimizers,
        lambda _, u: losses.append(u.losses["discriminator"].mean().item()),
    )
    assert np.mean(losses[:3]) == pytest.approx(2 * np.log(2), abs=0.15)
    assert np.mean(losses[-5:]) < 1.1


def test_r1_measures_how_far_the_logits_move(tiny_unet):
    """Approximate R1: mean (D(real) - D(real + 0.1 n))^2, on when it has a weight."""
    method = assembled(tiny_unet, regulariser="dm+gan", weights={"r1": 200.0})
    update = only(method, 1, images(samples=True))
    assert set(update.losses) == {"denoise", "discriminator", "r1"}
    assert update.losses["r1"].shape == (ROWS,) and (update.losses["r1"] > 0).all()
    assert "r1" not in only(assembled(tiny_unet, regulariser="dm+gan"), 1, images(samples=True)).losses


def test_meanvar_is_added_by_a_weight_and_keeps_the_defaults_of_others():
    """A small meanvar beside dm: `weights: {meanvar: 0.02}`."""
    config = DecoupledDMD.Config(weights={"meanvar": 0.02})
    assert config.weights == {"gan": 5e-3, "discriminator": 1e-2, "meanvar": 0.02}
    losses = only(points(weights={"meanvar": 0.02}, moments={"mean": 0.0, "var": 1.0}), 0).losses
    assert set(losses) == {"dm", "ca", "meanvar"}


class Stored:
    """A source of rows, or of labels alone."""

    def __init__(self, x0=None):
        self.x0 = x0

    def __len__(self):
        return 500 if self.x0 is None else len(self.x0)

    def fetch(self, ids, draw):
        return {"cond": Cond(label=ids)} | ({} if self.x0 is None else {"x0": self.x0[ids]})


def test_moments_are_measured_on_the_data():
    """moments: data gives the mean over samples of their own mean and variance."""
    method = points(regulariser="meanvar")
    x0 = 0.4 + 0.5 * torch.randn(300, 1, 8, 8) * torch.linspace(0.5, 1.5, 300)[:, None, None, None]
    method.sources = {"train": Stored(x0)}
    assert method.moments.mean == pytest.approx(x0.mean().item(), abs=1e-5)
    assert method.moments.var == pytest.approx(x0.flatten(1).var(1, correction=0).mean().item(), rel=1e-4)


def test_moments_without_samples_name_the_mend():
    method = points(regulariser="meanvar")
    method.sources = {"train": Stored()}
    with pytest.raises(UserError, match=r"config.moments as \{mean"):
        _ = method.moments


def test_fake_is_pulled_to_the_student_after_generator_steps_only():
    """theta_fake <- q theta_fake + (1 - q) theta_student."""
    method = points(fake_pull=0.9)
    fake, student = (next(iter(role.trainable().values())) for role in (method.fake_score, method.student))
    before = fake.detach().clone()
    method.on(Event("step_end", "train", 2, updated=("fake_score",)))
    assert torch.equal(fake, before)
    method.on(Event("step_end", "train", 1, updated=("student",)))
    torch.testing.assert_close(fake.detach(), 0.9 * before + 0.1 * student.detach())


# mistakes


@pytest.mark.parametrize(
    "said, message",
    [
        ({"weights": {"meanva": 1.0}}, "no loss term 'meanva': did you mean 'meanvar'"),
        ({"steps": [4, 0]}, "at least 1"),
        ({"levels": [0.9, 0.1]}, "increase within"),
        ({"guidance_scale": 1.0, "regulariser": "none"}, "nothing to train on"),
        ({"schedule": "hybird"}, "hybrid"),
    ],
)
def test_mistakes_in_the_config_are_named(said, message):
    """Each is one line through the recipe's reader."""
    with pytest.raises(UserError, match=message):
        parse(DecoupledDMD.Config, said, "config")


def test_generator_can_be_trained_without_augmentation_or_matching():
    """meanvar alone at alpha 1 asks no score model for a direction."""
    method = points(regulariser="meanvar", guidance_scale=1.0, moments={"mean": 0.0, "var": 1.0})
    assert set(only(method, 0).losses) == {"meanvar"}
