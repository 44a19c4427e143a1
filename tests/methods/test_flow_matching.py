"""Flow matching as a method: what it regresses, which times it draws, which conditions it drops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.maths.paths import FlowPath, add_noise
from fewstep.methods.diffusion.flow_matching import FlowMatching
from fewstep.models.oracle import MLP
from fewstep.roles import RoleSpec, assemble
from tests.oracles.harness import seat


def matcher(path: FlowPath | None = None, **config) -> FlowMatching:
    """The method on a small network of points with three classes."""
    torch.manual_seed(0)
    return seat(FlowMatching(FlowMatching.Config(**config)), {"student": MLP.build(classes=3).module}, path)


def draw(rows: int, step: int = 0) -> Draw:
    return Draw(1, step, np.arange(rows))


def test_loss_is_the_velocity_error_at_the_drawn_time():
    """A row's loss is mean |v(x_t, t, c) - (eps - x0)|^2 with x_t = (1 - t) x0 + t eps and t = path.time(u)."""
    method, x0, cond = (
        matcher(FlowPath(shift=3.0), label_dropout=0.0),
        torch.randn(8, 2),
        Cond(label=torch.arange(8) % 3),
    )
    (update,) = method.train_step(Batch(torch.arange(8), {"x0": x0, "cond": cond}), draw(8))
    t, eps = method.student.path.time(draw(8).uniform("u")), draw(8).normal("eps", 2)
    v = method.student.velocity(add_noise(x0, eps, t), t, cond)
    assert update.role_names == ("student",)
    torch.testing.assert_close(update.losses["denoise"], (v - (eps - x0)).square().mean(1))


def test_laws_of_time():
    """uniform, sigmoid(N(mean, std^2)), and half of each."""
    uniform = matcher().clock(draw(20_000))
    bell = matcher(time="logit_normal", time_mean=-0.5, time_std=0.8).clock(draw(20_000))
    mixed = matcher(time="mix", time_mean=-0.5, time_std=0.8).clock(draw(20_000))
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    assert stats.kstest((torch.logit(bell) + 0.5) / 0.8, "norm").pvalue > 0.01
    for level in (0.1, 0.3, 0.6, 0.9):
        half = ((uniform < level).float().mean() + (bell < level).float().mean()) / 2
        assert (mixed < level).float().mean() == pytest.approx(half.item(), abs=0.015)


def test_dropped_rows_become_the_null_class_and_the_others_stay():
    """A share of rows is trained without condition; the draw is addressed, so it repeats."""
    method, cond = matcher(label_dropout=0.3), Cond(label=torch.arange(6000) % 3)
    label = method.dropped(cond, draw(6000))["label"]
    dropped = label == 3
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(label[~dropped], cond["label"][~dropped])
    assert torch.equal(label, method.dropped(cond, draw(6000))["label"])


def test_unconditional_networks_have_nothing_to_drop():
    """An empty condition stays empty, also for a network without a null class."""
    assert len(matcher(label_dropout=0.5).dropped(Cond(), draw(4))) == 0


def test_the_sampler_is_the_plain_grid_with_guidance():
    schedule = matcher(steps=4, guidance_scale=2.0).schedule()
    assert (schedule.kind, schedule.u, schedule.guidance) == ("ode", (1.0, 0.75, 0.5, 0.25), 2.0)


def test_the_student_is_averaged_and_tuned_in_full_unless_the_recipe_says_otherwise():
    """EMA .999 by default."""
    sizes = {"from": "mlp", "build": {"width": 8}}
    student = assemble(FlowMatching().roles(), {"student": RoleSpec(**sizes)}, seed=0)["student"]
    assert student.tune == "full" and student.spec.ema == 0.999
    plain = assemble(FlowMatching().roles(), {"student": RoleSpec(**sizes, ema=None)}, seed=0)["student"]
    assert plain.ema is None
