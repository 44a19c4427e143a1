"""Decoupled DMD on real network classes: who is trained, and who is called how often."""

from __future__ import annotations

import pytest
from torch import nn

from fewstep.data.batch import Batch
from fewstep.methods.diffusion.decoupled_dmd import DecoupledDMD
from tests.methods.dmd import ROWS, assembled, draw, images, only, points
from tests.oracles.harness import backward


def touched(module: nn.Module) -> int:
    """Parameters that hold a gradient."""
    return sum(p.grad is not None for p in module.parameters())


# who is trained


def test_generator_step_leaves_teacher_and_fake_without_gradient(tiny_unet):
    """Two adapters on one base: an unrestricted backward of the generator's loss reaches its own adapter alone."""
    method = assembled(tiny_unet, guidance_scale=3.0)
    assert method.teacher.module is method.student.module is method.fake_score.module
    update = only(method, 0)
    assert update.role_names == ("student",) and set(update.losses) == {"dm", "ca"}
    sum(rows.mean() for rows in update.losses.values()).backward()
    assert touched(method.student.adapter) == len(list(method.student.adapter.parameters()))
    assert touched(method.fake_score.adapter) == 0 and touched(method.teacher.module) == 0


def test_critic_step_leaves_teacher_and_student_without_gradient(tiny_unet):
    """The fake model's loss reaches the fake's adapter alone, although samples come from the student."""
    method = assembled(tiny_unet)
    update = only(method, 1)
    assert update.role_names == ("fake_score",) and set(update.losses) == {"denoise"}
    update.losses["denoise"].mean().backward()
    assert touched(method.fake_score.adapter) == len(list(method.fake_score.adapter.parameters()))
    assert touched(method.student.adapter) == 0 and touched(method.teacher.module) == 0


def test_generator_gradient_through_the_discriminator_stays_with_the_student(tiny_unet):
    """dm+gan: the loss flows through the fake model's features and the heads, and trains neither."""
    method = assembled(tiny_unet, regulariser="gan", guidance_scale=1.0)
    update = only(method, 0, images(samples=True))
    assert set(update.losses) == {"gan"}
    backward(method, update)
    assert touched(method.student.adapter) == len(list(method.student.adapter.parameters()))
    assert touched(method.fake_score.adapter) == 0 and touched(method.discriminator.module) == 0


@pytest.mark.parametrize("step, trained", [(0, "student"), (1, "fake_score"), (3, "fake_score"), (4, "student")])
def test_generator_has_every_fourth_turn_when_the_fake_has_three(step, trained):
    """A step trains the student once, then the fake model `fake_updates` times."""
    assert only(points(fake_updates=3), step).role_names == (trained,)


@pytest.mark.parametrize(
    "config, roles",
    [
        ({}, ("fake_score",)),
        ({"regulariser": "none"}, ()),
        ({"regulariser": "meanvar"}, ()),
        ({"regulariser": "gan"}, ("fake_score", "discriminator")),
        ({"regulariser": "gan", "gan_features": "teacher"}, ("discriminator",)),
        ({"regulariser": "dm+gan", "gan_features": "teacher"}, ("fake_score", "discriminator")),
    ],
)
def test_only_networks_that_the_regulariser_needs_are_roles(config, roles):
    """Without a critic every step is the generator's."""
    method = DecoupledDMD(DecoupledDMD.Config(**config))
    assert tuple(role.name for role in method.roles()) == ("teacher", "student", *roles)


def test_without_a_critic_every_step_trains_the_student():
    method = points(regulariser="none")
    assert [only(method, step).role_names for step in range(3)] == [("student",)] * 3


# who is called


def calls(method: DecoupledDMD, step: int, batch: Batch | None = None) -> dict[str, list[int]]:
    """Rows of each network call of a step, by role (roles hold networks of their own)."""
    seen: dict[str, list[int]] = {}
    hooks = []
    for role in method.roles():
        if role.name == "discriminator":
            continue
        rows = seen.setdefault(role.name, [])
        network = getattr(method, role.name).module
        hooks.append(  # before the call: one for features ends early
            network.register_forward_pre_hook(
                lambda _m, _a, named, rows=rows: rows.append(len(named["sample"])), with_kwargs=True
            )
        )
    only(method, step, batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_generator_step_calls_the_teacher_once_with_three_parts_and_the_fake_once(tiny_unet):
    """cond at tau_DM, cond at tau_CA and null at tau_CA are one call; the student is called once a level."""
    method = assembled(tiny_unet, tune="full", guidance_scale=2.0, steps=4)
    level = draw(0).integers("level", 4, per="step")
    assert level > 0  # so that earlier levels are simulated
    expected = {"teacher": [3 * ROWS], "student": [ROWS] * (level + 1), "fake_score": [ROWS]}
    assert calls(method, 0) == expected


def test_critic_step_calls_the_fake_once_and_the_teacher_never(tiny_unet):
    """The teacher has no part in the fake model's step."""
    seen = calls(assembled(tiny_unet, tune="full", steps=1), 1)
    assert seen == {"teacher": [], "student": [ROWS], "fake_score": [ROWS]}


@pytest.mark.parametrize(
    "config, parts",
    [
        ({"guidance_scale": 1.0}, 1),  # no augmentation, no unconditional rows
        ({"schedule": "coupled"}, 2),  # both branches share the conditional rows
        ({"regulariser": "none"}, 2),  # no matching
        ({"schedule": "full"}, 3),
    ],
)
def test_teacher_computes_only_rows_that_are_used(tiny_unet, config, parts):
    """One call whose rows are the parts that the options need."""
    seen = calls(assembled(tiny_unet, tune="full", **{"steps": 1, "guidance_scale": 2.0, **config}), 0)
    assert seen["teacher"] == [parts * ROWS]


@pytest.mark.parametrize("weights, parts", [({}, 2), ({"r1": 100.0}, 3)])
def test_discriminator_reads_real_and_made_samples_in_one_call(tiny_unet, weights, parts):
    """dm+gan, fake step: one denoising call and one call for features."""
    method = assembled(tiny_unet, tune="full", regulariser="dm+gan", weights=weights)
    assert calls(method, 1, images(samples=True))["fake_score"] == [ROWS, parts * ROWS]
