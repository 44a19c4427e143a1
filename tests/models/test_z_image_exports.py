"""Students of Z-Image in the stock pipeline: levels, guidance in its own number, the card, a fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.draws import Draw
from fewstep.exporting import checks_sampling
from fewstep.exporting.doctor import doctor
from fewstep.exporting.guidance_number import guidance_number
from fewstep.exporting.pipeline import generate, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import target_for
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule
from fewstep.models.folder import open_model
from fewstep.models.z_image import Z_IMAGE

from .exported import SHAPE, exported
from .flow_stock import denoiser, student
from .tiny_z_image import tiny_z_image

TEXTS = ("a red cat", "two dogs and a much longer prompt than that")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_z_image(tmp_path_factory.mktemp("tiny") / "z_image")


@pytest.mark.parametrize(("kind", "steps", "scale"), [("ode", 1, 1.0), ("ode", 4, 3.0), ("renoise", 4, 1.0)])
def test_the_stock_pipeline_makes_the_solvers_images(folder, tmp_path, kind, steps, scale):
    """Config alone: static shift; asked for the usual scale, the pipeline is told one less."""
    out, images = exported(denoiser(folder), tmp_path / "m", kind, steps, prompts=TEXTS, guidance=scale)
    theirs = load_pipeline(out, device="cpu")
    made = generate(theirs, 2, prompts=TEXTS)
    assert type(theirs).__name__ == "ZImagePipeline" and made.guidance == scale
    assert open_model(out).path == FlowPath(shift=3.0)
    assert (made.images / 255 - images).abs().max() <= 0.5 / 255 + 1e-4
    assert made.nfe == steps * (1 if scale == 1 else 2)
    card = (out / "README.md").read_text()
    assert f"guidance_scale={scale - 1:g}, height=16, width=16)" in card and "a second pass unless it is 0" in card


def test_only_the_stock_pipelines_number_is_less():
    """Usual scales elsewhere."""
    assert [guidance_number(name, 3.0) for name in ("ZImagePipeline", "FluxPipeline", "Unknown")] == [2, 3, 3]


def test_a_second_time_finds_no_pipeline():
    """The folder carries none for this family."""
    path = FlowPath(shift=3.0)
    target = target_for(Z_IMAGE, path, Schedule("ode", path.grid(2), target="same"), False, True, reads=("s",))
    assert target.pipeline_name == "ZImagePipeline" and not target.carried


def test_the_doctor_names_the_version_that_takes_these_levels(folder, tmp_path, monkeypatch):
    """Older stock pipelines, asked for N steps, end them at t = 0; the two images are made in the pipeline's number."""
    out, _ = exported(denoiser(folder), tmp_path / "m")
    assert any("loads with diffusers >= 0.39" in found.what for found in doctor(out))
    monkeypatch.setattr(checks_sampling, "version", lambda _name: "0.38.0")
    (error,) = (found for found in doctor(out) if found.level == "error")
    assert "diffusers 0.38.0 is older than 0.39" in error.what


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_images(folder, tmp_path):
    """Only diffusers, without fewstep; twice with the same prompts, whose list the pipeline writes into."""
    out, images = exported(student(folder, moved=0.02), tmp_path / "m", prompts=TEXTS, guidance=3.0)
    start = Draw.for_images(0, range(2)).normal("rollout.start", *SHAPE)
    again = {2: 2 * images - 1}
    assert reload_check(out, 2 * images - 1, start, prompts=TEXTS, further=again) < 1e-4
