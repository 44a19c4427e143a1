"""Students of FLUX.1 in the stock pipeline: levels, guidance as an input or without effect, adapters, a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.exporting.doctor import doctor
from fewstep.exporting.pipeline import generate, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import target_for
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Kind, Schedule
from fewstep.models.flux import FLUX
from fewstep.models.folder import card, open_model

from .exported import SHAPE, drawn, exported
from .flow_stock import PROMPTS, denoiser, student
from .tiny_flux import tiny_flux

KINDS = ("dev", "schnell")
SHIFT = {"dev": 3.158193, "schnell": 1.0}  # exp(1.15): of 1024 pixels


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each kind."""
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny_flux(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["ode", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_stock_pipeline_makes_the_solvers_images(folders, tmp_path, kind, sampler: Kind, steps):
    """Asked for N steps alone it visits the trained levels, t = S u / (1 + (S - 1) u) without a shift by size."""
    out, images = exported(denoiser(folders[kind]), tmp_path / "m", sampler, steps)
    theirs = load_pipeline(out, device="cpu")
    torch.testing.assert_close(drawn(theirs, steps, None), images, atol=1e-4, rtol=0)
    assert type(theirs).__name__ == "FluxPipeline" and theirs.scheduler.config.use_dynamic_shifting is False
    shift, clock = SHIFT[kind], [1 - i / steps for i in range(steps)]
    levels = [1000 * shift * u / (1 + (shift - 1) * u) for u in clock]
    assert theirs.scheduler.timesteps.tolist() == pytest.approx(levels, abs=2e-3)
    assert open_model(out).path == denoiser(folders[kind]).path


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_an_input_of_a_student_that_is_told_it(folders, tmp_path, kind):
    """One pass a step; the pipeline's number is the usual scale. Schnell gains the stock class's own input."""
    role = student(folders[kind], ("guidance",), moved=0.02)
    out, images = exported(role, tmp_path / "m", guidance=2.5, embedded=True)
    made = generate(out, 2, prompts=PROMPTS)
    assert (made.images / 255 - images).abs().max() <= 0.5 / 255 + 1e-4
    assert (made.guidance, made.nfe, card(out)["guidance_scale"]) == (2.5, 2, "embedded")
    assert json.loads((out / "transformer/config.json").read_text())["guidance_embeds"] is True
    assert "guidance_scale=2.5" in (out / "README.md").read_text()
    assert (drawn(load_pipeline(out, device="cpu"), guidance=7.0) - images).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_changes_the_images_of_a_student_of_one_guidance(folders, tmp_path, kind):
    """The pipeline's default of 3.5 included, which dev's network would read."""
    out, images = exported(denoiser(folders[kind]), tmp_path / "m")
    pipeline = load_pipeline(out, device="cpu")
    for guidance in (None, 1.0, 7.0):
        assert (drawn(pipeline, guidance=guidance) - images).abs().max() < 1e-4
    assert card(out)["guidance_scale"] == "baked" and "guidance_scale=" not in (out / "README.md").read_text()
    with pytest.raises(UserError, match="baked into this model"):
        generate(out, 1, prompts=PROMPTS[:1], guidance=3.5)


def test_an_unsealed_network_would_read_the_pipelines_default(folders, tmp_path):
    """What is shut above is open in the base."""
    out, images = exported(denoiser(folders["dev"]), tmp_path / "m")
    base = FluxPipeline.from_pretrained(folders["dev"])
    base.register_modules(scheduler=load_pipeline(out, device="cpu").scheduler)
    assert (drawn(base, guidance=1.0) - images).abs().max() < 1e-4
    assert (drawn(base, guidance=None) - images).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_exported_student_makes_the_same_images_merged_and_as_an_adapter(folders, tmp_path, kind):
    """The folder alone, and its LoRA file on the stock pipeline of the base, told 1 where the base reads guidance."""
    role = student(folders[kind], tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1)
    out, images = exported(role, tmp_path / "m")
    reloaded = FluxPipeline.from_pretrained(out, use_safetensors=True)
    assert (drawn(reloaded) - images).abs().max() < 1e-4
    adapted = FluxPipeline.from_pretrained(folders[kind])
    adapted.register_modules(scheduler=reloaded.scheduler)
    before = drawn(adapted)
    adapted.load_lora_weights(out)
    assert (drawn(adapted) - images).abs().max() < 1e-4 and (before - images).abs().max() > 1e-3
    adapted.unload_lora_weights()
    assert torch.equal(drawn(adapted), before)


def test_an_adapter_is_told_guidance_where_its_base_is(folders, tmp_path):
    """Dev's own input stays as it is trained; schnell has none, and an adapter holds no new layer."""
    role = student(folders["dev"], ("guidance",), tune="lora", lora={"rank": 2}, moved=0.1)
    out, images = exported(role, tmp_path / "m", guidance=2.5, embedded=True)
    adapted = FluxPipeline.from_pretrained(folders["dev"])
    adapted.register_modules(scheduler=load_pipeline(out, device="cpu").scheduler)
    adapted.load_lora_weights(out)
    assert (drawn(adapted, guidance=2.5) - images).abs().max() < 1e-4
    assert (drawn(adapted, guidance=3.5) - images).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"gains an input \(guidance\)"):
        student(folders["schnell"], ("guidance",), tune="lora")


def test_a_student_of_classifier_free_guidance_finds_no_pipeline():
    """The stock one wants a negative prompt and a second number for it."""
    path = FlowPath()
    with pytest.raises(UserError, match="FluxPipeline rescales what it guides or guides not at all"):
        target_for(FLUX, path, Schedule("ode", path.grid(2), guidance=3.0), labels=False, latent=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_doctor_finds_a_sound_folder(folders, tmp_path, kind):
    """Files, levels, weights and two images."""
    out, _ = exported(denoiser(folders[kind]), tmp_path / "m")
    assert {found.level for found in doctor(out)} == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sampler"), [("dev", "ode"), ("schnell", "renoise")])
def test_a_fresh_process_makes_the_same_images(folders, tmp_path, kind, sampler: Kind):
    """Only diffusers, without fewstep."""
    out, images = exported(student(folders[kind], moved=0.02), tmp_path / "m", sampler)
    draw = Draw.for_images(0, range(2))
    start, renoise = draw.normal("rollout.start", *SHAPE), [draw.normal("rollout.0", *SHAPE)]
    assert reload_check(out, 2 * images - 1, start, renoise=renoise, prompts=PROMPTS) < 1e-4
