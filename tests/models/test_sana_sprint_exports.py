"""Students of SANA-Sprint in the stock pipeline: levels, guidance, adapters, what the folder says, a fresh process."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler

from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.exporting.doctor import doctor
from fewstep.exporting.grids import grid, same_pairs, trained_pairs
from fewstep.exporting.pipeline import generate, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import offered_steps, target_for, training_path
from fewstep.maths.angle_path import AngleFlowPath
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule
from fewstep.models.folder import card, open_model
from fewstep.models.sana_sprint import SANA_SPRINT

from .exported import drawn, exported
from .flow_stock import PROMPTS, denoiser, student
from .tiny_sana_sprint import tiny_sana_sprint

SIZE = (32, 32)
PATH = AngleFlowPath()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_sana_sprint(tmp_path_factory.mktemp("tiny") / "sprint")


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_stock_pipeline_makes_the_solvers_images(folder, tmp_path, steps):
    """On the angles that were trained, read back from the folder; it says how it has to be called."""
    out, images = exported(denoiser(folder), tmp_path / "m", "renoise", steps, SIZE)
    theirs = load_pipeline(out, device="cpu")
    torch.testing.assert_close(drawn(theirs, steps, None, SIZE), images, atol=1e-4, rtol=0)
    angles = [a / (torch.pi / 2) for a in theirs.scheduler.timesteps.tolist()]
    assert angles == pytest.approx([*PATH.grid(steps), 0], abs=1e-5)
    assert (type(theirs), type(theirs.scheduler)) == (SanaSprintPipeline, SCMScheduler)
    assert open_model(out).path == PATH and card(out)["path"]["kind"] == "angle_flow"
    assert ("intermediate_timesteps=None" in (out / "README.md").read_text()) == (steps != 2)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_scheduler_made_from_its_config_alone_has_the_trained_levels(steps):
    """All N levels of the path; a student of 2 finds its levels in no other number of steps, one of 4 in 1 too."""
    asked = {"labels": False, "latent": True}
    assert training_path(SANA_SPRINT, PATH, lambda p: Schedule("renoise", p.grid(steps)), **asked) == PATH
    schedule = Schedule("renoise", PATH.grid(steps))
    target = target_for(SANA_SPRINT, PATH, schedule, **asked)
    scheduler = SCMScheduler.from_config(target.scheduler_for(PATH, schedule).config)
    assert same_pairs(trained_pairs(PATH, schedule.u), grid(scheduler, target.pipeline_name, steps))
    assert offered_steps(target, PATH, schedule) == {1: [1], 2: [1, 2], 4: [1, 4], 8: [1, 4, 8]}[steps]


@pytest.mark.parametrize(
    ("path", "said", "message"),
    [
        (FlowPath(shift=3.0), {}, "no diffusers scheduler makes these 4 levels"),
        (PATH, {"kind": "ode"}, "no diffusers scheduler makes these 4 levels of a flow path with 'ode'"),
        (PATH, {"guidance": 4.5}, "SanaSprintPipeline rescales what it guides or guides not at all"),
        (PATH, {"target": "next"}, "no pipeline tells a sana_sprint student its second time"),
    ],
)
def test_what_the_pipeline_does_not_do_is_refused(path, said, message):
    """Levels of a shifted clock, a step along the velocity, two calls a step, a second time."""
    schedule = Schedule(**{"kind": "renoise", "u": path.grid(4), **said})
    with pytest.raises(UserError, match=message):
        target_for(SANA_SPRINT, path, schedule, labels=False, latent=True, reads=("s",))


def test_guidance_is_an_input_of_a_student_that_is_told_it(folder, tmp_path):
    """One pass a step; the pipeline's number is the usual scale."""
    role = student(folder, ("guidance",), moved=0.02)
    out, images = exported(role, tmp_path / "m", "renoise", size=SIZE, guidance=2.5, embedded=True)
    made = generate(out, 2, prompts=PROMPTS)
    assert (made.images / 255 - images).abs().max() <= 0.5 / 255 + 1e-4
    assert (made.guidance, made.nfe, card(out)["guidance_scale"]) == (2.5, 2, "embedded")
    assert json.loads((out / "transformer/config.json").read_text())["guidance_embeds"] is True
    assert "guidance_scale=2.5" in (out / "README.md").read_text()
    assert (drawn(load_pipeline(out, device="cpu"), guidance=7.0, size=SIZE) - images).abs().max() > 1e-3


def test_no_number_changes_the_images_of_a_student_of_one_guidance(folder, tmp_path):
    """The pipeline's default of 4.5 included, which the base would read."""
    out, images = exported(denoiser(folder), tmp_path / "m", "renoise", size=SIZE)
    pipeline = load_pipeline(out, device="cpu")
    for guidance in (None, 1.0, 7.0):
        assert (drawn(pipeline, guidance=guidance, size=SIZE) - images).abs().max() < 1e-4
    assert card(out)["guidance_scale"] == "baked" and "guidance_scale=" not in (out / "README.md").read_text()
    base = SanaSprintPipeline.from_pretrained(folder)
    assert (drawn(base, guidance=1.0, size=SIZE) - images).abs().max() < 1e-4
    assert (drawn(base, guidance=None, size=SIZE) - images).abs().max() > 1e-2
    with pytest.raises(UserError, match="baked into this model"):
        generate(out, 1, prompts=PROMPTS[:1], guidance=3.5)


@pytest.mark.parametrize("steps", [1, 2])
def test_exported_student_makes_the_same_images_merged_and_as_an_adapter(folder, tmp_path, steps):
    """The folder alone, and its LoRA file on the base's stock pipeline, which has the student's scheduler already."""
    role = student(folder, ("guidance",), tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1)
    out, images = exported(role, tmp_path / "m", "renoise", steps, SIZE, guidance=2.5, embedded=True)
    reloaded = SanaSprintPipeline.from_pretrained(out, use_safetensors=True)
    assert (drawn(reloaded, steps, 2.5, SIZE) - images).abs().max() < 1e-4
    adapted = SanaSprintPipeline.from_pretrained(folder)
    before = drawn(adapted, steps, 2.5, SIZE)
    adapted.load_lora_weights(out)
    assert (drawn(adapted, steps, 2.5, SIZE) - images).abs().max() < 1e-4 and (before - images).abs().max() > 1e-3
    adapted.unload_lora_weights()
    assert torch.equal(drawn(adapted, steps, 2.5, SIZE), before)
    said = (out / "README.md").read_text()
    assert said.count("intermediate_timesteps=None") == (2 if steps == 1 else 0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_call_on_the_model_card_runs(folder, tmp_path, steps):
    """As it stands there, but for the name of the folder; so does the command that samples."""
    out, _ = exported(
        student(folder, ("guidance",)), tmp_path / "m", "renoise", steps, SIZE, guidance=2.5, embedded=True
    )
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, object] = {}
    exec(code.replace('"FOLDER"', repr(str(out))), found)
    assert found["image"].size == SIZE
    assert generate(out, 1, prompts=PROMPTS[:1], steps=4).nfe == 4


def test_doctor_finds_nothing_wrong_and_names_a_changed_scheduler(folder, tmp_path):
    """Levels, versions, two images; then a scheduler that is not the exported one."""
    out, _ = exported(denoiser(folder), tmp_path / "m", "renoise", 4, SIZE)
    found = doctor(out)
    assert {finding.level for finding in found} == {"ok"}, found
    assert any("SCMScheduler steps on the 4 levels that were trained" in finding.what for finding in found)
    file = out / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sigma_data": 1.0}))
    assert any("sigma_data = 1.0; exported was 0.5" in finding.what for finding in doctor(out))


def test_two_steps_are_what_the_pipeline_does_unasked(folder, tmp_path):
    """The one number of steps that a folder needs no word for."""
    defaults = inspect.signature(SanaSprintPipeline.__call__).parameters
    assert defaults["num_inference_steps"].default == 2
    out, images = exported(denoiser(folder), tmp_path / "m", "renoise", size=SIZE)
    torch.testing.assert_close(drawn(load_pipeline(out, device="cpu"), None, None, SIZE), images, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 4])
def test_a_fresh_process_makes_the_same_images(folder, tmp_path, steps):
    """Only diffusers, without fewstep: all noise is given, at every step."""
    out, images = exported(student(folder, moved=0.02), tmp_path / "m", "renoise", steps, SIZE)
    draw = Draw.for_images(0, range(2))
    start, *later = (draw.normal(f"rollout.{name}", 4, 8, 8) for name in ("start", *range(steps - 1)))
    assert reload_check(out, 2 * images - 1, start, renoise=later, prompts=PROMPTS) < 1e-4
