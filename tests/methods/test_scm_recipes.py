"""The shipped sCM recipe of a text-to-image teacher: it plans at full size, and runs and exports on tiny networks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fewstep.engine.plan import plan
from fewstep.engine.trainer import train
from fewstep.maths.angle_path import AngleFlowPath
from fewstep.models.folder import card, open_model
from fewstep.recipe import load_recipe
from fewstep.resources import config
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_sana import tiny_sana

RECIPE = config("scm/sana_sprint.yaml")
FULL = ["teacher.from={base}", "student.build.base={base}"]


def adapter() -> list[str]:
    """The overrides that the recipe's head names."""
    (line,) = [line for line in RECIPE.read_text().splitlines() if line.startswith("#   student.")]
    return line.strip("# ").split()


def test_it_loads_with_the_released_scripts_numbers():
    """log tan a, which is the logit of t, is normal with .2 + ln 2 and 1.6; guidance 4 to 5, told to the student."""
    recipe = load_recipe(RECIPE)
    c, student = recipe.build_method().config, recipe.roles["student"]
    assert (c.time.kind, c.time.scale, c.mode) == ("logit_normal", 1.6, "distill")
    assert c.time.loc == pytest.approx(0.2 + math.log(2), abs=1e-3)
    assert (c.guidance_scale, c.embedded, c.steps, c.tangent_warmup) == ((4, 5), True, (1, 2, 4), 4000)
    assert (student.optimizer.lr, student.optimizer.clip, student.optimizer.weight_decay) == (1e-6, 0.1, 1e-4)
    angle = torch.atan(2 * torch.exp(torch.tensor(0.2)))  # the median
    assert AngleFlowPath().time(angle / (torch.pi / 2)) == pytest.approx(1 / (1 + math.exp(-c.time.loc)), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("tune", "trained", "gib"), [("full", 1610.2, 35.97), ("lora", 45.9, 6.83)])
def test_it_plans_without_weights(tune, trained, gib):
    """Millions of numbers that the student trains, and the memory of one process before activations."""
    planned = plan(RECIPE, adapter() if tune == "lora" else [])
    student = next(role for role in planned.roles if role.name == "student")
    assert student.trained / 1e6 == pytest.approx(trained, abs=0.1)
    assert planned.peak_bytes / 2**30 == pytest.approx(gib, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tune", "pipeline", "family"), [("full", "SanaSprintPipeline", "sana_sprint"), ("lora", "SanaPipeline", "sana")]
)
def test_it_runs_on_a_tiny_teacher_and_its_folder_makes_the_trainers_images(tmp_path, tune, pipeline, family):
    """Two steps with the recipe's own config; a fresh process that has only diffusers checks the export."""
    base, pictures = tiny_sana(tmp_path / "base", timestep_scale=0.001), tiny_captions(tmp_path / "captions", size=32)
    words = [word.format(base=base) for word in (FULL if tune == "full" else FULL[:1])]
    words += [f"data.train.path={pictures}", "data.train.size=32", "preview=null", "config.tangent_warmup=0"]
    words += ["train={steps: 2, batch: 8, micro_batch: 4, log_every: 1}", *(adapter() if tune == "lora" else [])]
    run = train(RECIPE, tmp_path / "run", words, show=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss.consistency"]) and line["grad_norm.student"] > 0 for line in lines)
    model: Path = run.folder / "model"
    said = card(model)
    assert (said["pipeline"], said["family"], said["remote_code"]) == (pipeline, family, [])
    assert open_model(model).family == family and said["guidance_scale"] == ("embedded" if tune == "full" else "cfg")
    assert bool(list(model.glob("*lora*"))) == (tune == "lora")
