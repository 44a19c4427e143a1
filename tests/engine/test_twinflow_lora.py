"""TwinFlow into an adapter, on a stock class end to end: its LoRA file on the base, in a process that has only diffusers.

The second time is told by the label t - s / 2, which at s = 0 is the label that every stock pipeline gives; so what the
trainer samples by `few` is what `load_lora_weights` and the exported scheduler make.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.draws import Draw
from fewstep.engine.exporting import check_export, export_run
from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.exporting import fresh
from fewstep.exporting.pipeline import addresses
from fewstep.models.folder import card
from fewstep.recipe import load_recipe
from fewstep.resources import config
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_qwen_image import SCHEDULER, tiny_qwen_image

ROWS, SEED = 2, 5
SMALL = [
    "train.steps=3",
    "train.batch=8",
    "train.micro_batch=4",
    "train.save_every=null",
    "train.precision=fp32",
    "teacher.weights=float32",
    "train.check_export=false",  # once, below
    "preview=null",
    "student.optimizer.lr=3e-3",
    "student.lora={rank: 4, alpha: 8, targets: wide}",
]
# What a user types, from the card; then given noise instead of a generator.
SCRIPT = """
import re, sys
for name in ("fewstep", "fewstep_pipelines", "fewstep_kernels"):
    sys.modules[name] = None
base, model, request, answer, place = sys.argv[1:]
sys.path.insert(0, place)
import fresh, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
said = re.findall("```python\\n(.*?)```", (Path(model) / "README.md").read_text(), re.S)[1]
load, call = said.replace("BASE", base).replace("FOLDER", model).split("image = pipe(")
exec(load)
assert "num_inference_steps=2, height=16, width=16" in call and "guidance_scale" not in call
given = load_file(request)
prompts = Path(request).with_suffix(".txt").read_text().split("\\n")
images = {}
for adapted in (True, False):
    pipe.enable_lora() if adapted else pipe.disable_lora()
    for steps in (1, 2):
        with fresh.given_noise(pipe, lambda i, shape: given[f"noise.{i}"]):
            made = fresh.images_of(pipe, len(prompts), None, steps, None, prompts, (16, 16))
        name = f"{'adapted' if adapted else 'base'}.{steps}"
        images[name] = torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()
save_file(images, answer)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline and captioned pictures."""
    root = tmp_path_factory.mktemp("twinflow")
    return {"base": tiny_qwen_image(root / "base"), "captions": tiny_captions(root / "captions")}


def recipe(places: dict[str, Path], *more: str) -> Any:
    """The shipped one on the tiny pipeline."""
    where = [f"teacher.from={places['base']}", f"data.train.path={places['captions']}", "data.train.size=16"]
    return load_recipe(config("twinflow/qwen_image_lora.yaml"), [*where, *SMALL, *more])


@pytest.fixture(scope="module")
def run(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """Three steps, and the exported folder."""
    trainer = Trainer(recipe(places), tmp_path_factory.mktemp("run") / "r", show=False)
    trainer.run()
    model = export_run(trainer)
    assert model is not None
    return trainer, model


def samples(trainer: Trainer, steps: int) -> Tensor:
    """The trainer's own images in 0..1, in one or two steps."""
    method: Any = trainer.method
    kept = method.config
    method.config = kept.model_copy(update={"steps": steps})
    made = method.samples(ROWS, SEED)
    method.config = kept
    return (made / 2 + 0.5).clamp(0, 1)


def fresh_images(run: tuple[Trainer, Path], base: Path, place: Path) -> dict[str, Tensor]:
    """Those of the stock pipeline in `base` with the exported scheduler and the adapter file, elsewhere."""
    trainer, model = run
    draw, shape = addresses(Draw.for_images(SEED, np.arange(ROWS))), (ROWS, 4, 8, 8)
    request, answer = place / "request.safetensors", place / "answer.safetensors"
    save_file({f"noise.{i}": noise for i, noise in ((i, draw(i, shape).contiguous()) for i in range(3))}, request)
    texts = trainer.method.sources["train"].fetch(torch.arange(ROWS), None)["prompt"]
    request.with_suffix(".txt").write_text("\n".join(texts))
    arguments = [base, model.resolve(), request, answer, Path(fresh.__file__).parent]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(answer)


def test_the_stock_pipeline_with_the_adapter_file_makes_the_trainers_images(run, places, tmp_path):
    """1 and 2 steps to 1e-3; the base without the adapter is far from them."""
    theirs = fresh_images(run, places["base"], tmp_path)
    ours = {steps: samples(run[0], steps) for steps in (1, 2)}
    for steps, images in ours.items():
        torch.testing.assert_close(theirs[f"adapted.{steps}"], images, atol=1e-3, rtol=0)
        assert (theirs[f"base.{steps}"] - images).abs().max() > 1e-2
    assert (ours[1] - ours[2]).abs().max() > 1e-2


@pytest.mark.slow
def test_the_merged_folder_makes_the_trainers_images_too(run):
    """The stock pipeline in a fresh process, no code of the folder, no guidance."""
    trainer, model = run
    assert check_export(trainer.method, model, rows=ROWS, seed=SEED) < 1e-3
    said = card(model)
    assert (said["pipeline"], said["scheduler"]) == ("QwenImagePipeline", "FlowMatchLCMScheduler")
    assert (said["remote_code"], said["guidance_scale"], said["nfe"]) == ([], "none", 2)
    assert said["size"] == [16, 16] and said["schedule"]["target"] == "zero"


def test_the_scheduler_is_static_where_the_bases_is_not(run):
    """The base's levels are shifted by size and end at .02; a student's are those it was trained on."""
    made = json.loads((run[1] / "scheduler" / "scheduler_config.json").read_text())
    assert (made["use_dynamic_shifting"], made["shift_terminal"], made["shift"]) == (False, None, 1.0)
    assert SCHEDULER["use_dynamic_shifting"] and SCHEDULER["shift_terminal"] == 0.02


def test_the_adapter_reaches_the_time_embedding(run):
    """Labels mean something new: peft's names under the pipeline's prefix, with alpha, and the schedule beside them."""
    file = run[1] / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        names, said = set(opened.keys()), opened.metadata()
    assert {f"transformer.time_text_embed.timestep_embedder.linear_{i}.lora_A.weight" for i in (1, 2)} < names
    assert json.loads(said["lora_adapter_metadata"])["transformer.lora_alpha"] == 8
    assert json.loads(said["fewstep"])["schedule"]["u"] == [1.0, 0.5]


def test_an_adapter_is_sampled_by_few_alone(places, tmp_path):
    """A stock pipeline's label says s = 0; other samplers are refused before a step is taken."""
    with pytest.raises(UserError, match="write few"):
        Trainer(recipe(places, "config.sampler=any"), tmp_path / "r", show=False).run()
