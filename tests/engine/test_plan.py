"""`fewstep plan` against networks and optimisers that really exist."""

from __future__ import annotations

import pytest
import torch

from fewstep.engine.optim import RoleOptimizer
from fewstep.engine.plan import plan
from fewstep.errors import UserError
from fewstep.recipe import load_recipe
from fewstep.roles import Handle, assemble

UNET = {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4}


def recipe(**changes):
    """Decoupled DMD with two adapters on one small base."""
    return {
        "method": "decoupled_dmd",
        "teacher": {"from": "unet2d", "build": UNET},
        "student": {"ema": 0.99, "lora": {"rank": 4}},
        "fake_score": {"lora": {"rank": 4}},
        "data": {"train": {"source": "labels", "classes": 10}},
        "train": {"steps": 6, "batch": 16},
        **changes,
    }


def real(said) -> dict[str, Handle]:
    """The same roles, with storage."""
    loaded = load_recipe(said)
    return assemble(loaded.build_method().roles(), loaded.roles, 0)


def size(tensors) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def after_a_step(handle: Handle) -> dict[str, int]:
    """Bytes that gradients, optimiser state and EMA of a role really take."""
    optimizer = RoleOptimizer(handle, steps=1)
    for p in handle.trainable().values():
        p.grad = torch.ones_like(p)
    gradients = size(p.grad for p in handle.trainable().values())
    optimizer.step(0)
    return {
        "gradients": gradients,
        "optimizer": size(optimizer.state().values()),
        "ema": size((handle.ema or {}).values()),
    }


def counted(role) -> dict[str, int]:
    """The same of the plan."""
    return {"gradients": role.gradients, "optimizer": role.optimizer, "ema": role.ema}


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    "optimizer", [{"name": "adamw"}, {"name": "sgd", "momentum": 0.9}, {"name": "sgd", "momentum": 0.0}]
)
def test_bytes_of_training_are_those_that_a_real_step_leaves(tune, optimizer):
    said = recipe(student={"tune": tune, "ema": 0.9, "optimizer": optimizer})
    student = next(r for r in plan(said).roles if r.name == "student")
    handle = real(said)["student"]
    assert counted(student) == after_a_step(handle)
    assert student.trained == sum(p.numel() for p in handle.trainable().values())


def test_roles_on_one_base_add_their_adapters_alone():
    handles, planned = real(recipe()), {r.name: r for r in plan(recipe()).roles}
    base = size(handles["teacher"].module.parameters())
    assert planned["teacher"].weights == base
    assert planned["teacher"].shares is None
    for name in ("student", "fake_score"):
        assert planned[name].shares == "teacher"
        assert planned[name].weights == size(handles[name].adapter.parameters())


def test_full_tuning_takes_a_copy_and_says_of_what():
    student = next(r for r in plan(recipe(), ["student.tune=full"]).roles if r.name == "student")
    assert (student.shares, student.source, student.trained) == (None, "teacher", student.parameters)


def test_full_copies_cost_three_networks_and_two_trainings():
    found = plan(recipe())
    base = found.roles[0].weights
    adam = 2 * base + 4 * len(list(real(recipe())["teacher"].module.parameters()))
    assert found.copies_bytes == 3 * base + 2 * (base + adam) + base  # the last one is the student's EMA
    assert found.peak_bytes == sum(r.weights + sum(counted(r).values()) for r in found.roles)
    assert found.ratio == pytest.approx(found.copies_bytes / found.peak_bytes)


def test_a_network_larger_than_this_machine_is_planned_without_storage():
    large = {"sample_size": 32, "channels": 4, "classes": 1000, "num_layers": 40}
    large |= {"num_attention_heads": 32, "attention_head_dim": 128}
    found = plan(recipe(teacher={"from": "dit", "build": large}))
    assert found.roles[0].parameters > 12e9
    assert found.roles[0].weights == pytest.approx(4 * found.roles[0].parameters, rel=1e-3)


def test_stages_show_their_patched_steps_and_the_cut_of_their_batch():
    said = recipe(stages={"train": {"steps": 3, "batch": 24}})
    (stage,) = plan(said, ["train.micro_batch=8"]).stages
    assert (stage.steps, stage.batch, stage.micro_batch, stage.parts) == (3, 24, 8, 3)
    assert stage.trains == ("student", "fake_score")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.micro_batch=7", "cannot be cut into micro-batches of 7"),
        ("data.train.source=lables", "unknown data source 'lables'"),
        ("data={}", "reads data.train"),
        ("teacher={from: no/such/folder}", "no model folder 'no/such/folder'"),
    ],
)
def test_a_plan_finds_the_mistakes_that_a_run_would_end_on(override, named):
    with pytest.raises(UserError, match=named):
        plan(recipe(), [override])
