"""Quality against network evaluations, on the command line."""

import json

import pytest
from PIL import Image

from fewstep.evaluation.sweep import metrics_of, sweep
from fewstep.resources import asset
from tests.models.tiny_sd import tiny_sd
from tests.rewards.tiny import clip as tiny_clip

from .benchmark import evaluated, protocol, said


def test_steps_give_a_row_each_with_the_teacher_beside_and_a_plot(tmp_path, capsys):
    tiny_clip(tmp_path / "clip")
    rules = protocol(tmp_path, tmp_path / "clip", n=2, latency={"warmup": 0, "runs": 2})
    student, teacher = tiny_sd(tmp_path / "student"), tiny_sd(tmp_path / "teacher", seed=1)
    asked = [student, "--teacher", teacher, "--protocol", rules, "--steps", "1,3", "--guidance", 1]
    found = evaluated(capsys, *asked, "--out", tmp_path / "out")
    rows = found["rows"]
    assert [(r["who"], r["steps"], r["nfe"]) for r in rows] == [
        *(("student", 1, 1), ("student", 3, 3)),
        *(("teacher", 1, 1), ("teacher", 3, 3)),
    ]
    assert all(r["ms"] > 0 and {"hpsv2", "clip_score.cosine"} <= r.keys() for r in rows)
    assert len({r["hpsv2"] for r in rows}) == 4
    one = json.loads((tmp_path / "out" / "teacher-steps-3" / "metrics.json").read_text())
    assert {s["metric"]: s["value"] for s in one}["hpsv2"] == rows[3]["hpsv2"]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"] == rows
    assert len(set(Image.open(tmp_path / "out" / "sweep.png").convert("L").tobytes())) > 20
    code, out, _ = said(capsys, "compare", tmp_path / "out" / "steps-1", tmp_path / "out" / "steps-3")
    assert code == 0 and "hpsv2" in out  # steps are what is compared, not protocol


def test_a_sweep_needs_no_protocol(tmp_path, capsys):
    words = ["--metrics", "fid,accuracy", "--n", 12, "--features", "digits-cnn", "--reference", "digits"]
    code, out, err = said(capsys, "evaluate", asset("teachers/digits"), *words, "--steps", "1,2")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines() if "student" in line]
    assert [line[1] for line in lines] == ["1", "2"]
    assert not list(tmp_path.iterdir())


def test_the_rows_values_are_those_of_the_run(tmp_path):
    """The median latency stands for the time, and groups are no columns."""
    (tmp_path / "model_index.json").write_text("{}")

    def run(folder, steps, out):
        values = {"hpsv2": 20.0 + steps, "hpsv2.anime": 1.0, "clip_score.cosine": 0.3}
        score = {"metric": "hpsv2", "interval": [19.0, 22.0]}
        latency = {"median_ms": 5.0 * steps}
        return {"steps": steps, "nfe": 2 * steps, "values": values, "scores": [score], "n": 3, "latency": latency}

    rows = sweep(tmp_path, [1, 4], run)["rows"]
    assert [(r["nfe"], r["ms"], r["hpsv2"]) for r in rows] == [(2, 5.0, 21.0), (8, 20.0, 24.0)]
    assert rows[0]["intervals"] == {"hpsv2": [19.0, 22.0]}
    assert metrics_of(rows) == ["hpsv2", "clip_score.cosine"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--steps", "1,2,1"], "write each number once"),
        (["--steps", "1,2", "--teacher", "nowhere"], "no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_swept_is_refused(capsys, words, error):
    code, _, err = said(capsys, "evaluate", asset("teachers/digits"), "--metrics", "diversity", *words)
    assert code == 2 and error in err


def test_pictures_cannot_be_swept(tmp_path, capsys):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    code, _, err = said(capsys, "evaluate", tmp_path, "--metrics", "diversity", "--steps", "1,2")
    assert code == 2 and "is no model: a sweep over steps draws images anew" in err
