"""Scores keep their protocol; two protocols are never compared."""

import json
from dataclasses import fields, replace

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.manifest import (
    Protocol,
    Sample,
    Score,
    compare,
    pixel_digest,
    read_manifest,
    read_scores,
    samples_of,
    write_images,
    write_manifest,
    write_scores,
)

PROTOCOL = Protocol("fid", 500, "fewstep", "1 + 1", "digits-cnn", "ab12", "none", "source=digits n=1797 sha256=cd34")


def test_equal_protocols_are_compared():
    assert compare(Score(3.0, PROTOCOL), Score(1.0, replace(PROTOCOL))) == -2.0


@pytest.mark.parametrize("name", [field.name for field in fields(Protocol)])
def test_a_difference_in_any_field_is_refused_and_named(name):
    other = replace(PROTOCOL, **{name: 999 if name == "n" else "other"})
    with pytest.raises(UserError, match=rf"cannot be compared: {name} is"):
        compare(Score(1.0, PROTOCOL), Score(1.0, other))


def test_no_score_is_called_by_its_metric_alone():
    assert Score(1.0, PROTOCOL).label == "fid[digits-cnn]"
    assert Score(1.0, PROTOCOL).plain()["label"] == "fid[digits-cnn]"


def test_scores_survive_the_file(tmp_path):
    scores = [Score(0.25, PROTOCOL), Score(0.5, replace(PROTOCOL, metric="recall"))]
    write_scores(scores, tmp_path / "run" / "metrics.json")
    assert read_scores(tmp_path / "run" / "metrics.json") == scores
    entry = json.loads((tmp_path / "run" / "metrics.json").read_text())[0]
    assert {"metric", "value", "n", "impl", "impl_version", "weights_sha256", "resize", "reference"} <= entry.keys()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("text", ["", "[{}]", "3", '[{"value": 1}]'])
def test_a_file_without_scores_is_refused(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match="holds no scores"):
        read_scores(tmp_path / "m.json")


@pytest.mark.parametrize("text", [None, "{}", "{", "3", '{"timesteps": 4}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(UserError, match="is no manifest"):
        read_manifest(tmp_path / "m.jsonl")


def test_a_manifest_line_has_all_fields_and_one_condition(tmp_path):
    images = torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shared = {"nfe": 4.0, "guidance": None, "scheduler": "X", "timesteps": (1000.0, 500.0)}
    samples = samples_of(images, torch.tensor([3, 1]), seed=7, **shared)
    with_prompt = Sample(2, 7, prompt="ein Würfel", sha256="ff", **shared)
    write_manifest([*samples, with_prompt], tmp_path / "manifest.jsonl")
    assert read_manifest(tmp_path / "manifest.jsonl") == [*samples, with_prompt]
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    every = {"index", "seed", "nfe", "guidance", "scheduler", "timesteps", "sha256"}
    assert [line.keys() - every for line in lines] == [{"label"}, {"label"}, {"prompt"}]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert lines[0]["sha256"] == pixel_digest(images[0]) != lines[1]["sha256"]


@pytest.mark.parametrize("channels", [1, 3])
def test_written_images_hold_the_pixels_they_were_given(tmp_path, channels):
    from fewstep.evaluation.samples import read_images

    images = torch.randint(0, 256, (3, channels, 5, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    files = write_images(images, tmp_path / "images")
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    assert torch.equal(read_images(tmp_path).images, images)
