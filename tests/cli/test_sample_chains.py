"""`fewstep sample` of protein models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fewstep.cli.main import main
from fewstep.cli.sample import hint
from fewstep.data.chains import Chains
from fewstep.exporting.chains import generate_chains
from tests.exporting.protein_students import protein_student
from tests.exporting.students import student


@pytest.fixture(scope="module")
def toy():
    return protein_student()


@pytest.fixture(scope="module")
def model(toy, tmp_path_factory):
    return toy.export(tmp_path_factory.mktemp("cli") / "m")


def _answer(capsys, *words):
    assert main(["sample", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _coordinates(file):
    lines = [line for line in Path(file).read_text().splitlines() if line.startswith("ATOM")]
    return np.array([[float(line[i : i + 8]) for i in (30, 38, 46)] for line in lines])


@pytest.mark.parametrize("said", (["--length", "12,20"], ["--length", "12", "--length", "20"]))
def test_files_hold_the_models_chains_of_the_lengths_asked_for_in_turn(model, tmp_path, capsys, said):
    found = _answer(capsys, model, "-n", 3, "--seed", 4, "--out", tmp_path / "d", *said)
    assert (found["n"], found["lengths"], found["steps"], found["nfe"]) == (3, [12, 20], 4, 4)
    made = generate_chains(model, 3, seed=4, lengths=(12, 20)).chains
    assert len(found["files"]) == len(list((tmp_path / "d").iterdir())) == 3
    for file, chain in zip(found["files"], made, strict=True):
        assert np.abs(_coordinates(file) - chain).max() < 0.0015


def test_steps_noise_and_format_are_asked_for(model, tmp_path, capsys):
    words = ("-n", 1, "--length", 12, "--out", tmp_path / "d", "--steps", 2, "--noise-scale", 1, "--format", "cif")
    found = _answer(capsys, model, *words)
    assert (found["steps"], found["noise_scale"]) == (2, 1.0)
    structure_io = pytest.importorskip("biotite.structure.io")
    (chain,) = generate_chains(model, 1, lengths=(12,), steps=2, noise_scale=1.0).chains
    assert np.abs(structure_io.load_structure(found["files"][0]).coord - chain).max() < 0.0015


def test_what_was_made_is_told(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(model), "-n", "4", "--length", "12"]) == 0
    shown = capsys.readouterr().out
    assert "files         chains/000000.pdb .. chains/000003.pdb" in shown
    assert "noise scale   0.45" in shown and "ms per chain" in shown
    assert hint(model) == f"fewstep sample {model} -n 16 --out chains"


def test_without_a_length_chains_are_as_long_as_the_model_makes_them(toy, tmp_path, capsys):
    toy.module.register_to_config(shortest=10, longest=16)
    limited = toy.export(tmp_path / "m")
    toy.module.register_to_config(shortest=None, longest=None)
    assert _answer(capsys, limited, "-n", 1, "--out", tmp_path / "d")["lengths"] == [16]
    assert main(["sample", str(limited), "--length", "17"]) == 2
    assert "lengths=[17]: this model makes chains of 10 to 16 residues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    (
        (["--prompt", "a cat"], "this model makes protein chains: leave --prompt out"),
        (["--labels", "1"], "this model makes protein chains: leave --labels out"),
        (["--length", "0"], "lengths=[0]: this model makes chains of 1 residues or more"),
        (["--length", "ten"], "--length=ten: write whole numbers"),
        (["--format", "pbd"], "did you mean 'pdb'?"),
        (["--noise-scale=-1"], "noise_scale=-1.0"),
        (["--steps", "0"], "whole number from 1"),
        (["--cath", "1,2,3"], "knows no fold classes"),
        (["--guidance", "2"], "needs fold labels"),
    ),
)
def test_bad_words_are_errors_of_one_line(model, tmp_path, capsys, words, said):
    assert main(["sample", str(model), "-n", "1", "--out", str(tmp_path / "d"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("word", (["--length", "12"], ["--noise-scale", "1"], ["--format", "cif"], ["--cath", "1,1,1"]))
def test_a_model_of_images_refuses_words_of_chains(tmp_path, capsys, word):
    pixels = student().export(tmp_path / "m")
    assert main(["sample", str(pixels), "-n", "1", *word]) == 2
    assert capsys.readouterr().err == f"error: this model makes images: leave {word[0]} out\n"


def test_a_model_of_images_writes_a_grid_by_default(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = student().export(tmp_path / "m")
    assert _answer(capsys, pixels, "-n", 1)["file"] == "grid.png"
    assert (tmp_path / "grid.png").exists()
    assert hint(pixels).endswith("--out grid.png")


def _labelled(folder, names):
    (folder / "cath.csv").write_text(
        "name,cath\n" + "".join(f"{n},{c}\n" for n, c in zip(names, ("3.40.50", "1.10.8")))
    )
    (folder / "pairs.csv").write_text("length,cath\n44,3.40.50\n48,1.10.8\n")
    (folder / "folds.txt").write_text("1.10.8\n2.60.40\n3.40.50\n")
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "pair_width": 8, "index_width": 8, "time_width": 8}
    bounds = {"shortest": 40, "longest": 48, "folds": str(folder / "folds.txt")}
    teacher = {
        "method": "protein_flow_matching",
        "student": {"from": "protein_flow", "build": {**sizes, "cath_classes": [3, 3, 3]}},
        "config": {"steps": 4, "renewal": 0.5},
        "data": {"train": {"source": "chains", "labels": str(folder / "cath.csv"), **bounds}},
        "train": {"steps": 2, "batch": 4, "check_export": False},
    }
    student = {
        "method": "sid_protein",
        "teacher": {"from": str(folder / "teacher" / "model")},
        "config": {"steps": 2},
        "data": {"train": {"source": "lengths", "pairs": str(folder / "pairs.csv"), **bounds}},
        "train": {"steps": 1, "batch": 2, "check_export": False},
    }
    for name, said in (("teacher", teacher), ("student", student)):
        (folder / f"{name}.yaml").write_text(json.dumps(said))


def test_a_teacher_of_labelled_chains_and_its_student_are_asked_for_a_cath_code(tmp_path, capsys):
    """From tables of folds to designs of one; another count of classes is refused before training."""
    names = [c.name for c in Chains(shortest=40, longest=48).chains]
    _labelled(tmp_path, names)
    train = [str(tmp_path / "teacher.yaml"), "--out", str(tmp_path / "teacher"), "--quiet"]
    assert main(["train", *train, "student.build.cath_classes=[2,2,2]"]) == 2
    assert "data.train has (3, 3, 3) fold classes and the network (2, 2, 2)" in capsys.readouterr().err
    assert main(["train", *train]) == 0
    assert main(["train", str(tmp_path / "student.yaml"), "--out", str(tmp_path / "student"), "--quiet"]) == 0
    capsys.readouterr()
    for run in ("teacher", "student"):
        model, words = tmp_path / run / "model", ("-n", 1, "--length", 12, "--guidance", 2)
        by_code = _answer(capsys, model, *words, "--cath", "3.40.50", "--out", tmp_path / f"{run}1")
        by_number = _answer(capsys, model, *words, "--cath", "3,3,3", "--out", tmp_path / f"{run}2")
        assert Path(by_code["files"][0]).read_text() == Path(by_number["files"][0]).read_text()
        assert main(["sample", str(model), "--cath", "4.10.1"]) == 2
        assert "fold 4.10.1 is not among the 3 that are known here" in capsys.readouterr().err


def test_a_model_that_names_no_codes_asks_for_numbers(model, capsys):
    """It may have been made elsewhere."""
    assert main(["sample", str(model), "--cath", "3.40.50"]) == 2
    assert "names no CATH codes, so write its labels" in capsys.readouterr().err
