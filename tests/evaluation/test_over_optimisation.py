"""Reward beside high frequencies and diversity: through the command line, the model's card, and while training."""

import json

import pytest
import torch

from fewstep.cli.main import main
from fewstep.data.images import to_uint8
from fewstep.data.registry import make_source
from fewstep.engine.trainer import train
from fewstep.engine.validation import validate
from fewstep.errors import UserError
from fewstep.evaluation.evaluate import evaluate, judge_for
from fewstep.evaluation.manifest import read_manifest, write_images
from fewstep.methods.base import Method
from fewstep.recipe import load_recipe
from tests.data.tiny_captions import tiny_captions
from tests.engine.toy import register
from tests.models.tiny_sd import tiny_sd

UNET = {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4, "attention": "none"}
RECIPE = {
    "method": "flow_matching",
    "student": {"from": "unet2d", "build": UNET},
    "config": {"steps": 2},
    "data": {"train": {"source": "digits"}, "test": {"source": "digits"}},
    "train": {"steps": 2, "batch": 8, "check_export": False},
    "validate": {"every": 2, "source": "test", "n": 40, "metrics": ["high_frequency", "reward", "diversity"]},
    "evaluation": {"features": "digits-cnn", "reference": {"source": "digits"}, "reward": "classifier"},
}
WATCHED = "fid,prdc,diversity,high_frequency,reward"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student of two steps, exported, that was validated once."""
    return train(RECIPE, tmp_path_factory.mktemp("runs") / "run", show=False)


@pytest.fixture(scope="module")
def digits():
    rows = make_source({"source": "digits"}).fetch(torch.arange(300), None)
    return rows["x0"], rows["cond"]["label"]


def _answered(capsys, *words):
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_class_folders_are_scored_by_all_guards_from_the_command_line(tmp_path, digits, capsys):
    for label in range(10):
        write_images(to_uint8(digits[0][digits[1] == label][:12]), tmp_path / "in" / str(label))
    given = ("--features", "digits-cnn", "--reference", "digits", "--reward", "classifier", "--out", tmp_path / "out")
    found = _answered(capsys, tmp_path / "in", "--metrics", WATCHED, *given)
    assert found["values"]["high_frequency"] == pytest.approx(1, abs=0.1)
    assert -0.3 < found["values"]["reward"] <= 0
    assert {"fid", "precision", "recall", "diversity"} < found["values"].keys()
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "reward[classifier]" in [score["label"] for score in written]


def test_the_student_brings_the_reward_of_its_recipe(run, capsys):
    found = _answered(capsys, run.model, "--metrics", "reward,high_frequency", "--n", 20)
    assert [score["label"] for score in found["scores"]] == ["reward[classifier]", "high_frequency[pixels]"]
    assert found["nfe"] == 2
    given = _answered(capsys, run.model, "--metrics", "reward", "--n", 20, "--reward", "{linear: {direction: 2.0}}")
    assert given["scores"][0]["label"] == "reward[linear direction=2.0]"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--reward", "{classifier"), "--reward {classifier: write a reward's name"),
        (("--reward", "clasifier"), "did you mean 'classifier'"),
        (("--reward", "{classifier: {features: inception}}"), "features='inception'"),
    ],
)
def test_a_reward_that_cannot_be_is_one_line_and_exit_2(run, capsys, given, words):
    assert main(["evaluate", str(run.model), "--metrics", "reward", *given]) == 2
    said = capsys.readouterr().err.strip()
    assert words in " ".join(said.split())


def test_a_pattern_added_by_a_reward_shows_as_high_frequencies_while_the_reward_rises(tmp_path, digits):
    """What over-optimisation looks like: x + b a with the reward's own direction a (a checkerboard)."""
    row = torch.arange(8)
    pattern = 1.0 - 2.0 * ((row[:, None] + row) % 2)
    reward = {"linear": {"direction": "checkerboard"}}
    found = []
    for amount in (0.0, 0.2, 0.6):
        write_images(to_uint8(digits[0][:200] * 0.4 + amount * pattern), tmp_path / str(amount))
        found.append(evaluate(tmp_path / str(amount), ("high_frequency", "reward"), reference="digits", reward=reward))
    shares, rewards = ([f["values"][name] for f in found] for name in ("high_frequency", "reward"))
    assert rewards[1] - rewards[0] == pytest.approx(0.2, abs=0.01)
    assert rewards[2] - rewards[0] == pytest.approx(0.6, abs=0.01)
    assert shares[0] == pytest.approx(1, abs=0.15)
    assert 1.2 * shares[0] < shares[1] < shares[2]


def test_validation_reports_them_while_training(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if "validation.reward" in line)
    assert line["validation.reward"] < -1  # an untrained student
    assert line["validation.high_frequency"] > 0
    assert line["validation.diversity"] > 0


def test_a_text_to_image_student_is_scored_alike_in_training_and_after_export(tmp_path, capsys):
    """Reward and high frequencies of the trainer's own samples, and of what the stock pipeline draws for the captions."""
    captions = {"source": "captions", "path": str(tiny_captions(tmp_path / "pictures")), "size": 16}
    recipe = {
        "method": "toy_denoise",
        "student": {"from": str(tiny_sd(tmp_path / "sd"))},
        "data": {"train": captions},
        "train": {"steps": 2, "batch": 4, "check_export": False},
        "validate": {"every": 2, "n": 8, "metrics": ["high_frequency", "reward"]},
        "evaluation": {"reference": captions, "reward": {"linear": {"direction": "brightness"}}},
    }
    register()
    run = train(recipe, tmp_path / "run", show=False)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    during = next(line for line in lines if "validation.reward" in line)
    after = _answered(capsys, run.model, "--metrics", "high_frequency,reward", "--out", tmp_path / "out")
    assert after["n"] == 8
    assert [s.prompt for s in read_manifest(tmp_path / "out" / "manifest.jsonl")][:2] == ["digit zero", "digit one"]
    for name, value in after["values"].items():
        assert value == pytest.approx(during[f"validation.{name}"], rel=1e-3)


class Painter(Method):
    """Gives back the first images of `train`, whatever they are."""

    def samples(self, rows, seed):
        return self.sources["train"].fetch(torch.arange(rows), None)["x0"]


def test_samples_are_judged_by_what_they_were_drawn_for_not_by_the_validation_source():
    """`train` and the validation source number their rows differently; samples follow `train`."""
    recipe = load_recipe(RECIPE)
    method = Painter()
    method.sources = {"train": make_source({"source": "digits"})}
    other = make_source({"source": "digits_on_canvas", "size": 8, "split": "test", "noise": 0})
    found = validate(method, other, recipe.validation, recipe, torch.device("cpu"))
    assert -0.3 < found["validation.reward"] <= 0


def test_rows_are_not_fetched_for_a_method_that_reports_none(monkeypatch):
    """They would be decoded and encoded for nothing."""
    recipe, method = load_recipe(RECIPE), Painter()
    source = make_source({"source": "digits"})
    monkeypatch.setattr(source, "fetch", lambda *_: pytest.fail("fetched"))
    spec = recipe.validation.model_copy(update={"metrics": []})
    assert validate(method, source, spec, recipe, torch.device("cpu")) == {}


def test_a_reward_without_a_name_is_refused_before_anything_is_drawn():
    with pytest.raises(UserError, match="name one, `--reward classifier`"):
        judge_for(("fid", "reward"), None)
    assert judge_for(("fid",), "classifier") == (None, None)
