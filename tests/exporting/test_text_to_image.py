"""Stock text-to-image pipelines, loaded from an exported folder, make the images of `maths.solvers.sample`."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from fewstep.draws import Draw
from fewstep.errors import RunFailed, UserError
from fewstep.evaluation.nfe import count_calls
from fewstep.exporting import reload
from fewstep.exporting.card import schedule_from
from fewstep.exporting.doctor import doctor
from fewstep.exporting.folder import export
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.grids import trained_pairs
from fewstep.exporting.pipeline import addresses, generate, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import TARGETS
from fewstep.models.folder import card, open_model
from fewstep.models.registry import FAMILIES

from .students import on_grid
from .text_students import PROMPTS, text_student

ROWS = [  # model, kind, guidance, embedded, origin -> pipeline, scheduler, calls an image
    ("sd15", "renoise", 1.0, False, 50, "StableDiffusionPipeline", "LCMScheduler", 4),
    ("sd15", "renoise", 5.0, True, 50, "StableDiffusionPipeline", "LCMScheduler", 4),
    ("sd21", "ode", 3.0, False, None, "StableDiffusionPipeline", "DDIMScheduler", 8),
    ("sdxl", "renoise", 4.0, True, 50, "StableDiffusionXLPipeline", "LCMScheduler", 4),
    ("sdxl", "ode", 1.0, False, None, "StableDiffusionXLPipeline", "DDIMScheduler", 4),
]


def _stock(pipeline, guidance, steps=4, prompts=PROMPTS):
    with given_noise(pipeline, addresses(Draw.for_images(0, range(len(prompts))))):
        images = images_of(pipeline, len(prompts), None, steps, guidance, prompts)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("model", "kind", "guidance", "embedded", "origin", "pipeline", "scheduler", "calls"), ROWS)
def test_the_stock_pipeline_makes_the_solvers_images(
    tmp_path, model, kind, guidance, embedded, origin, pipeline, scheduler, calls
):
    s = text_student(tmp_path / "base", model, kind, 4, guidance, embedded, origin)
    folder = s.export(tmp_path / "m")
    loaded = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    assert (type(loaded).__name__, type(loaded.scheduler).__name__) == (pipeline, scheduler)
    fed = []
    loaded.unet.register_forward_pre_hook(lambda _, args: fed.append(float(args[1])))
    with count_calls(loaded.unet) as counted:
        theirs = _stock(loaded, guidance)
    assert (theirs - s.images()).abs().max() < 1e-4
    assert theirs.std() > 0.05 and (theirs[0] - theirs[1]).abs().max() > 1e-3
    assert fed == [label for label, _ in trained_pairs(s.handle.path, s.schedule.u)]
    assert counted.per_image(len(PROMPTS)) == card(folder)["nfe"] == calls


def test_every_text_row_of_the_table_is_held_to_the_solver():
    vp = [target for target in TARGETS if target.embeds and target.path == "vp"]  # FLUX.1: tests/models
    assert {(t.kind, t.pipeline_name, t.scheduler) for t in vp} == {(row[1], row[5], row[6]) for row in ROWS}


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    root = tmp_path_factory.mktemp("baked")
    s = text_student(root / "base", "sd15", "renoise", 4, origin=50)
    return s, s.export(root / "m")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedded")
    s = text_student(root / "base", "sd15", "renoise", 2, guidance=5.0, embedded=True, origin=50)
    return s, s.export(root / "m", guidance_range=[3.0, 15.0])


def test_guidance_scale_changes_nothing_on_a_student_of_fixed_guidance(baked):
    s, folder = baked
    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    swept = [_stock(pipeline, scale) for scale in (None, 1.0, 3.0, 7.5)]
    assert all(torch.equal(images, swept[0]) for images in swept)
    assert (swept[0] - s.images()).abs().max() < 1e-4


def test_guidance_scale_is_fed_to_a_student_that_has_the_input(embedded):
    s, folder = embedded
    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    swept = {scale: _stock(pipeline, scale, steps=2) for scale in (1.0, 3.0, 5.0, 7.5, 14.0)}
    for scale, images in swept.items():
        assert (images - s.images(guidance=scale)).abs().max() < 1e-4
    assert (swept[3.0] - swept[5.0]).abs().max() > 1e-3


def test_the_folder_is_a_whole_pipeline(baked):
    _, folder = baked
    index = json.loads((folder / "model_index.json").read_text())
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
    said = card(folder)
    assert (said["prompts"], said["classes"], said["remote_code"]) == (True, None, [])
    assert (said["guidance_scale"], said["schedule"]["origin"], said["steps"]) == ("baked", 50, [1, 2, 3, 4])
    assert "guidance_scale is ignored" in (folder / "README.md").read_text()


def test_an_exported_student_opens_as_a_teacher(embedded):
    s, folder = embedded
    loaded = open_model(folder)
    assert (loaded.family, loaded.path) == ("stable_diffusion", s.handle.path)
    assert loaded.around is not None and loaded.around.parts()["vae"] is not None


def test_a_lora_file_on_the_base_equals_the_merged_export(tmp_path):
    s = text_student(tmp_path / "base", "sd15", "renoise", 4, origin=50, lora=True)
    folder = s.export(tmp_path / "m")
    merged = load_pipeline(folder, device="cpu")
    pipeline = StableDiffusionPipeline.from_pretrained(s.base, use_safetensors=True, safety_checker=None)
    pipeline.scheduler = type(merged.scheduler).from_pretrained(folder, subfolder="scheduler")
    without = _stock(pipeline, 1.0)
    pipeline.load_lora_weights(folder)
    adapted = _stock(pipeline, 1.0)
    assert (adapted - _stock(merged, None)).abs().max() < 1e-4
    assert (adapted - s.images()).abs().max() < 1e-4
    assert (adapted - without).abs().max() > 1e-2


def test_a_fresh_process_draws_the_same_prompts(embedded):
    s, folder = embedded
    noise = addresses(Draw.for_images(0, range(3)))
    start, *later = [noise(i, (3, 4, 8, 8)) for i in range(2)]
    assert reload_check(folder, 2 * s.images() - 1, start, None, later, PROMPTS) < 1e-4


def test_decoded_images_may_differ_in_float32_sums_and_no_more(embedded, monkeypatch):
    s, folder = embedded
    images = s.images().clamp(0.1, 0.9)
    for off in (5e-4, 2e-3):
        monkeypatch.setattr(reload, "fresh_samples", lambda *_, off=off: images + off)
        if off < 1e-3:
            assert reload_check(folder, 2 * images - 1, images, prompts=PROMPTS) == pytest.approx(off, rel=0.01)
            continue
        with pytest.raises(RunFailed, match="does not make the trained samples"):
            reload_check(folder, 2 * images - 1, images, prompts=PROMPTS)


def test_latents_without_a_vae_are_no_pipeline_and_still_say_their_schedule(tmp_path):
    family = FAMILIES.get("stable_diffusion")
    loaded = family.build(size="tiny")
    schedule = on_grid("renoise", 2, origin=50)(loaded.path)
    folder = export(loaded.module, family, loaded.path, schedule, tmp_path / "m", card={}, around=loaded.around)
    assert not (folder / "model_index.json").exists()
    assert schedule_from(card(folder)["schedule"]) == schedule
    assert open_model(folder).path == loaded.path
    assert {f.level for f in doctor(folder)} == {"ok"}


def test_prompts_go_round(baked):
    s, folder = baked
    made = generate(folder, 5, prompts=PROMPTS[:2], batch=2)
    assert made.prompts == ["a cat", "a dog on a bench"] * 2 + ["a cat"]
    assert made.labels is None and made.nfe == 4
    assert made.timesteps == (999, 759, 499, 259)
    assert (made.images[:2] / 255 - s.images()[:2]).abs().max() <= 0.5 / 255 + 1e-4


def test_a_text_model_without_prompt_and_a_baked_one_with_guidance_are_refused(baked):
    with pytest.raises(UserError, match=r'--prompt "a photo of a cat"'):
        generate(baked[1], 1)
    with pytest.raises(UserError, match="baked into this model"):
        generate(baked[1], 1, prompts=["a cat"], guidance=7.5)


def test_the_guidance_of_the_card_is_the_default_and_another_may_be_asked(embedded):
    s, folder = embedded
    for asked, scale in ((None, 5.0), (9.0, 9.0)):
        made = generate(folder, 3, prompts=PROMPTS, guidance=asked)
        assert (made.guidance, made.nfe) == (scale, 2)
        assert (made.images / 255 - s.images(guidance=scale)).abs().max() <= 0.5 / 255 + 1e-4


def test_sound_text_folders_have_only_good_news(baked, embedded):
    for _, folder in (baked, embedded):
        assert {f.level for f in doctor(folder)} == {"ok"}
    base = doctor(baked[0].base)  # a stock folder, which has no card
    assert [f.what for f in base if f.level != "ok"] == [
        "no fewstep.json: steps, guidance and noise levels are unknown"
    ]
