"""Scoring folders of images and pipelines, through the function that users call."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from fewstep.data.images import to_uint8
from fewstep.data.registry import make_source
from fewstep.errors import UserError
from fewstep.evaluation.evaluate import evaluate, score
from fewstep.evaluation.manifest import read_manifest, read_scores, samples_of, write_images, write_manifest
from fewstep.rewards import registry
from fewstep.rewards.base import Reward
from tests.data.tiny_captions import tiny_captions

FIRST = ("zero", "one", "two", "three")  # the first four digits of the shipped set
LENGTH = sum(len(f"digit {name}") for name in FIRST) / 4
FACTS = {"nfe": 2.0, "guidance": 1.0, "scheduler": "Euler"}


class Length(Reward):
    """Letters of the prompt."""

    name, needs = "length", "prompt"

    def __init__(self, spec):
        super().__init__()

    def score(self, images, asked):
        return torch.tensor([float(len(text)) for text in asked.prompts])


class _Sampler:
    """Takes classes and no prompts, as far as its signature tells."""

    def __call__(self, class_labels=None):
        raise AssertionError("the pipeline itself is not called")


class _Painter(_Sampler):
    def __call__(self, prompt=None):
        raise AssertionError("the pipeline itself is not called")


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

    def generate(pipeline, n, seed=0, labels=None, steps=None, guidance=None, batch=None, prompts=None):
        call = {"timesteps": (1.0, 0.5), "nfe": 2.0, "guidance": guidance, "ms_per_image": 3.0, "scheduler": "Euler"}
        rows = slice(seed, seed + n)
        images = digits[0][rows] if prompts is None else digits[0][rows].repeat(1, 3, 1, 1)
        labels = digits[1][rows] if prompts is None else None
        return SimpleNamespace(images=images, labels=labels, prompts=prompts, **call)

    module = SimpleNamespace(generate=generate, load_pipeline=lambda folder: _Sampler())
    monkeypatch.setitem(sys.modules, "fewstep.exporting.pipeline", module)
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


def test_reward_and_high_frequencies_need_no_features_and_say_what_they_were_read_with(pictures):
    found = evaluate(pictures, ("high_frequency", "reward"), reference="digits", reward="classifier")
    assert found["features"] is None
    assert found["values"]["high_frequency"] == pytest.approx(1, abs=0.1)
    assert -0.3 < found["values"]["reward"] <= 0
    scores = {s["metric"]: s for s in found["scores"]}
    assert scores["high_frequency"]["label"] == "high_frequency[pixels]"
    assert "n=1797" in scores["high_frequency"]["reference"]
    assert scores["reward"]["label"] == "reward[classifier]"
    assert scores["reward"]["reference"] == "none"
    assert len(scores["reward"]["weights_sha256"]) == 64


def test_a_reward_is_named_with_its_factors_and_options_but_not_its_folder(pictures):
    said = {"classifier": {"weight": 2.0}, "linear": {"direction": "checkerboard"}}
    found = evaluate(pictures, ("reward",), reward=said)
    assert found["scores"][0]["label"] == "reward[2 classifier + linear direction=checkerboard]"
    alone = evaluate(pictures, ("reward",), reward="classifier")["values"]["reward"]
    pattern = evaluate(pictures, ("reward",), reward={"linear": {"direction": "checkerboard"}})["values"]["reward"]
    assert found["values"]["reward"] == pytest.approx(2 * alone + pattern, abs=1e-5)


def test_wrong_labels_earn_less_reward(pictures, digits):
    right = evaluate(pictures, ("reward",), reward="classifier")["values"]["reward"]
    shifted = (digits[1][:60] + 1) % 10
    write_manifest(samples_of(digits[0][:60], shifted, 0, timesteps=(1.0,), **FACTS), pictures / "manifest.jsonl")
    assert evaluate(pictures, ("reward",), reward="classifier")["values"]["reward"] < right - 3


def test_a_models_own_reward_is_the_default(pipeline):
    said = json.loads((pipeline / "fewstep.json").read_text())
    said["evaluation"]["reward"] = {"classifier": {"features": "digits-cnn"}}
    (pipeline / "fewstep.json").write_text(json.dumps(said))
    found = evaluate(pipeline, ("reward", "fid"), n=40)
    assert [s["label"] for s in found["scores"]] == ["reward[classifier features=digits-cnn]", "fid[digits-cnn]"]


def test_a_text_to_image_model_draws_the_captions_of_the_reference(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["fewstep.exporting.pipeline"], "load_pipeline", lambda folder: _Painter())
    monkeypatch.setattr(registry.REWARDS, "get", lambda name: Length)
    reference = {"source": "captions", "path": str(tiny_captions(tmp_path / "real", n=4, size=8)), "size": 8}
    out = tmp_path / "out"
    found = evaluate(pipeline, ("high_frequency", "reward"), reference=reference, reward="length", out=out)
    assert found["n"] == 4
    assert found["values"]["reward"] == pytest.approx(LENGTH)
    assert [s.prompt for s in read_manifest(out / "manifest.jsonl")] == [f"digit {name}" for name in FIRST]
    again = evaluate(out, ("reward",), reward="length")
    assert again["scores"] == [s for s in found["scores"] if s["metric"] == "reward"]


def test_prompts_alone_will_do_for_scores_without_real_images(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["fewstep.exporting.pipeline"], "load_pipeline", lambda folder: _Painter())
    monkeypatch.setattr(registry.REWARDS, "get", lambda name: Length)
    (tmp_path / "prompts.txt").write_text("a cat\na dog with a hat\n")
    reference = {"source": "prompts", "path": str(tmp_path / "prompts.txt")}
    found = evaluate(pipeline, ("reward",), reference=reference, reward="length")
    assert (found["n"], found["values"]["reward"]) == (2, (5 + 16) / 2)
    with pytest.raises(UserError, match="high_frequency needs reference_images"):
        evaluate(pipeline, ("high_frequency",), reference=reference)
    with pytest.raises(UserError, match="draws what prompts say"):
        evaluate(pipeline, ("diversity",), reference="digits")


def test_captions_beside_images_are_what_a_reward_is_asked_with(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.REWARDS, "get", lambda name: Length)
    folder = tiny_captions(tmp_path, n=4)
    found = evaluate(folder, ("reward",), reward="length")
    assert found["values"]["reward"] == pytest.approx(LENGTH)
    assert found["scores"][0]["reference"].startswith("prompts sha256=")
    other = (folder / "metadata.jsonl").read_text().replace("zero", "nine")
    (folder / "metadata.jsonl").write_text(other)
    again = evaluate(folder, ("reward",), reward="length")
    assert again["scores"][0]["reference"] != found["scores"][0]["reference"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": ("reward",)}, "the metric reward has no reward: name one"),
        ({"metrics": ("reward",), "reward": "clasifier"}, "did you mean 'classifier'"),
        ({"metrics": ("high_frequency",), "reference": None}, "high_frequency needs reference_images"),
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
