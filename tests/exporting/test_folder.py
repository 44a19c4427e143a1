"""What an exported folder holds, and that it is all or nothing."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from fewstep.draws import Draw
from fewstep.errors import RunFailed, UserError
from fewstep.exporting.atomic import sha256
from fewstep.exporting.card import schedule_from
from fewstep.exporting.folder import export
from fewstep.exporting.lora import LORA_FILE
from fewstep.exporting.pipeline import generate, load_pipeline
from fewstep.maths.solvers import Schedule
from fewstep.models.folder import card, open_model
from fewstep.models.registry import FAMILIES
from fewstep.nets.lora import Adapter

from .students import EPS, SHIFTED, student


def test_a_stock_folder_says_how_it_is_sampled(tmp_path):
    s = student("unet2d", SHIFTED, "ode", 4)
    evaluation = {"features": "toy-cnn", "reference": {"source": "digits"}}
    folder = s.export(tmp_path / "m", evaluation=evaluation, paper={"title": "A paper", "id": "1234.5678"})
    said = card(folder)
    assert {"unet", "scheduler", "model_index.json", "fewstep.json", "README.md"} == {p.name for p in folder.iterdir()}
    assert schedule_from(said["schedule"]) == s.schedule
    assert (said["steps"], said["nfe"], said["classes"], said["remote_code"]) == ([1, 2, 4], 4, 3, [])
    assert (said["format"], said["noise"], said["family"], said["method"]) == (1, "fn1", "unet2d", "toy")
    assert said["evaluation"] == evaluation
    assert set(said["versions"]) == {"fewstep", "diffusers", "torch"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert said["sha256"] == {weights: sha256(folder / weights)}


def test_a_student_opens_as_a_teacher_on_its_own_path(tmp_path):
    s = student("unet2d", SHIFTED, "ode", 2)
    loaded = open_model(s.export(tmp_path / "m"))
    assert (loaded.family, loaded.path) == ("unet2d", s.path)
    ours, theirs = s.module.state_dict(), loaded.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_own_pipelines_carry_their_file_and_their_defaults(tmp_path):
    s = student("dit", SHIFTED, "renoise", 2, guidance=2.0)
    folder = s.export(tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_fewstep_class_v1", "FewStepClassPipeline"]
    assert (index["default_steps"], index["default_guidance_scale"]) == (2, 2.0)
    assert card(folder)["remote_code"] == ["pipeline_fewstep_class_v1.py"]
    assert set(card(folder)["sha256"]) >= {"pipeline_fewstep_class_v1.py"}
    assert card(folder)["nfe"] == 4


@pytest.mark.parametrize("family", ["unet2d", "dit"])
def test_guidance_that_no_class_pipeline_feeds_is_folded_into_the_weights(tmp_path, family):
    s = student(family, SHIFTED, "renoise", 2)
    s.family.upgrade(s.module, ["guidance"])
    with torch.no_grad():
        for part in s.module.get_submodule("extra_inputs").parameters():
            part.add_(torch.randn_like(part) * 0.1)
    images = {}
    for scale in (1.0, 5.0):
        s.schedule = replace(s.schedule, guidance=scale, embedded=True)
        folder = s.export(tmp_path / f"{scale:g}")
        images[scale] = generate(folder, 3).images / 255
        assert (images[scale] - s.images(3)).abs().max() <= 0.5 / 255 + 1e-5
        assert (card(folder)["folded"], card(folder)["nfe"]) == ({"guidance": scale}, 2)
        assert f"{scale:g} is in the weights" in (folder / "README.md").read_text()
    assert (images[1.0] - images[5.0]).abs().max() > 0.02


def test_offered_steps_of_the_method_are_kept(tmp_path):
    s = student("unet2d")
    folder = export(s.module, s.family, s.path, s.schedule, tmp_path / "m", steps_offered=(4, 8), card={})
    assert card(folder)["steps"] == [4, 8]


def test_nothing_half_written_stays_when_saving_breaks(tmp_path, monkeypatch):
    s = student("unet2d")
    folder = s.export(tmp_path / "m")
    before = (folder / "fewstep.json").read_text()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fewstep.exporting.folder.readme", full)  # the last file of all
    for out in (tmp_path / "m", tmp_path / "new"):
        with pytest.raises(RunFailed, match="No space left"):
            s.export(out)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert (folder / "fewstep.json").read_text() == before
    assert generate(folder, 1).images.shape == (1, 1, 8, 8)


def test_an_earlier_export_is_replaced_and_other_things_are_not(tmp_path):
    s = student("unet2d")
    folder = s.export(tmp_path / "m", note="first")
    assert card(s.export(folder, note="second"))["note"] == "second"
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.png").write_bytes(b"cat")
    with pytest.raises(UserError, match="no export of fewstep"):
        s.export(precious)
    assert (precious / "cat.png").exists()


def test_a_schedule_that_no_scheduler_makes_leaves_no_folder(tmp_path):
    s = student("unet2d")
    with pytest.raises(UserError, match="no diffusers scheduler"):
        export(s.module, s.family, s.path, Schedule("ode", (0.9, 0.2)), tmp_path / "m", card={})
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_also_written_as_a_lora_file_with_its_schedule(tmp_path):
    s = student("unet2d")
    adapter = Adapter(s.module, 2, 2.0, ["conv1"])
    folder = export(s.module, s.family, s.path, s.schedule, tmp_path / "m", card={}, adapter=adapter)
    assert card(folder)["lora"] == LORA_FILE and LORA_FILE in card(folder)["sha256"]
    with safe_open(folder / LORA_FILE, "pt") as file:
        said, keys = json.loads(file.metadata()["fewstep"]), list(file.keys())
    assert schedule_from(said["schedule"]) == s.schedule
    assert all(key.startswith("unet.") for key in keys)
    load_pipeline(folder)  # the extra file disturbs nothing


def test_networks_that_do_not_generate_are_saved_as_their_family_does(tmp_path):
    cnn = FAMILIES.get("cnn").build(width=4, classes=2)
    folder = export(cnn.module, FAMILIES.get("cnn"), None, None, tmp_path / "m", card={"method": "ferkd"})
    said = card(folder)
    assert (said["family"], said["method"]) == ("cnn", "ferkd") and "schedule" not in said
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "fewstep.json", "README.md"}
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(open_model(folder).module.eval()(x), cnn.module.eval()(x))


def test_a_family_without_pipeline_still_says_its_schedule(tmp_path):
    family = FAMILIES.get("gaussian")
    loaded = family.build()
    folder = export(loaded.module, family, loaded.path, Schedule.uniform(2), tmp_path / "m", card={})
    assert card(folder)["schedule"]["u"] == [1.0, 0.5]
    assert not (folder / "model_index.json").exists()
    assert open_model(folder).path == loaded.path


def test_latents_are_decoded_by_the_vae_in_the_folder(tmp_path):
    torch.manual_seed(1)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    s = student("dit", SHIFTED)
    around: Any = SimpleNamespace(parts=lambda: {"vae": vae.eval()})
    folder = export(s.module, s.family, s.path, s.schedule, tmp_path / "m", card={}, around=around)
    latents = 2 * _unclamped(s, 2)
    with torch.no_grad():
        wanted = (vae.decode(latents + 0.25).sample / 2 + 0.5).clamp(0, 1)
    assert (generate(folder, 2).images / 255 - wanted).abs().max() < 0.5 / 255 + 1e-4
    assert generate(folder, 2).images.shape == (2, 1, 16, 16)


def _unclamped(s, n):
    from fewstep.data.batch import Cond
    from fewstep.maths.solvers import sample
    from fewstep.models.denoiser import Denoiser
    from fewstep.roles import Handle, Role, RoleSpec

    handle = Handle(Role("student"), s.module, RoleSpec(), "frozen", None, s.family.name, s.path)
    draw = Draw.for_images(0, range(n))
    return sample(Denoiser.of(handle), s.schedule, Cond(label=s.labels(n)), draw, s.family.row_shape(s.module))


@pytest.mark.parametrize(("family", "path"), [("unet2d", SHIFTED), ("dit", EPS)], ids=["stock", "own"])
def test_the_model_card_shows_how_to_load_and_sample(tmp_path, family, path):
    scores = [{"who": "student", "steps": 4, "fid[toy]": 0.1}]
    folder = student(family, path).export(
        tmp_path / "m", scores=scores, licence="mit", paper={"title": "A paper", "id": "1234.5678"}
    )
    text = (folder / "README.md").read_text()
    assert "license: mit" in text and "library_name: diffusers" in text
    assert "A paper, 1234.5678" in text
    assert ("trust_remote_code=True" in text) == (family == "dit")
    assert "num_inference_steps=4" in text and "| guidance scale (1 = off) | 1.0 |" in text
    assert "| who | steps | fid[toy] |" in text
