"""The common part of trajectory methods: configuration, grid, guidance, schedule."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from pydantic import ValidationError

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.maths.paths import FlowPath
from fewstep.methods.diffusion.lcm import LCM
from fewstep.roles import RoleSpec, assemble
from tests.methods.trajectories import draw, seated, table


@pytest.mark.parametrize(
    "said, reason",
    [
        ({"guidance_scale": (8.0, 3.0)}, "upside down"),
        ({"guidance_scale": (3.0, 3.0)}, "upside down"),
        ({"guidance_scale": -1.0}, "must not be negative"),
        ({"steps": ()}, "one or more"),
        ({"steps": (0, 4)}, "at least 1"),
        ({"levels": 0}, "greater than 0"),
        ({"skip": 1.0}, "less than 1"),
    ],
)
def test_bad_configuration_is_refused_with_the_reason(said, reason):
    with pytest.raises(ValidationError, match=reason):
        LCM.Config(**said)


def test_guidance_is_embedded_only_when_it_varies():
    """A fixed scale needs no input."""
    assert LCM.Config().embedded and not LCM.Config(guidance_scale=7.5).embedded
    assert not LCM.Config(embed_guidance=False).embedded
    assert LCM(LCM.Config()).student_role().adds == ("guidance",)
    assert LCM(LCM.Config(guidance_scale=7.5)).student_role().adds == ()


def test_guidance_is_drawn_for_each_row_within_its_range():
    """Uniform, addressed, one number a row; a fixed scale stays a number."""
    method = LCM(LCM.Config(guidance_scale=(3.0, 15.0)))
    drawn = method.guidance(draw(20_000))
    assert 3 < drawn.min() < 3.01 and 14.99 < drawn.max() <= 15
    assert drawn.mean().item() == pytest.approx(9, abs=0.1)
    assert torch.equal(drawn, method.guidance(draw(20_000)))
    assert LCM(LCM.Config(guidance_scale=2.0)).guidance(draw()) == 2.0


@pytest.mark.parametrize("path, levels", [(table(), 50), (FlowPath(), 48)])
def test_every_level_is_equally_likely(path, levels):
    """50 levels on tables, 48 on flow paths; counts within five standard errors of n / levels."""
    method = seated(LCM(LCM.Config(guidance_scale=1.0)), path)
    u = method.interval(draw(40_000)).u
    seen, counts = u.unique(return_counts=True)
    assert sorted(seen.tolist(), reverse=True) == pytest.approx(list(path.grid(levels)))
    mean = 40_000 / levels
    assert (counts - mean).abs().max() < 5 * mean**0.5


def test_the_schedule_of_a_table_is_lcms_and_names_its_origin():
    """999, 759, 499, 259 of 50, with the mid-range guidance as an input."""
    method = seated(LCM(LCM.Config(steps=(1, 2, 4), guidance_scale=(3.0, 15.0))), table())
    schedule = method.schedule()
    assert [round(1000 * u) for u in schedule.u] == [999, 759, 499, 259]
    assert (schedule.kind, schedule.origin, schedule.embedded, schedule.guidance) == ("renoise", 50, True, 9.0)
    assert method.steps_offered() == (1, 2, 4)


def test_sample_guidance_overrules_the_middle_of_the_range():
    method = seated(LCM(LCM.Config(sample_guidance=8.0)), table())
    assert method.schedule().guidance == 8.0
    assert seated(LCM(LCM.Config(guidance_scale=8.0)), table()).schedule().guidance == 1.0  # it is baked in


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_on_flow_paths_the_stock_scheduler_visits_trained_levels(steps):
    """FlowMatchLCMScheduler with sigmas 1, 1 - 1/N, ... and any shift: each is a level of the grid of 48."""
    path = FlowPath(shift=3.0)
    method = seated(LCM(LCM.Config(steps=(steps,), guidance_scale=1.0)), path)
    scheduler = FlowMatchLCMScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    visited = scheduler.sigmas[:-1].double()
    assert [path.time(u) for u in method.schedule().u] == pytest.approx(visited.tolist(), abs=1e-6)
    trained = path.time(torch.tensor(method.grid(), dtype=torch.float64))
    assert (trained[:, None] - visited).abs().amin(0).max() < 1e-6


def test_steps_that_would_visit_untrained_levels_are_refused():
    method = seated(LCM(LCM.Config(steps=(5,), guidance_scale=1.0)), FlowPath())
    with pytest.raises(UserError, match="levels=48 is no multiple of 5"):
        method.schedule()


def test_the_target_is_the_averaged_student():
    """f_-: with an EMA of other weights the target moves with it, and the student's own weights come back."""
    method = seated(LCM(LCM.Config(guidance_scale=1.0)), FlowPath())
    x, u, cond = torch.randn(4, 3), torch.full((4,), 0.5), Cond(label=torch.zeros(4))
    plain = method.target(x, u, cond)
    assert torch.equal(plain, method.f(method.student, x, u, cond)) and not plain.requires_grad
    handle, own = method.student.handle, method.student.module.a.item()
    handle.ema = {n: torch.nn.Parameter(p.detach() + 0.1) for n, p in handle.trainable().items()}
    moved = method.target(x, u, cond)
    torch.testing.assert_close(moved, plain - 0.5 * 0.1 * x)  # x0 = x - t v, and v moves by .1 x
    assert method.student.module.a.item() == own


def test_the_student_starts_as_the_teacher_and_is_averaged_with_095():
    handles = assemble(LCM(LCM.Config(guidance_scale=1.0)).roles(), {"teacher": RoleSpec(**{"from": "mlp"})}, seed=0)
    teacher, student = handles["teacher"], handles["student"]
    assert (teacher.tune, student.tune, student.spec.ema) == ("frozen", "full", 0.95)
    assert teacher.module is not student.module
    assert all(torch.equal(p, q) for p, q in zip(teacher.module.parameters(), student.module.parameters()))


def test_an_adapter_cannot_gain_the_guidance_input():
    """LCM-LoRA keeps the teacher's inputs: the error says both ways out."""
    specs = {"teacher": RoleSpec(**{"from": "mlp"}), "student": RoleSpec(tune="lora")}
    with pytest.raises(UserError, match=r"student.tune is lora, but the network gains an input \(guidance\)"):
        assemble(LCM().roles(), specs, seed=0)
    shared = assemble(LCM(LCM.Config(embed_guidance=False)).roles(), specs, seed=0)
    assert shared["student"].module is shared["teacher"].module


def test_a_network_without_a_place_for_guidance_says_so():
    with pytest.raises(UserError, match="no place for the input 'guidance'"):
        assemble(LCM().roles(), {"teacher": RoleSpec(**{"from": "gaussian"})}, seed=0)


def test_a_sampling_guidance_of_zero_is_zero_and_not_the_middle_of_the_range():
    """0 is the unconditional student, which a range from 0 trains."""
    method = seated(LCM(LCM.Config(guidance_scale=(0.0, 8.0), sample_guidance=0.0)))
    assert (method.schedule().guidance, method.schedule().embedded) == (0.0, True)
    assert seated(LCM(LCM.Config(guidance_scale=(0.0, 8.0)))).schedule().guidance == 4.0
