"""The whole path for text to image: captions, encoders, training, export, and the stock pipeline in a fresh process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.engine.exporting import check_export, export, export_run
from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.models.folder import card
from fewstep.recipe import load_recipe
from fewstep.resources import config
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_qwen_image import tiny_qwen_image
from tests.models.tiny_sd import tiny_sd

SMALL = [
    "train.steps=3",
    "train.batch=4",
    "train.micro_batch=2",
    "train.save_every=null",
    "train.precision=fp32",
    "preview=null",
    "student.optimizer.lr=1e-3",
    "student.optimizer.warmup=0",
]
METHODS = {
    "scott": ["heads.optimizer.lr=1e-3"],
    "rg_lcd": ["config.reward={linear: {direction: brightness}}", "validate=null"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """A tiny pipeline and captioned pictures."""
    root = tmp_path_factory.mktemp("text_to_image")
    return {"teacher": tiny_sd(root / "teacher"), "captions": tiny_captions(root / "captions")}


def trained(method: str, places: dict[str, Path], out: Path) -> Trainer:
    """The method's SD1.5 recipe, run for three steps on tiny weights of the same classes."""
    where = [f"teacher.from={places['teacher']}", f"data.train.path={places['captions']}", "data.train.size=16"]
    recipe = load_recipe(config(f"{method}/sd15.yaml"), [*where, *SMALL, *METHODS[method]])
    trainer = Trainer(recipe, out, show=False)
    trainer.run()
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_the_stock_pipeline_makes_the_trainers_images_in_a_fresh_process(method, places, tmp_path):
    """A w-embedded student on an eps-prediction teacher: LCMScheduler on the 50 grid, guidance_scale fed to the network."""
    trainer = trained(method, places, tmp_path / "run")
    model = export_run(trainer)  # reloads it in a fresh process already, and raises when the images differ
    said = card(model)
    assert said["pipeline"] == "StableDiffusionPipeline" and said["remote_code"] == []
    assert json.loads((model / "scheduler/scheduler_config.json").read_text())["original_inference_steps"] == (
        1000 if method == "scott" else 50
    )
    assert said["schedule"]["embedded"] and said["nfe"] == 8
    assert check_export(trainer.method, model, rows=3, seed=5) < 1e-3


def test_training_changes_the_images(places, tmp_path):
    """What is compared above is the student's doing, not the teacher's."""
    trainer = trained("rg_lcd", places, tmp_path / "run")
    method: Any = trainer.method
    moved = method.samples(2, 0)
    for p, kept in zip(method.student.ema.values(), method.teacher.module.parameters()):
        p.copy_(kept) if p.shape == kept.shape else None
    assert (method.samples(2, 0) - moved).abs().max() > 1e-3


def test_heads_and_proxies_are_made_for_the_pictures_own_size(places, tmp_path):
    """Of networks that take any: 8x8 latents are 4x4 tokens to Qwen-Image, which without data would draw 64x64."""
    data = {"source": "captions", "path": str(places["captions"]), "size": 16}
    said = {"teacher": str(tiny_qwen_image(tmp_path / "qwen")), "data": {"train": data}}
    said["train"] = {"steps": 1, "batch": 2, "check_export": False}
    critics = load_recipe({**said, "method": "decoupled_dmd", "config": {"regulariser": "gan"}})
    trainer = Trainer(critics, tmp_path / "dmd", show=False)
    trainer.run()
    assert trainer.handles["discriminator"].module.heads[0][0].side == 4
    proxy = {"mode": "proxy", "reward_start": 1, "proxy": {"width": 8, "depth": 1, "patch": 2}}
    rewarded = load_recipe({**said, "method": "rg_lcd", "config": {"reward": {"linear": {}}, **proxy}})
    Trainer(rewarded, tmp_path / "rg_lcd", show=False).run()
    again = export(tmp_path / "dmd", tmp_path / "again")
    assert card(again)["size"] == [16, 16]


def test_without_a_vae_the_run_ends_before_it_starts(places, tmp_path):
    """RG-LCD decodes: a teacher folder without vae/ is refused in one line."""
    teacher = shutil.copytree(places["teacher"], tmp_path / "teacher")
    shutil.rmtree(teacher / "vae")
    with pytest.raises(UserError, match="has no vae/: copy the pipeline's vae folder there"):
        trained("rg_lcd", {**places, "teacher": teacher}, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_the_recipe_for_one_card_of_24_gb_trains_on_a_bfloat16_base_and_cached_prompts(tmp_path):
    """As shipped but for sizes; its folder, merged in float32, is the trainer's student, and the base is what it was."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nred boats\ntwo owls\n")
    recipe = load_recipe(
        config("decoupled_dmd/sdxl_lora_24gb.yaml"),
        [
            f"teacher.from={tiny_sd(tmp_path / 'teacher', 'sdxl')}",
            f"data.train.path={tmp_path / 'prompts.txt'}",
            f"data.train.cache={tmp_path / 'cache'}",
            "train={steps: 6, batch: 4, micro_batch: 2, precision: bf16, check_export: true}",
            "preview=null",
        ],
    )
    trainer = Trainer(recipe, tmp_path / "run", show=False)
    before = {name: p.clone() for name, p in trainer.handles["teacher"].module.named_parameters()}
    trainer.run()
    student = trainer.handles["student"]
    assert student.narrow and any(up.weight.any() for up in student.adapter.up.values())
    model = export_run(trainer)  # and holds the folder's images to the student's own, in float32
    assert model is not None and card(model)["pipeline"] == "StableDiffusionXLPipeline"
    after = dict(student.module.named_parameters())
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, before[name]) for name, p in after.items())
    assert list((tmp_path / "cache").glob("*/*.safetensors"))
