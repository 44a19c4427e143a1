"""A fake model for each level: a shared one makes only the mixture over levels match the teacher."""

from __future__ import annotations

import pytest
import torch

from fewstep.methods.diffusion.decoupled_dmd import DecoupledDMD
from fewstep.recipe import resolve

from .dmd import assembled, draw, images, only

CONFIG = {"steps": [1, 2, 4], "fake_per_level": True, "fake_updates": 2, "guidance_scale": 1.0}


def test_there_is_a_fake_for_each_distinct_level_and_all_share_the_base(tiny_unet):
    method = assembled(tiny_unet, **CONFIG)
    assert [r.name for r in method.roles() if r.key == "fake_score"] == [f"fake_score_{i}" for i in range(4)]
    assert len({id(getattr(method, name).handle.module) for name in ("teacher", "student", *method.fakes)}) == 1
    assert [method.fake_name(share) for share in (1.0, 0.75, 0.5, 0.25)] == list(method.fakes)


def test_the_recipe_tunes_all_fakes_by_one_key():
    recipe = resolve(
        {
            "method": "decoupled_dmd",
            "teacher": "somewhere",
            "fake_score": {"lora": {"rank": 5}},
            "config": CONFIG,
            "train": {"steps": 1, "batch": 1},
        }
    )
    assert recipe.roles["fake_score"].lora.rank == 5
    assert {role.key for role in recipe.build_method().roles()} == {"teacher", "student", "fake_score"}


def test_levels_come_in_turn_and_the_fake_follows_before_the_student_steps(tiny_unet):
    method = assembled(tiny_unet, **CONFIG)
    turns = method.config.turns
    assert turns == [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    block = method.config.fake_updates + 1
    seen = []
    for step in range(1, 1 + block * len(turns)):
        grid, level = method.place(draw(step))
        update = only(method, step)
        name = method.fake_name(grid.u[level])
        assert update.role_names == (("student",) if step % block == 0 else (name,))
        seen.append((grid.steps, level))
    expected = [turn for turn in turns[1:] + turns[:1] for _ in range(block)]
    assert seen == expected, "the critics' steps of a level come right before the student's"


def test_only_the_fake_of_the_level_is_called(tiny_unet):
    method = assembled(tiny_unet, **CONFIG)
    step = 3 * (method.config.fake_updates + 1)
    grid, level = method.place(draw(step))
    used = method.fake_name(grid.u[level])
    for name in method.fakes:
        if name != used:
            for p in getattr(method, name).trainable().values():
                p.data.fill_(float("nan"))
    update = only(method, step, images())
    assert all(torch.isfinite(rows).all() for rows in update.losses.values())


def test_random_levels_cannot_have_a_fake_each():
    with pytest.raises(ValueError, match="fake_per_level needs fixed levels"):
        DecoupledDMD.Config(fake_per_level=True, dynamic_grid=4)
