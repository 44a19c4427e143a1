"""The shipped recipes of SCott: they plan at full size, and run as they are on tiny networks of the same classes."""

from __future__ import annotations

import json
import math

import pytest

from fewstep.engine.plan import plan
from fewstep.engine.trainer import train
from fewstep.errors import UserError
from fewstep.methods.diffusion.scott import SCott
from fewstep.recipe import load_recipe
from fewstep.resources import config
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_sd import tiny_sd

LATENT = {"sd15": "sd15", "sd21": "sd21", "sdxl_lora": "sdxl"}


@pytest.mark.slow
@pytest.mark.parametrize("name, adapter, peak", [("sd15", 12.8, 19.4), ("sd21", 13.3, 19.6), ("sdxl_lora", 92.9, 12.7)])
def test_latent_recipes_plan_without_weights(name, adapter, peak):
    """Millions of parameters in D's rank-64 adapter; GiB at the peak without activations."""
    planned = plan(config(f"scott/{name}.yaml"))
    roles = {role.name: role for role in planned.roles}
    assert roles["discriminator"].shares == "teacher" and roles["heads"].trained == 1281
    assert roles["discriminator"].trained / 1e6 == pytest.approx(adapter, abs=0.1)
    assert planned.peak_bytes / 2**30 == pytest.approx(peak, abs=0.1)
    assert (roles["student"].shares == "teacher") == (name == "sdxl_lora")


@pytest.mark.parametrize("name", LATENT)
def test_latent_recipes_run_on_tiny_pipelines(name, tmp_path):
    """Two steps with the recipe's own config; only sizes, folders and precision differ."""
    folder = tiny_sd(tmp_path / "teacher", LATENT[name])
    words = [
        f"teacher.from={folder}",
        f"data.train.path={tiny_captions(tmp_path / 'captions')}",
        "data.train.size=16",
        "train={steps: 2, batch: 2, micro_batch: 1, log_every: 1, check_export: false}",
        "preview=null",
    ]
    run = train(config(f"scott/{name}.yaml"), tmp_path / "run", words, show=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    terms = ("loss.consistency", "loss.adversarial", "loss.discriminator", "x0_std", "logits_real", "logits_fake")
    assert all(math.isfinite(line[term]) for line in lines for term in terms)
    assert all(line[f"grad_norm.{role}"] > 0 for line in lines for role in ("student", "discriminator", "heads"))


def test_digits_recipe_loses_its_discriminator_by_one_override(tmp_path):
    """The recipe speaks of roles that are then not used, and trains on real digits with and without them."""
    short = ["train={steps: 2, batch: 4, log_every: 1, check_export: false}", "preview=null"]
    for name, words in (("with", []), ("without", ["config.adversarial=null"])):
        run = train(config("scott/digits.yaml"), tmp_path / name, [*short, *words], show=False)
        last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert ("loss.discriminator" in last) == (name == "with") and math.isfinite(last["loss.consistency"])


@pytest.mark.parametrize("name", LATENT)
def test_latent_recipes_have_the_papers_knobs(name):
    """eta 1, h 3, k 24 of 1000, lambda .4, EMA .95, rank 64, D's rate 2e-5."""
    recipe = load_recipe(config(f"scott/{name}.yaml"))
    method = recipe.build_method()
    assert isinstance(method, SCott)
    c, roles = method.config, recipe.roles
    assert (c.eta, c.substeps, c.skip, c.weights["adversarial"]) == (1, 3, 0.024, 0.4)
    assert roles["student"].ema == 0.95
    assert (roles["discriminator"].lora.rank, roles["discriminator"].optimizer.lr) == (64, 2e-5)


def test_noise_from_pure_noise_is_refused_on_the_path_that_is_exported(tmp_path):
    """The shipped teacher's own path begins at t = .999, the exported student's at 1: the command ends before a step."""
    recipe = load_recipe(config("scott/digits.yaml"), ["config.eta_range=[0, 1]"])
    with pytest.raises(UserError, match=r"write config.eta_range=\[0, 0.98\]"):
        train(recipe, tmp_path / "run", show=False)
    assert not (tmp_path / "run" / "checkpoints").exists()
