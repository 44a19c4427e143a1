"""Sampling a folder: addressed noise, counted calls, and nothing run without consent."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import ConsistencyModelPipeline
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.exporting.pipeline import generate, load_pipeline, sample

from .students import EPS, FLOW, SHIFTED, student


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return student("unet2d", SHIFTED, "ode", 4).export(tmp_path_factory.mktemp("stock") / "m")


@pytest.fixture(scope="module")
def renoise(tmp_path_factory):
    return student("unet2d", EPS, "renoise", 4, guidance=2.0).export(tmp_path_factory.mktemp("own") / "m")


@pytest.mark.parametrize("which", ["stock", "renoise"])
def test_an_image_depends_on_its_index_and_not_on_the_batch(which, request):
    pipeline = load_pipeline(request.getfixturevalue(which), device="cpu")
    whole, parts = generate(pipeline, 5, seed=7, batch=5), generate(pipeline, 5, seed=7, batch=2)
    # equal to a grey level: a convolution over two rows may round otherwise than one over five
    assert (whole.images.int() - parts.images.int()).abs().max() <= 1
    assert (whole.images.int() - generate(pipeline, 5, seed=8).images.int()).abs().max() > 20
    assert torch.equal(whole.images, generate(pipeline, 5, seed=7, batch=5).images)


def test_what_is_reported_is_what_happened(renoise):
    seen = []
    made = generate(renoise, 5, batch=2, progress=lambda done, n: seen.append((done, n)))
    assert made.images.shape == (5, 1, 8, 8) and made.images.dtype == torch.uint8
    assert made.labels.tolist() == [0, 1, 2, 0, 1]
    assert made.nfe == 8 and made.guidance == 2.0
    assert made.timesteps == (999, 749, 499, 249) and made.scheduler == "LCMScheduler"
    assert made.ms_per_image > 0
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_steps_guidance_and_labels_may_be_asked_for(renoise):
    made = generate(renoise, 2, labels=[2, 2], steps=2, guidance=1)
    assert (made.nfe, made.guidance, made.timesteps) == (2, 1, (999, 499))
    assert made.labels.tolist() == [2, 2]


def test_a_pipeline_without_card_runs_with_its_own_defaults(stock, tmp_path, monkeypatch):
    monkeypatch.chdir(stock)  # a fewstep.json in the working directory is another model's
    parts = load_pipeline(stock, device="cpu").components
    assert generate(ConsistencyModelPipeline(**parts), 2).nfe == 1


def test_sample_gives_the_images_alone(stock):
    assert torch.equal(sample(stock, 2, seed=1), generate(stock, 2, seed=1).images)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"labels": [0]}, "2 numbers in 0..2"),
        ({"labels": [0, 3]}, "2 numbers in 0..2"),
        ({"guidance": 2.0}, "has no guidance"),
    ],
)
def test_what_the_model_cannot_do_is_said_in_one_line(stock, asked, message):
    with pytest.raises(UserError, match=message):
        generate(stock, 2, **asked)


def test_more_steps_than_the_scheduler_has_are_refused(renoise):
    with pytest.raises(UserError, match="refuses steps=8"):
        generate(renoise, 1, steps=8)


def test_an_unconditional_model_takes_no_labels_and_no_image_count_below_one(tmp_path):
    folder = student("unet2d", FLOW, classes=None).export(tmp_path / "m")
    assert generate(folder, 2).labels is None
    with pytest.raises(UserError, match="no classes"):
        generate(folder, 2, labels=[0, 0])
    with pytest.raises(UserError, match="at least 1"):
        generate(folder, 0)


def test_our_own_pipeline_needs_no_trust_and_runs_nothing_of_the_folder(renoise, tmp_path):
    marker = tmp_path / "ran"
    file = renoise / "pipeline_fewstep_class_v1.py"
    kept = file.read_text()
    file.write_text(kept + f"\nopen({str(marker)!r}, 'w')\n")
    try:
        assert type(load_pipeline(renoise)).__module__ == "fewstep_pipelines.pipeline_fewstep_class_v1"
    finally:
        file.write_text(kept)
    assert not marker.exists()


def _foreign(folder, marker):
    """The folder now names a pipeline in a file of its own."""
    source = (folder / "pipeline_fewstep_class_v1.py").read_text()
    (folder / "pipeline_fewstep_class_v1.py").unlink()
    (folder / "pipeline_theirs.py").write_text(f"open({str(marker)!r}, 'w')\n{source}")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline_theirs", "FewStepClassPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))


def test_foreign_code_runs_with_consent_only(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, marker = student("dit", FLOW).export(tmp_path / "m"), tmp_path / "ran"
    _foreign(folder, marker)
    with pytest.raises(UserError, match="brings code"):
        load_pipeline(folder)
    assert not marker.exists()
    pipeline = load_pipeline(folder, trust_remote_code=True)
    assert marker.exists() and type(pipeline).__module__.endswith("pipeline_theirs")


def test_broken_folders_are_named(stock, tmp_path):
    with pytest.raises(UserError, match="no pipeline folder"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    with pytest.raises(UserError, match="wants NoSuchPipeline"):
        load_pipeline(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        load_pipeline(tmp_path)


def test_weights_that_do_not_fit_are_a_one_line_error(tmp_path):
    folder = student("unet2d", FLOW).export(tmp_path / "m")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_in.weight"] = state["conv_in.weight"][:, :, :1].contiguous()
    save_file(state, weights)
    with pytest.raises(UserError, match="cannot load") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot load"):
        load_pipeline(folder)
