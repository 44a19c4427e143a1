"""DMD2 (arXiv 2405.14867) as two stages of Decoupled DMD's step."""

from __future__ import annotations

import pytest
import torch

from fewstep.methods.base import Event
from fewstep.methods.diffusion.decoupled_dmd import DecoupledDMD
from fewstep.methods.diffusion.dmd2 import DMD2
from tests.methods.dmd import draw, images, points
from tests.oracles.harness import seat

STUDENT_TURN, CRITIC_TURN = 0, 1


def assembled(**config) -> DMD2:
    """DMD2 on small networks of points, with a linear head on the fake model's first hidden layer."""
    from fewstep.models.oracle import MLP
    from fewstep.nets.discriminator import Discriminator

    torch.manual_seed(0)
    method = DMD2(DMD2.Config(**{"fake_updates": 1, "guidance_scale": 2.0, "gan_layers": ("hidden.0",), **config}))
    nets = {name: MLP.build(classes=10).module for name in ("teacher", "student", "fake_score")}
    nets["discriminator"] = Discriminator([(64,)])
    return seat(method, {role.name: nets[role.name] for role in method.roles()})


def losses(method: DMD2, stage: str, step: int) -> tuple[tuple[str, ...], set[str]]:
    """(roles, loss terms) of the one update of a step in a stage."""
    method.on(Event("stage_start", stage, 0))
    batch = images()
    if stage == "real":
        batch.fields["x0"] = torch.randn(len(batch), 2)
    (update,) = method.train_step(batch, draw(step))
    return update.role_names, set(update.losses)


def test_the_discriminator_waits_for_the_second_stage():
    method = assembled(data_free_steps=10)
    assert losses(method, "data_free", STUDENT_TURN) == (("student",), {"dm", "ca"})
    assert losses(method, "data_free", CRITIC_TURN) == (("fake_score",), {"denoise"})
    assert losses(method, "real", STUDENT_TURN) == (("student",), {"dm", "ca", "gan"})
    assert losses(method, "real", CRITIC_TURN) == (("fake_score", "discriminator"), {"denoise", "discriminator"})


def test_stages_read_their_own_sources_and_train_their_own_roles():
    first, second = assembled(data_free_steps=10).stages()
    assert (first.name, first.data, first.steps, first.trains) == (
        "data_free",
        "prompts",
        10,
        ("student", "fake_score"),
    )
    assert (second.name, second.data, second.steps) == ("real", "train", None)
    assert second.trains == ("student", "fake_score", "discriminator") and second.lr == 0.05
    assert [stage.name for stage in assembled().stages()] == ["real"]


@pytest.mark.parametrize("step", [STUDENT_TURN, CRITIC_TURN])
def test_its_data_free_step_is_the_coupled_step_of_decoupled_dmd(step):
    """Same draws, same networks: equal losses."""
    settings = {"fake_updates": 1, "guidance_scale": 2.0, "sampler": "renoise"}
    other = points(schedule="coupled", normaliser="dmd2", **settings)
    mine = assembled(data_free_steps=10)
    for name in ("teacher", "student", "fake_score"):
        getattr(mine, name).module.load_state_dict(getattr(other, name).module.state_dict())
    mine.on(Event("stage_start", "data_free", 0))
    (a,), (b,) = mine.train_step(images(), draw(step)), other.train_step(images(), draw(step))
    assert a.losses.keys() == b.losses.keys()
    assert all(torch.equal(a.losses[name], b.losses[name]) for name in a.losses)


def test_the_discriminator_is_a_role_of_the_run_in_both_stages():
    assert [r.name for r in DMD2(DMD2.Config(data_free_steps=5)).roles()] == [
        r.name for r in DecoupledDMD(DecoupledDMD.Config(regulariser="dm+gan")).roles()
    ]
