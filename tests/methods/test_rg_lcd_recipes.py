"""The shipped recipes of RG-LCD: they plan without weights, and run on tiny random networks of the same classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.engine.plan import plan
from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.nets.latent_reward import PromptTower
from fewstep.recipe import load_recipe
from fewstep.resources import config
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_sd import tiny_sd

KINDS = {"sd15": "sd15", "sd21": "sd21", "sdxl_lora": "sdxl"}
PROXY = ("config.mode=proxy", "config.reward_start=1", "config.proxy={width: 16, depth: 1, patch: 4, embed: 8}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines, and pictures with captions."""
    root = tmp_path_factory.mktemp("world")
    for kind in KINDS.values():
        tiny_sd(root / kind, kind)  # type: ignore[arg-type]
    tiny_captions(root / "captions")
    return root


def trainer(name: str, world: Path, out: Path, *more: str, teacher: Path | None = None) -> Trainer:
    """The recipe on the tiny world, two steps long."""
    overrides = (
        f"teacher.from={teacher or world / KINDS[name]}",
        f"data.train={{source: captions, path: {world / 'captions'}, size: 16}}",
        "config.reward=linear",
        "train={steps: 2, batch: 4, micro_batch: 2, log_every: 1, check_export: false}",
        "validate.n=2",
        "preview=null",
        *more,
    )
    return Trainer(load_recipe(config(f"rg_lcd/{name}.yaml"), overrides), out, show=False)


@pytest.mark.parametrize("name", [*KINDS, "digits", "digits_proxy"])
def test_recipe_is_planned_without_any_weights(name):
    """Sizes of teacher, student and reward are known; the reward counts as a role."""
    made = plan(config(f"rg_lcd/{name}.yaml"))
    roles = {role.name: role for role in made.roles}
    assert roles["reward"].parameters > (9e8 if name in KINDS else 1e5) and roles["reward"].trained == 0
    assert (roles["student"].shares == "teacher") == (name == "sdxl_lora")


def test_proxy_of_the_paper_s_size_is_planned():
    """Width 512, 12 blocks, and an attention pool in place of a text tower of 350 M: 44 M in all."""
    made = plan(config("rg_lcd/sd15.yaml"), ["config.mode=proxy", "config.reward_start=1000"])
    proxy = next(role for role in made.roles if role.name == "proxy")
    assert proxy.trained == proxy.parameters and 40e6 < proxy.parameters < 48e6


@pytest.mark.parametrize("name", KINDS)
def test_recipe_runs_on_tiny_networks_of_the_same_classes(world, tmp_path, name):
    """Two steps with a reward through the VAE, and a validation that reports reward and high frequencies."""
    made = trainer(name, world, tmp_path)
    before = {n: p.detach().clone() for n, p in made.handles["student"].trainable().items()}
    made.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss.consistency", "loss.reward", "reward", "high_frequency", "x0_std"} <= lines[0].keys()
    assert {"validation.reward", "validation.high_frequency", "validation.reward_8"} <= lines[-1].keys()
    assert any(not torch.equal(before[n], p) for n, p in made.handles["student"].trainable().items())
    rows = 1 if name != "sd15" else 2
    assert made.method.config.reward_rows in (None, rows)


def test_proxy_reads_latents_and_the_pipeline_s_own_text_states(world, tmp_path):
    """Proxy mode on a text-to-image student: from step 1 the student follows the proxy, which is trained from step 0."""
    made = trainer("sd15", world, tmp_path, *PROXY)
    proxy = made.handles["proxy"].module
    assert isinstance(proxy.condition, PromptTower) and proxy.image.shape == (4, 8, 8)
    before = {n: p.detach().clone() for n, p in proxy.named_parameters()}
    made.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "proxy_reward" not in lines[0] and "proxy_reward" in lines[1] and "loss.proxy" in lines[0]
    assert all((p != before[n]).any() for n, p in proxy.named_parameters() if n != "image.patches.bias")


def test_a_teacher_folder_without_its_vae_is_refused_before_training(world, tmp_path):
    """The error comes while the run is set up or at the start of its stage; nothing is logged."""
    folder = shutil.copytree(world / "sd15", tmp_path / "no_vae")
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="vae"):
        trainer("sd15", world, tmp_path / "run", teacher=folder).run()
    log = tmp_path / "run" / "metrics.jsonl"
    assert not log.exists() or not log.read_text()


def test_a_reward_whose_weights_are_absent_is_refused_before_training(world, tmp_path):
    """The recipe's own reward, with a folder that is not there."""
    said = f"config.reward={{hpsv2: {{from: {tmp_path / 'absent'}}}}}"
    with pytest.raises(UserError, match=r"config.reward.hpsv2.from.*absent"):
        trainer("sd15", world, tmp_path / "run", said)
