"""Scoring folders of images and pipelines, through the function that users call."""

import json
from types import SimpleNamespace

import pytest
import torch

from fewstep.data.images import to_uint8
from fewstep.data.registry import make_source
from fewstep.errors import UserError
from fewstep.evaluation.evaluate import evaluate, score
from fewstep.evaluation.manifest import read_manifest, read_scores, samples_of, write_images, write_manifest

FACTS = {"nfe": 2.0, "guidance": 1.0, "scheduler": "Euler"}


@pytest.fixture(scope="module")
def digits():
    source = make_source({"source": "digits"})
    rows = source.fetch(torch.arange(400), None)
    return to_uint8(rows["x0"]), rows["cond"]["label"]


@pytest.fixture
def pictures(tmp_path, digits):
    """Real digits as a folder of images with a manifest."""
    images, labels = digits[0][:60], digits[1][:60]
    write_images(images, tmp_path / "images")
    write_manifest(samples_of(images, labels, 0, timesteps=(1.0,), **FACTS), tmp_path / "manifest.jsonl")
    return tmp_path


@pytest.fixture
def pipeline(tmp_path, monkeypatch, digits):
    """A model folder whose sampler gives real digits back."""
    import sys

    def generate(folder, n, seed=0, labels=None, steps=None, guidance=None, batch=256):
        call = {"timesteps": (1.0, 0.5), "nfe": 2.0, "guidance": guidance, "ms_per_image": 3.0, "scheduler": "Euler"}
        return SimpleNamespace(images=digits[0][seed : seed + n], labels=digits[1][seed : seed + n], **call)

    monkeypatch.setitem(sys.modules, "fewstep.exporting.pipeline", SimpleNamespace(generate=generate))
    folder = tmp_path / "model"
    folder.mkdir()
    said = {"features": "digits-cnn", "reference": {"source": "digits"}}
    (folder / "fewstep.json").write_text(json.dumps({"evaluation": said}))
    return folder


def test_real_images_against_their_own_set_score_perfectly(digits):
    found = score(digits[0], digits[1], digits[0], "digits-cnn", ("fid", "prdc", "accuracy"))
    assert found["fid"] < 1e-6
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["accuracy"] > 0.97


def test_noise_scores_worse_than_a_held_out_half(digits):
    images = digits[0]
    noise = torch.randint(0, 256, (200, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    held_out = score(images[:200], None, images[200:], "digits-cnn", ("fid", "prdc"))
    worse = score(noise, None, images[200:], "digits-cnn", ("fid", "prdc"))
    assert worse["fid"] > 10 * held_out["fid"]
    assert worse["coverage"] < 0.2 < 0.8 < held_out["coverage"]


def test_a_folder_of_images_is_scored_with_the_labels_of_its_manifest(pictures):
    found = evaluate(pictures, ("fid", "accuracy"), features="digits-cnn", reference="digits")
    assert found["n"] == 60
    assert found["values"]["accuracy"] > 0.9
    assert {s["label"] for s in found["scores"]} == {"fid[digits-cnn]", "accuracy[digits-cnn]"}
    assert "n=1797" in found["scores"][0]["reference"]


def test_class_folders_give_labels_and_a_cut_takes_of_each(tmp_path, digits):
    for label in range(10):
        write_images(digits[0][digits[1] == label][:20], tmp_path / str(label))
    found = evaluate(tmp_path, ("accuracy",), n=50, features="digits-cnn")
    assert found["n"] == 50
    assert found["values"]["accuracy"] > 0.9


def test_a_model_brings_its_own_features_and_reference(pipeline):
    found = evaluate(pipeline, n=100)
    assert found["values"].keys() == {"fid", "precision", "recall", "density", "coverage"}
    assert (found["features"], found["nfe"], found["steps"], found["ms_per_image"]) == ("digits-cnn", 2.0, 2, 3.0)
    json.dumps(found)


def test_images_manifest_and_scores_are_written_and_score_alike(pipeline, tmp_path):
    out = tmp_path / "out"
    drawn = evaluate(pipeline, ("fid", "accuracy"), n=50, seed=3, out=out)
    assert [s.value for s in read_scores(out / "metrics.json")] == [s["value"] for s in drawn["scores"]]
    assert {sample.seed for sample in read_manifest(out / "manifest.jsonl")} == {3}
    again = evaluate(out, ("fid", "accuracy"), features="digits-cnn", reference="digits")
    assert again["values"] == drawn["values"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ("fdi",)}, "did you mean 'fid'"),
        ({"features": None}, "no feature network is named"),
        ({"reference": "fashion_mnist"}, "1 x 8 x 8, the reference's 1 x 28 x 28"),
        ({"reference": {"source": "labels", "classes": 10}}, "has no images"),
        ({"n": 61}, "has 60 images, not 61"),
        ({"n": 5, "metrics": ("prdc",)}, "more than 5"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(pictures, options, words):
    with pytest.raises(UserError) as caught:
        evaluate(pictures, **{"features": "digits-cnn", "reference": "digits", "metrics": ("fid",), **options})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_of_different_sizes_are_refused(pictures):
    from PIL import Image

    Image.new("L", (9, 8)).save(pictures / "images" / "000007.png")
    with pytest.raises(UserError, match=r"000007\.png' is 9x8"):
        evaluate(pictures, features="digits-cnn", reference="digits")


def test_a_broken_picture_is_named(pictures):
    (pictures / "images" / "000005.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot decode .*000005\.png"):
        evaluate(pictures, features="digits-cnn", reference="digits")


def test_a_missing_folder_is_named():
    with pytest.raises(UserError, match="no folder 'nowhere'"):
        evaluate("nowhere")
