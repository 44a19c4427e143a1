"""GenEval under a protocol on the real command line gives the scores of its own command."""

import json

import pytest
import yaml

from fewstep.errors import UserError
from fewstep.evaluation import detection
from fewstep.evaluation.geneval import score_geneval
from fewstep.evaluation.geneval_files import TASKS
from fewstep.evaluation.geneval_metric import geneval

from .benchmark import evaluated, said
from .test_geneval import Scenes, draw, eyes, lay_out, palette


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Five scenes of a task drawn twice, flat in a folder; the prompts; a protocol. Detector and colours read the drawing."""
    monkeypatch.setattr(detection, "Mask2Former", lambda *_: eyes())
    monkeypatch.setattr(detection.ClipColors, "at", lambda *_: palette)
    maker, scenes = Scenes(3), []
    for i, task in enumerate(task for task in TASKS for _ in range(5)):
        prompt, objects, _ = maker.scene(task)
        scenes.append(({**prompt, "prompt": f"{prompt['prompt']} {i}"}, [draw(objects), draw(objects[:1])]))
    lay_out(tmp_path / "official", scenes, 2)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, picture in enumerate(picture for _, pictures in scenes for picture in pictures):
        picture.save(flat / f"{i:05d}.png")
    for place in ("detector", "clip"):
        (tmp_path / place).mkdir()
    prompts = str(tmp_path / "evaluation_metadata.jsonl")
    options = {"prompts": prompts, "detector": str(tmp_path / "detector"), "clip": str(tmp_path / "clip")}
    rules = {"prompts": {"path": prompts}, "per_prompt": 2, "metrics": {"geneval": options}}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    return tmp_path


def test_a_protocol_gives_each_tasks_share_and_their_plain_mean(bench, capsys):
    """Those of `score_geneval` on the official layout, and a value an image."""
    wanted = score_geneval(bench / "official", eyes(), palette, bench / "evaluation_metadata.jsonl")
    words = (bench / "flat", "--protocol", bench / "rules.yaml", "--out", bench / "out")
    values = evaluated(capsys, *words)["values"]
    assert 0 < wanted["overall"] < 1
    assert values["geneval.overall"] == pytest.approx(wanted["overall"])
    for task in TASKS:
        assert values[f"geneval.{task}"] == pytest.approx(wanted["tasks"][task]["score"])
    lines = [json.loads(line) for line in (bench / "out" / "values.jsonl").read_text().splitlines()]
    assert [bool(line["geneval"]) for line in lines] == [row["correct"] for row in wanted["rows"]]


def test_other_prompts_and_options_are_refused(bench, capsys):
    """Prompts of another benchmark have no objects to look for."""
    (bench / "others.txt").write_text("".join(f"a thing {i}\n" for i in range(30)))
    words = ("evaluate", bench / "flat", "--protocol", bench / "rules.yaml", "--prompts", bench / "others.txt")
    code, _, error = said(capsys, *words, "--out", bench / "out")
    assert code == 2 and "scores images of its own prompts" in error
    with pytest.raises(UserError, match="unknown key 'detektor': did you mean 'detector'"):
        geneval({"detektor": "x"})
    with pytest.raises(UserError, match="'clip' is missing"):
        geneval({"prompts": "x", "detector": "y"})
