"""The shipped recipes of LCM, consistency models and PCM: planned at full size, run on tiny networks of the same classes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fewstep.engine.plan import plan
from fewstep.engine.trainer import train
from fewstep.recipe import load_recipe
from fewstep.resources import config
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_sd import tiny_sd

LATENT = {"lcm/sd15": "sd15", "lcm/sd15_lora": "sd15", "lcm/sdxl_lora": "sdxl", "pcm/sd15_lora": "sd15"}
SHORT = ("train={steps: 2, batch: 4, micro_batch: 2, log_every: 1, check_export: false}", "preview=null")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines, and pictures with captions."""
    root = tmp_path_factory.mktemp("world")
    for kind in set(LATENT.values()):
        tiny_sd(root / kind, kind)  # type: ignore[arg-type]
    tiny_captions(root / "captions")
    return root


def lines(folder: Path) -> list[dict]:
    """What a run has logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", LATENT)
def test_latent_recipes_plan_without_weights(name):
    """Adapters share the teacher's weights; the w-embedded student is a copy with one layer more."""
    roles = {role.name: role for role in plan(config(f"{name}.yaml")).roles}
    assert (roles["student"].shares == "teacher") == name.endswith("lora")
    if name == "lcm/sd15":
        extra = roles["student"].parameters - roles["teacher"].parameters
        assert extra == 256 * 320  # the bias-free projection of a 256-wide embedding of w


@pytest.mark.parametrize("name", LATENT)
def test_latent_recipes_run_on_tiny_pipelines(name, world, tmp_path):
    """Two steps with the recipe's own config; only sizes, folders and precision differ."""
    words = [
        f"teacher.from={world / LATENT[name]}",
        f"data.train={{source: captions, path: {world / 'captions'}, size: 16}}",
        *SHORT,
    ]
    run = train(config(f"{name}.yaml"), tmp_path / "run", words, show=False)
    logged = lines(run.folder)
    assert math.isfinite(logged[0]["loss.consistency"]) and logged[0]["grad_norm.student"] > 0
    if name.startswith("pcm"):
        assert math.isfinite(logged[0]["loss.adversarial"]) and math.isfinite(logged[1]["loss.discriminator"])
        assert logged[1]["grad_norm.discriminator"] > 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("lcm", []),
        ("consistency", []),
        ("consistency", ["config.mode=train", "config.levels=160"]),
        ("consistency", ["config.mode=improved", "config.double_every=1"]),
        ("pcm", []),
        ("pcm", ["config.adversarial=true"]),
    ],
)
def test_digits_recipes_run_in_each_of_their_forms(name, words, tmp_path):
    """Two steps on real digits. Without a teacher the student starts from the shipped weights here."""
    words = [*words, *SHORT]
    recipe = load_recipe(config(f"{name}/digits.yaml")).plain()
    if any("mode" in word for word in words):
        recipe["student"] = {**recipe["student"], "from": recipe.pop("teacher")["from"]}
    run = train(load_recipe(recipe, words), tmp_path / "run", show=False)
    logged = lines(run.folder)
    assert math.isfinite(logged[0]["loss.consistency"]) and logged[0]["grad_norm.student"] > 0


def test_recipes_have_the_papers_knobs():
    """LCM: EMA .95, fifty levels, w of 2 to 14; LoRA: rank 64, 1e-4, no average. PCM: rank 64, 5e-6, Huber 1e-3."""
    full = load_recipe(config("lcm/sd15.yaml"))
    assert full.roles["student"].ema == 0.95 and full.build_method().config.guidance_scale == (3.0, 15.0)
    assert full.build_method().config.embedded and full.build_method().config.levels is None
    for name in ("lcm/sd15_lora", "lcm/sdxl_lora"):
        student = load_recipe(config(f"{name}.yaml")).roles["student"]
        assert (student.lora.rank, student.optimizer.lr, student.ema) == (64, 1e-4, None)
    phased = load_recipe(config("pcm/sd15_lora.yaml"))
    student, said = phased.roles["student"], phased.build_method().config
    assert (student.lora.rank, student.optimizer.lr, student.optimizer.weight_decay) == (64, 5e-6, 1e-3)
    assert (said.huber_c, said.guidance_scale, said.embedded, said.levels) == (1e-3, (5.0, 6.0), False, 48)
