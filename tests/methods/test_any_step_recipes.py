"""The shipped recipes of any-step methods on text-to-image networks: they plan at full size, and run on tiny networks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.draws import Draw
from fewstep.engine.exporting import export_run
from fewstep.engine.plan import plan
from fewstep.engine.trainer import Trainer, train
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import addresses
from fewstep.recipe import load_recipe
from fewstep.resources import config
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_qwen_image import tiny_qwen_image
from tests.models.tiny_sana import tiny_sana
from tests.models.tiny_sd3 import tiny_sd3


class Shipped(NamedTuple):
    """A recipe, a tiny pipeline of its network's class and its picture size, and what `plan` says of it.

    trained: millions of parameters that the student trains. peak: GiB without activations.
    """

    tiny: Callable[[Path], Path]
    pixels: int
    trained: float
    peak: float


RECIPES = {
    "twinflow/sana_600m": Shipped(tiny_sana, 32, 595.0, 11.1),
    "twinflow/sana_1600m": Shipped(tiny_sana, 32, 1615.6, 30.1),
    "twinflow/sd35": Shipped(tiny_sd3, 16, 29.4, 9.6),
    "twinflow/qwen_image": Shipped(tiny_qwen_image, 16, 20450.8, 380.9),
    "twinflow/qwen_image_lora": Shipped(tiny_qwen_image, 16, 425.3, 44.4),
    "self_e/sd3": Shipped(tiny_sd3, 16, 2245.9, 77.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_plan_without_weights(name):
    """What trains, and the memory of one process before activations."""
    said, planned = RECIPES[name], plan(config(f"{name}.yaml"))
    student = next(role for role in planned.roles if role.name == "student")
    assert student.trained / 1e6 == pytest.approx(said.trained, abs=0.1)
    assert planned.peak_bytes / 2**30 == pytest.approx(said.peak, abs=0.1)


def words(name: str, root: Path) -> list[str]:
    """Overrides that put a tiny pipeline and tiny pictures in a recipe's place; everything else stays as shipped."""
    said = RECIPES[name]
    folder, pictures = said.tiny(root / "base"), tiny_captions(root / "captions", size=said.pixels)
    roles = load_recipe(config(f"{name}.yaml")).roles
    first = "teacher" if "teacher" in roles else "student"
    built = roles["student"].build
    new = f"student.build={{size: tiny, patch_size: 1, around: '{folder}'}}" if built else f"{first}.from={folder}"
    return [
        new,
        f"data.train.path={pictures}",
        f"data.train.size={said.pixels}",
        f"{first}.weights=float32",
        "train={steps: 2, batch: 8, micro_batch: 4, log_every: 1, check_export: false}",
        "preview=null",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run_on_tiny_pipelines(name, tmp_path):
    """Two steps with the recipe's own config; only sizes, folders and precision differ."""
    run = train(config(f"{name}.yaml"), tmp_path / "run", words(name, tmp_path), show=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    numbers: list[Any] = [v for line in lines for k, v in line.items() if k.startswith("loss")]
    assert numbers and all(math.isfinite(number) for number in numbers)
    assert all(line["grad_norm.student"] > 0 for line in lines)


def test_self_e_recipe_ends_with_a_fake_model_of_its_own(tmp_path):
    """The last fifth of the run, here from the first step on: a second network of the class trains beside the student."""
    late = [*words("self_e/sd3", tmp_path), "config.full_from=0", "config.fake_warmup=0"]
    run = train(config("self_e/sd3.yaml"), tmp_path / "run", late, show=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm.fake_velocity"] > 0 and math.isfinite(line["loss.fake"]) for line in lines)


@pytest.mark.parametrize(
    ("name", "lr", "betas", "ema", "order", "k", "rank"),
    [
        ("twinflow/sana_600m", 1e-4, (0.9, 0.95), 0.99, 2, 0.75, None),
        ("twinflow/sana_1600m", 1e-4, (0.9, 0.99), 0.99, 2, 0.75, None),
        ("twinflow/sd35", 1e-4, (0.9, 0.99), None, 1, 0.5, 64),
    ],
)
def test_twinflow_recipes_have_the_released_numbers(name, lr, betas, ema, order, k, rank):
    """Learning rate, betas, averaging, N, weight of the rectification; w = 1 / (1 - .8) = 1 + 4."""
    recipe = load_recipe(config(f"{name}.yaml"))
    student, c = recipe.roles["student"], recipe.build_method().config
    assert (student.optimizer.lr, student.optimizer.betas, student.optimizer.weight_decay) == (lr, betas, 0)
    assert (student.ema, c.order, c.weights["rectification"], c.metric, c.clamp) == (ema, order, k, "barron", 1)
    assert c.guidance_scale == 5 and c.guide == ("self" if rank is None else "base")
    assert (student.tune == "lora") == (rank is not None) and (rank is None or student.lora.rank == rank)
    if name.startswith("twinflow/sana"):
        assert (recipe.train.batch, recipe.train.steps) == (128, 30000)


def test_sd35_recipe_trains_all_weights_by_the_overrides_that_it_names(tmp_path):
    """The line in its head, at full size and on a tiny pipeline."""
    head = config("twinflow/sd35.yaml").read_text().splitlines()
    (line,) = [line for line in head if line.startswith("#   student.")]
    said = line.strip("# ").split()
    planned = plan(config("twinflow/sd35.yaml"), said)
    student = next(role for role in planned.roles if role.name == "student")
    assert student.trained / 1e6 == pytest.approx(2248.7, abs=0.1)
    assert planned.peak_bytes / 2**30 == pytest.approx(51.9, abs=0.1)
    run = train(config("twinflow/sd35.yaml"), tmp_path / "run", [*words("twinflow/sd35", tmp_path), *said], show=False)
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("steps", [1, 2])
def test_an_adapter_on_the_stock_pipeline_draws_the_trainers_images(steps, tmp_path):
    """Merged or as a file on the base, with averaged weights: 1 and 2 steps of one recipe's student."""
    short = "train={steps: 2, batch: 8, micro_batch: 4, log_every: 1, check_export: false}"
    asked = [*words("twinflow/sd35", tmp_path), short, "student.ema=0.9", f"config.steps={steps}"]
    trainer = Trainer(load_recipe(config("twinflow/sd35.yaml"), asked), tmp_path / "run", show=False)
    trainer.run()
    model = export_run(trainer)
    assert model is not None
    merged = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    base = DiffusionPipeline.from_pretrained(tmp_path / "base", use_safetensors=True)
    base.scheduler = merged.scheduler
    prompts = trainer.method.sources["train"].fetch(torch.arange(2), None)["prompt"]
    theirs, before = drawn(merged, prompts, steps), drawn(base, prompts, steps)
    base.load_lora_weights(model)
    ours = (trainer.method.samples(2, 0) / 2 + 0.5).clamp(0, 1)
    assert (theirs - ours).abs().max() < 1e-4 and (before - ours).abs().max() > 3e-4
    assert (drawn(base, prompts, steps) - ours).abs().max() < 1e-4


def drawn(pipeline: Any, prompts: list[str], steps: int) -> Tensor:
    """Images [rows, 3, side, side] in 0..1 from the noise that previews start from."""
    with given_noise(pipeline, addresses(Draw.for_images(0, range(len(prompts))))):
        images = images_of(pipeline, len(prompts), None, steps, 1.0, prompts)
    return torch.from_numpy(images).permute(0, 3, 1, 2)
