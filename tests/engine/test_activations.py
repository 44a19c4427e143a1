"""Activations that a plan tells, against what the allocator hands out while the same recipe trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.engine.plan import Plan, plan
from fewstep.engine.trainer import Trainer
from fewstep.recipe import load_recipe

UNET = {
    "from": "unet2d",
    "build": {"sample_size": 16, "classes": 10, "block_out_channels": [32, 64], "norm_num_groups": 8},
}
LORA = {"tune": "lora", "lora": {"rank": 4, "targets": "wide"}}
LABELS = {"train": {"source": "labels", "classes": 10}}
PROTEIN = {"from": "proteina", "build": {"num_layers": 2, "self_conditioning": False}}


def dmd(**changes: Any) -> dict[str, Any]:
    """Decoupled DMD of a small UNet."""
    roles = {"teacher": UNET, "student": LORA, "fake_score": LORA}
    said = {"config": {"fake_updates": 1}, "data": LABELS, "train": {"steps": 4, "batch": 16}}
    return {"method": "decoupled_dmd", **roles, **said, **changes}


RECIPES: dict[str, dict[str, Any]] = {
    "two adapters on one base": dmd(),
    "three networks": dmd(student={"tune": "full"}, fake_score={"tune": "full"}),
    "checkpointed": dmd(student={"tune": "full", "gradient_checkpointing": True}),
    "in four micro-batches": dmd(
        student={"tune": "full", "ema": 0.9}, train={"steps": 4, "batch": 32, "micro_batch": 8}
    ),
    "chains": {
        "method": "sid_protein",
        "teacher": PROTEIN,
        "data": {"train": {"source": "lengths", "shortest": 40, "longest": 64}},
        "train": {"steps": 4, "batch": 4},
    },
}


def most_allocated(recipe: dict[str, Any], folder: Path) -> int:
    """Bytes that the allocator had handed out at most, above what there was before the first of a few steps."""
    trainer = Trainer(load_recipe(recipe), folder, show=False)
    trainer.save = lambda: None  # type: ignore[method-assign]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def told(found: Plan) -> int:
    """The same, of the plan."""
    assert found.total_bytes is not None, found.unknown
    return found.total_bytes - sum(role.weights + role.ema for role in found.roles)


@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_tells_the_memory_of_a_step_within_a_tenth(tmp_path, name):
    """Of gradients, optimisers and activations together."""
    recipe = RECIPES[name]
    real, planned = most_allocated(recipe, tmp_path / "run"), told(plan(recipe))
    print(f"{name}: planned {planned / 2**20:.2f} MiB, allocated {real / 2**20:.2f} MiB")
    assert planned == pytest.approx(real, rel=0.1)


def test_checkpointing_and_bfloat16_need_less():
    """Each of its own."""
    plain = plan(dmd(student={"tune": "full"}))
    checkpointed = plan(dmd(student={"tune": "full", "gradient_checkpointing": True}))
    half = plan(dmd(student={"tune": "full"}, train={"steps": 4, "batch": 16, "precision": "bf16"}))
    assert told(checkpointed) < 0.8 * told(plain) and told(half) < 0.9 * told(plain)


def test_activations_grow_with_the_rows():
    """Twice the rows, twice the activations."""
    one, two = (plan(dmd(train={"steps": 4, "batch": n})).roles[1].activations for n in (16, 32))
    assert two / one == pytest.approx(2, rel=0.05)


def test_a_plan_without_data_says_why():
    """Memory without activations is told all the same."""
    found = plan(dmd(data={"train": {"source": "image_folder", "path": "no/such/folder", "size": 16}}))
    assert found.total_bytes is None and found.peak_bytes > 0 and "no/such/folder" in str(found.unknown)


def test_activations_that_wait_on_the_host_change_no_number(tmp_path):
    """Losses are equal bit for bit, and a device has to hold less."""
    losses = []
    for offload in (False, True):
        recipe = dmd(student={"tune": "full"})
        recipe["train"] = {**recipe["train"], "offload_activations": offload, "log_every": 1}
        trainer = Trainer(load_recipe(recipe), tmp_path / str(offload), show=False)
        trainer.save = lambda: None  # type: ignore[method-assign]
        trainer.run()
        log = (tmp_path / str(offload) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["grad_norm.student"] for line in log if "grad_norm.student" in line])
        losses.append(told(plan(recipe)))
    assert losses[0] == losses[2] and len(losses[0]) > 0
    assert losses[3] < 0.6 * losses[1]
