"""From a run to a folder: the path of the student is settled before training, and the folder is held to the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.registry import make_source
from fewstep.draws import Draw
from fewstep.engine.exporting import check_export, export, export_run, meet_export
from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.exporting import reload
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import addresses, load_pipeline
from fewstep.models.folder import card
from fewstep.recipe import load_recipe
from fewstep.roles import assemble
from tests.conftest import TINY_UNET
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_sd import tiny_sd

VP = {"kind": "vp", "beta_schedule": "linear", "beta_end": 0.01}


def _bound(config: dict[str, Any], path: dict[str, Any]) -> Any:
    """An LCM on a tiny pixel network, as the trainer sets it up."""
    recipe = load_recipe(
        {
            "method": "lcm",
            "teacher": {"from": "unet2d", "build": {**TINY_UNET, "path": path}},
            "config": {"guidance_scale": 1.0, **config},
            "data": {"train": {"source": "digits"}},
            "train": {"steps": 1, "batch": 4},
        }
    )
    method = recipe.build_method()
    handles = assemble(method.roles(), recipe.roles, 0)
    method.bind(handles, {"train": make_source({"source": "digits"})}, {})
    meet_export(method, handles)
    return method


def test_a_student_of_lcms_grid_keeps_its_path_and_picks_lcms_levels():
    method = _bound({}, VP)
    assert method.student.path == method.teacher.path
    levels = [round(1000 * u) for u in method.schedule().u]
    assert (levels, method.schedule().origin) == ([999, 879, 759, 639, 499, 379, 259, 139], 50)


def test_steps_that_miss_the_flow_grid_are_refused_before_training():
    assert _bound({"steps": (1, 3, 8)}, {"kind": "flow"}).levels == 48
    with pytest.raises(UserError, match="5 steps would visit levels that are not among the 48 trained"):
        _bound({"steps": (5, 8)}, {"kind": "flow"})


def test_levels_that_lcm_scheduler_cannot_pick_from_are_refused_before_training():
    with pytest.raises(UserError, match="picked from 50"):
        _bound({"levels": 48}, VP)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text")
    tiny_sd(root / "base")
    tiny_captions(root / "pictures")
    return root


def _text_run(places: Path, name: str, student: dict[str, Any], config: dict[str, Any]) -> Trainer:
    recipe = {
        "method": "lcm",
        "teacher": {"from": str(places / "base")},
        "student": student,
        "config": {"steps": [1, 2], **config},
        "data": {"train": {"source": "captions", "path": str(places / "pictures"), "size": 16}},
        "train": {"steps": 2, "batch": 4, "save_every": 1, "check_export": False},
    }
    trainer = Trainer(load_recipe(recipe), places / name, show=False)
    trainer.run()
    export_run(trainer)
    return trainer


@pytest.mark.parametrize(
    ("name", "student", "config", "means", "range_"),
    [
        ("embedded", {"optimizer": {"lr": 0.05}}, {"guidance_scale": (2.0, 6.0)}, "embedded", [2.0, 6.0]),
        ("lora", {"tune": "lora", "optimizer": {"lr": 0.05}}, {"guidance_scale": 3.0}, "baked", None),
    ],
)
def test_the_folder_of_a_text_run_is_held_to_the_methods_own_samples(
    places, monkeypatch, name, student, config, means, range_
):
    trainer = _text_run(places, name, student, config)
    monkeypatch.setattr(reload, "fresh_samples", _here)
    trainer.handles["student"].autocast = torch.bfloat16  # as with train.precision: bf16
    assert check_export(trainer.method, trainer.folder / "model") < 1e-4
    assert trainer.handles["student"].autocast is torch.bfloat16
    said = card(trainer.folder / "model")
    assert (said["guidance_scale"], said.get("guidance_range")) == (means, range_)
    assert (said["schedule"]["origin"], said["steps"], said["nfe"]) == (50, [1, 2], 2)
    assert ("lora" in said) == (name == "lora")


def test_a_checkpoint_of_a_text_run_is_exported_and_checked_with_its_encoders(places, monkeypatch):
    run = _text_run(places, "again", {"optimizer": {"lr": 0.05}}, {"guidance_scale": 3.0}).folder
    monkeypatch.setattr(reload, "fresh_samples", _here)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("check_export: false", "check_export: true"))
    early, late = export(run, places / "early", step=1), export(run, places / "late")
    assert card(early)["training_steps"] == 1
    assert {"vae", "text_encoder", "tokenizer"} <= {p.name for p in early.iterdir()}
    assert not torch.equal(_images(early), _images(run / "model"))
    assert torch.equal(_images(late), _images(run / "model"))


def _here(
    folder: Path, said: dict[str, Any], given: dict[str, torch.Tensor], prompts: list[str], _steps: Any = ()
) -> torch.Tensor:
    """`fresh_samples` without its process."""
    pipeline = load_pipeline(folder, device="cpu")
    with given_noise(pipeline, lambda i, shape: given.get(f"noise.{i}", torch.zeros(shape))):
        schedule = said["schedule"]
        images = images_of(
            pipeline, len(given["noise.0"]), None, len(schedule["u"]), schedule["guidance"], list(prompts)
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _images(folder: Path) -> torch.Tensor:
    draw = addresses(Draw.for_images(0, range(1)))
    return _here(folder, card(folder), {f"noise.{i}": draw(i, (1, 4, 8, 8)) for i in range(2)}, ["a cat"])


def test_a_finished_run_is_exported_without_its_judge(tmp_path, monkeypatch):
    """The reward's weights may be gone by then: nothing of it is in the model."""
    recipe = {
        "method": "rg_lcd",
        "teacher": {"from": "unet2d", "build": TINY_UNET},
        "config": {"guidance_scale": 1.0, "steps": [1], "reward": "linear"},
        "data": {"train": {"source": "digits"}},
        "train": {"steps": 1, "batch": 2, "check_export": False},
    }
    trainer = Trainer(load_recipe(recipe), tmp_path / "run", show=False)
    trainer.run()
    monkeypatch.setattr("fewstep.methods.diffusion.rg_lcd.make_reward", None)
    model = export(tmp_path / "run", tmp_path / "model")
    assert card(model)["method"] == "rg_lcd"
