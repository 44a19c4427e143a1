"""The road through the command line: train, export, sample, score, check, report; what each function is handed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from fewstep.cli.evaluate import reference_of
from fewstep.cli.main import main
from fewstep.cli.train import default_out
from fewstep.errors import UserError
from tests.conftest import TINY_UNET

RECIPE = {
    "method": "flow_matching",
    "student": {"from": "unet2d", "build": TINY_UNET},
    "config": {"steps": 2},
    "data": {"train": {"source": "digits"}},
    "train": {"steps": 4, "batch": 8, "save_every": 2, "check_export": False},
    "evaluation": {"features": "digits-cnn", "reference": {"source": "digits"}},
}


def recipe_in(folder: Path) -> Path:
    """The recipe's file."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps, made by the command itself."""
    folder = tmp_path_factory.mktemp("road")
    assert (
        main(["train", str(recipe_in(folder)), "train.steps=2", "train.save_every=1", "--out", str(folder / "run")])
        == 0
    )
    return folder / "run"


def answered(capsys, *words: str) -> dict:
    """The JSON that a command prints; nothing else is on stdout."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_train_tells_where_things_are_and_how_to_go_on(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(recipe_in(tmp_path)), "train.steps=1", "--quiet", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"fewstep sample {out / 'model'} -n 16" in shown
    assert f"fewstep evaluate {out / 'model'}" in shown
    assert str(out / "model") in [line.split()[-1] for line in shown.splitlines()]


def test_train_refuses_a_folder_that_holds_a_run_and_resume_goes_on(run, capsys):
    said = ["train", str(run / "recipe.yaml"), "--out", str(run), "--quiet"]
    assert main(said) == 2
    assert "--resume" in capsys.readouterr().err
    assert answered(capsys, *said, "--resume")["steps"] == 2


def test_sample_writes_a_grid_and_counts_network_calls(run, tmp_path, capsys):
    file = tmp_path / "grid.png"
    found = answered(capsys, "sample", str(run / "model"), "-n", "4", "--out", str(file), "--labels", "3,5")
    assert (found["n"], found["steps"], found["nfe"]) == (4, 2, 2)
    assert Image.open(file).size == (2 * 50, 2 * 50)  # four images of 8 x 8, six times enlarged, with a margin of two


def test_equal_seeds_make_equal_images_and_other_seeds_do_not(run, tmp_path):
    def pixels(*words: str) -> bytes:
        file = tmp_path / "g.png"
        assert main(["sample", str(run / "model"), "-n", "2", "--out", str(file), *words]) == 0
        return Image.open(file).tobytes()

    assert pixels("--seed", "1") == pixels("--seed", "1")
    assert pixels("--seed", "1") != pixels("--seed", "2")


def test_evaluate_names_the_feature_space_of_a_score(run, capsys):
    found = answered(capsys, "evaluate", str(run / "model"), "--metrics", "fid", "--n", "8", "--steps", "1")
    assert found["n"] == 8
    assert found["scores"][0]["label"] == "fid[digits-cnn]"


def test_export_writes_any_checkpoint_that_there_is(run, tmp_path, capsys):
    found = answered(capsys, "export", str(run), "--to", str(tmp_path / "early"), "--checkpoint", "1")
    assert (Path(found["model"]) / "fewstep.json").is_file()
    assert main(["export", str(run), "--to", str(tmp_path / "none"), "--checkpoint", "7"]) == 2
    assert "checkpoint" in capsys.readouterr().err


def test_doctor_passes_a_sound_folder_and_exits_1_on_a_changed_byte(run, tmp_path, capsys):
    assert all(f["level"] != "error" for f in answered(capsys, "doctor", str(run / "model")))
    assert main(["export", str(run), "--to", str(tmp_path / "hurt")]) == 0
    weights = next((tmp_path / "hurt").rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["doctor", str(tmp_path / "hurt")]) == 1


def test_report_names_its_file(run, tmp_path, capsys):
    assert answered(capsys, "report", str(run), "--out", str(tmp_path / "r.html")) == {
        "report": str(tmp_path / "r.html")
    }
    assert "flow_matching" in (tmp_path / "r.html").read_text()


def test_plan_answers_with_roles_stages_and_bytes(run, capsys):
    found = answered(capsys, "plan", str(run / "recipe.yaml"), "train.steps=7")
    assert found["stages"][0]["steps"] == 7
    assert found["roles"][0]["name"] == "student"
    assert found["peak_bytes"] > 0
    assert main(["plan", str(run / "recipe.yaml")]) == 0
    assert "student" in capsys.readouterr().out


def test_plan_refuses_what_a_device_cannot_hold(run, capsys):
    """And says which settings would help."""
    recipe = str(run / "recipe.yaml")
    assert main(["plan", recipe, "--memory", "1"]) == 0
    assert "fits" in capsys.readouterr().out
    assert main(["plan", recipe, "--memory", "1e-5"]) == 2
    assert "gradient_checkpointing" in capsys.readouterr().err


def test_demo_is_handed_its_folder_and_file(monkeypatch, tmp_path, capsys):
    calls = []

    def demo(out, json, tune, show):
        calls.append((out, json, tune, show))
        return {"rows": []}

    monkeypatch.setattr("fewstep.engine.demo.demo", demo)
    assert main(["demo", "--out", str(tmp_path), "--json", "t.json"]) == 0
    assert answered(capsys, "demo", "--out", str(tmp_path), "--full", "--quiet") == {"rows": []}
    assert calls == [(tmp_path, "t.json", None, True), (tmp_path, None, "full", False)]


def test_the_default_run_folder_has_the_names_of_method_and_recipe():
    assert default_out(Path("configs/decoupled_dmd/digits.yaml")) == Path("runs/decoupled_dmd-digits")


def test_a_reference_is_a_name_or_a_mapping():
    assert reference_of(None) is None
    assert reference_of("digits") == "digits"
    assert reference_of("{source: image_folder, path: x}") == {"source": "image_folder", "path": "x"}
    with pytest.raises(UserError, match="--reference"):
        reference_of("{source")
