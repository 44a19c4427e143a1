"""`fewstep sample` of text-to-image models."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from fewstep.cli.main import main
from tests.exporting.students import student
from tests.exporting.text_students import text_student


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    return text_student(root / "base", steps=2, guidance=5.0, embedded=True, origin=50).export(root / "m")


def _drawn(model, tmp_path, *words):
    file = tmp_path / "grid.png"
    assert main(["sample", str(model), "--out", str(file), "-n", "4", *words]) == 0
    return Image.open(file).tobytes()


def test_prompts_are_drawn_in_turn(model, tmp_path, capsys):
    both = _drawn(model, tmp_path, "--prompt", "a cat", "--prompt", "a dog", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["steps"], found["nfe"]) == (4, 2, 2)
    four = ["--prompt", "a cat", "--prompt", "a dog"] * 2
    assert both == _drawn(model, tmp_path, *four) != _drawn(model, tmp_path, "--prompt", "a cat")


def test_the_fed_guidance_may_be_chosen(model, tmp_path):
    said = ("--prompt", "a cat", "--guidance")
    assert _drawn(model, tmp_path, *said, "5") == _drawn(model, tmp_path, *said[:2])
    assert _drawn(model, tmp_path, *said, "5") != _drawn(model, tmp_path, *said, "14")


def test_a_missing_prompt_and_one_too_many_are_errors_of_one_line(model, tmp_path, capsys):
    assert main(["sample", str(model), "-n", "1"]) == 2
    assert '--prompt "a photo of a cat"' in capsys.readouterr().err
    pixels = student("unet2d").export(tmp_path / "m")
    assert main(["sample", str(pixels), "-n", "1", "--prompt", "a cat"]) == 2
    assert "leave --prompt out" in capsys.readouterr().err
