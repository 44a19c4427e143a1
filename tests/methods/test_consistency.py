"""Consistency models: what is compared in each mode, on which grid, with which weight."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fewstep.errors import UserError
from fewstep.maths.consistency import karras_times, lognormal_shares
from fewstep.maths.paths import FlowPath, add_noise
from fewstep.methods.diffusion.consistency import Consistency
from fewstep.models.oracle import MLP
from fewstep.roles import RoleSpec, assemble
from tests.methods.trajectories import (
    ROWS,
    assembled,
    draw,
    halves_agree,
    images,
    only,
    points,
    seated,
    table,
    touched,
)

F64 = torch.float64


def consistency(path=None, **config):
    return seated(Consistency(Consistency.Config(**config)), path or FlowPath())


def norm_huber(error: Tensor, c: float) -> Tensor:
    """sqrt(|e|^2 + c^2) - c, with c times the root of a row's elements."""
    c = c * math.sqrt(error.shape[1])
    return (error.square().sum(1) + c * c).sqrt() - c


def neighbours(method, step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, s) [rows] of a uniformly drawn step, by hand."""
    numbers, batch = draw(step=step), points()
    t, _ = karras_times(FlowPath(), method.levels, [1.0, *_levels(method)], 0.002, 80.0)
    i = numbers.integers("level", len(t) - 1)
    x = add_noise(batch.x0, numbers.normal("eps", 3).double(), t[i])
    return x, t[i], t[i + 1]


def _levels(method) -> list[float]:
    return [1 - i / n for n in method.config.steps for i in range(n)]


# what is compared


def test_distillation_walks_down_with_one_heun_step_of_the_teacher():
    """d( x - t v, sg[x' - s v'] ), x' = x + (s - t)(v(x, t) + v(x + (s - t) v, s)) / 2; Euler to t = 0."""
    method, cond = consistency(), points().cond
    x, t, s = neighbours(method)

    def teach(y, at):
        return method.teacher.velocity(y, at.float(), cond)

    width = (s - t)[:, None]
    first = teach(x, t)
    second = torch.where((s == 0)[:, None], first, teach(x + width * first, s))
    below = x + width * (first + second) / 2

    def student(y, at):
        return y - at[:, None] * method.student.velocity(y, at.float(), cond)

    expected = norm_huber(student(x, t) - student(below, s), 0.00054)
    torch.testing.assert_close(only(method).losses["consistency"], expected, atol=1e-6, rtol=1e-5)


def test_training_compares_two_noisings_of_one_pair():
    """x_s = (1 - s) x0 + s eps with the data and the noise of x_t; no teacher is asked."""
    method, batch = consistency(mode="train"), points()
    x, t, s = neighbours(method)
    eps = draw().normal("eps", 3).double()

    def student(y, at):
        return y - at[:, None] * method.student.velocity(y, at.float(), batch.cond)

    expected = norm_huber(student(x, t) - student(add_noise(batch.x0, eps, s), s), 0.00054)
    torch.testing.assert_close(only(method).losses["consistency"], expected, atol=1e-6, rtol=1e-5)


def test_improved_training_weighs_by_one_over_the_interval():
    """w = 1 / (sigma_i - sigma_{i+1}), i drawn with the log-normal shares."""
    method, batch, numbers = consistency(mode="improved"), points(), draw()
    t, sigma = karras_times(FlowPath(), 10, [1.0, *_levels(method)], 0.002, 80.0)
    shares = lognormal_shares(sigma, -1.1, 2.0)
    u = numbers.uniform("level").double()
    i = torch.tensor([int((shares.cumsum(0) < value).sum()) for value in u])
    eps = numbers.normal("eps", 3).double()

    def student(y, at):
        return y - at[:, None] * method.student.velocity(y, at.float(), batch.cond)

    error = student(add_noise(batch.x0, eps, t[i]), t[i]) - student(add_noise(batch.x0, eps, t[i + 1]), t[i + 1])
    expected = norm_huber(error, 0.00054) / (sigma[i] - sigma[i + 1])
    torch.testing.assert_close(only(method).losses["consistency"], expected, atol=1e-5, rtol=1e-4)


def test_the_drawn_levels_follow_their_shares():
    """Counts of 20 000 draws within five standard errors of n p."""
    method = consistency(mode="improved")
    at, _ = method.pair(draw(20_000))
    u, sigma = method.ladder(10)
    shares = lognormal_shares(sigma, -1.1, 2.0)
    counts = (at.u[:, None] == u[:-1]).sum(0)
    assert ((counts - 20_000 * shares).abs() < 5 * (20_000 * shares).sqrt() + 1).all()


def test_l2_is_the_mean_square():
    method = consistency(mode="train", distance="l2")
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(method.compare(a, b), (a - b).square().mean(1))


# targets


@pytest.mark.parametrize("mode, averaged", [("distill", True), ("train", True), ("improved", False)])
def test_only_improved_training_takes_its_target_from_the_student_itself(mode, averaged):
    method = consistency(mode=mode)
    handle = method.student.handle
    handle.ema = {n: torch.nn.Parameter(p.detach() + 0.1) for n, p in handle.trainable().items()}
    x, u, cond = points().x0, torch.full((ROWS,), 0.5, dtype=F64), points().cond
    moved = not torch.equal(method.target(x, u, cond), method.f(method.student, x, u, cond))
    assert moved == averaged


@pytest.mark.parametrize("mode", ["distill", "train", "improved"])
def test_the_lowest_level_is_compared_with_the_clean_end(mode):
    """f(x, 0) = x: there the target is the data (training) or the teacher's own Euler step (distillation)."""
    method = consistency(mode=mode)
    x, zero = points().x0, torch.zeros(ROWS, dtype=F64)
    torch.testing.assert_close(method.target(x, zero, points().cond), x, atol=1e-12, rtol=0)


def test_a_drawn_guidance_reaches_teacher_and_student():
    """Guided distillation with the guidance as an input of the student."""
    method = consistency(guidance_scale=(2.0, 4.0))
    only(method)
    drawn = draw().uniform("guidance", low=2.0, high=4.0)
    assert all(torch.equal(t, drawn) for t in method.student.module.told) and len(method.student.module.told) == 2
    assert method.schedule().embedded and method.schedule().guidance == 3.0


# grids


@pytest.mark.parametrize("mode", ["distill", "improved"])
def test_every_sampled_level_is_a_level_of_every_grid(mode):
    """The stochastic sampler visits trained levels, however fine the grid has become; also for odd step counts."""
    method = consistency(FlowPath(shift=3.0), mode=mode, steps=(1, 2, 3, 8), double_every=10)
    for step in (0, 10, 75):
        u, _ = method.ladder(method.levels_at(step))
        for n in (1, 2, 3, 8):
            assert all((u - level).abs().min() < 1e-12 for level in method.schedule_for(n, "renoise").u)


def test_tables_are_walked_from_their_last_entry_to_their_first():
    method = consistency(table(), steps=(1, 4))
    u, _ = method.ladder(18)
    assert u[0].item() == pytest.approx(0.999) and u[-1].item() == pytest.approx(0, abs=1e-9)
    assert [round(1000 * level) for level in method.schedule().u] == [999, 749, 499, 249]
    assert torch.isfinite(only(method).losses["consistency"]).all()


def test_the_grid_depends_on_the_step_alone():
    """10 to 1280 over eight equal parts of a run; other modes keep their grid."""
    method = consistency(mode="improved", double_every=100)
    assert [method.levels_at(s) for s in (0, 99, 100, 699, 700, 5000)] == [10, 10, 20, 640, 1280, 1280]
    assert consistency().levels_at(5000) == 18 and consistency(levels=40).levels_at(0) == 40


def test_the_schedule_is_the_stochastic_sampler_on_the_plain_grid():
    schedule = consistency(steps=(1, 2, 4)).schedule()
    assert (schedule.kind, schedule.u, schedule.guidance) == ("renoise", (1.0, 0.75, 0.5, 0.25), 1.0)


# roles and configuration


def test_without_a_teacher_there_is_none_to_load():
    """mode: train and improved have one role, which the recipe sizes or starts from a folder."""
    for mode in ("train", "improved"):
        roles = Consistency(Consistency.Config(mode=mode)).roles()
        assert [role.name for role in roles] == ["student"]
        handle = assemble(roles, {"student": RoleSpec(**{"from": "mlp", "build": {"width": 8}})}, seed=0)["student"]
        assert handle.spec.ema == 0.9999 and handle.tune == "full"
    with pytest.raises(UserError, match="role 'student' has no weights"):
        assemble(roles, {}, seed=0)


def test_distillation_may_start_from_the_teacher_or_from_other_weights():
    roles = Consistency().roles()
    assert [role.name for role in roles] == ["teacher", "student"]
    spec = RoleSpec(**{"from": "mlp", "build": {"width": 8}})
    copied = assemble(roles, {"teacher": spec}, seed=0)
    assert torch.equal(copied["student"].module.enter.weight, copied["teacher"].module.enter.weight)
    fresh = assemble(roles, {"teacher": spec, "student": spec}, seed=0)
    assert not torch.equal(fresh["student"].module.enter.weight, fresh["teacher"].module.enter.weight)
    assert type(fresh["student"].module) is type(MLP.build().module)


@pytest.mark.parametrize(
    "said, reason",
    [
        ({"mode": "train", "guidance_scale": 3.0}, "needs a teacher"),
        ({"mode": "improved", "guidance_scale": (2.0, 3.0)}, "needs a teacher"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "must be below"),
        ({"levels": 1}, "greater than or equal to 2"),
        ({"skip": 0.1}, "none"),
        ({"mode": "continuous"}, "distill"),
    ],
)
def test_bad_configuration_is_refused_with_the_reason(said, reason):
    with pytest.raises(ValidationError, match=f"(?i){reason}"):
        Consistency.Config(**said)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_reaches_the_student_alone(tiny_unet, tune):
    method = assembled(Consistency(Consistency.Config()), tiny_unet, tune)
    only(method, images()).losses["consistency"].mean().backward()
    student = method.student.adapter if tune == "lora" else method.student.module
    assert touched(student) == len(list(student.parameters())) and touched(method.teacher.module) == 0


@pytest.mark.parametrize("mode", ["distill", "train", "improved"])
def test_rows_do_not_depend_on_their_micro_batch(mode):
    assert halves_agree(consistency(mode=mode))
