"""Bad input through the command line: exit code 2 (1 for a failed run) and one line that names the mend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from fewstep.cli import main as cli
from fewstep.cli.main import main
from fewstep.errors import RunFailed

RECIPE = {
    "method": "flow_matching",
    "student": {"from": "unet2d", "build": {"sample_size": 8, "classes": 10}},
    "data": {"train": {"source": "digits"}},
    "train": {"steps": 2, "batch": 4},
}


@pytest.fixture
def recipe(tmp_path):
    """A sound recipe's file."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return file


def complaint(capsys) -> str:
    """The only line on stderr; stdout is empty."""
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trian.steps=3", "unknown key 'trian': did you mean 'train'?"),
        ("train.stpes=3", "unknown key 'train.stpes': did you mean 'steps'?"),
        ("train.steps=many", "train.steps='many'"),
        ("train.steps=0", "train.steps=0"),
        ("config.label_dropuot=0", "did you mean 'label_dropout'?"),
        ("config.label_dropout=2", "label_dropout=2"),
        ("method=flow_matchng", "unknown method 'flow_matchng': did you mean 'flow_matching'?"),
        ("data.train.source=digts", "unknown data source 'digts': did you mean 'digits'?"),
        ("data.train.szie=8", "unknown key 'szie'"),
        ("student.from=no/such/folder", "no/such/folder"),
        ("stages.trian.steps=1", "has no stage 'trian': did you mean 'train'?"),
        ("train.steps", "'train.steps' is no override"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_in_one_line_before_anything_is_written(
    recipe, tmp_path, capsys, override, named
):
    out = tmp_path / "run"
    assert main(["train", str(recipe), override, "--out", str(out)]) == 2
    assert named in complaint(capsys)
    assert not out.exists()


def test_a_missing_recipe_is_named(tmp_path, capsys):
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in complaint(capsys)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_missing_teacher_folder_is_named(tmp_path, capsys, command):
    file = tmp_path / "r.yaml"
    said = {
        "method": "decoupled_dmd",
        "teacher": "no/such/teacher",
        "data": {"train": {"source": "labels", "classes": 10}},
    }
    file.write_text(yaml.safe_dump({**said, "train": {"steps": 1, "batch": 4}}))
    assert main([command, str(file), *(["--out", str(tmp_path / "run")] if command == "train" else [])]) == 2
    assert "no/such/teacher" in complaint(capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian"], "'trian'"),
        (["train"], "fewstep train --help"),
        (["train", "r.yaml", "--ot", "x"], "--out"),
        (["sample", "m", "-n", "four"], "-n"),
        (["sample", "m", "-n", "0"], "-n"),
        (["plan", "--json", "recipe.yaml"], "RECIPE"),
    ],
)
def test_a_misspelt_command_line_exits_2(capsys, words, named):
    assert main(words) == 2
    assert named in complaint(capsys)


def test_a_failed_run_exits_1_with_its_own_words(recipe, monkeypatch, capsys):
    monkeypatch.setattr("fewstep.engine.trainer.train", raising(RunFailed("loss.dm is nan at step 3")))
    assert main(["train", str(recipe)]) == 1
    assert complaint(capsys) == "error: loss.dm is nan at step 3"


def test_a_mistake_of_ours_is_one_line_and_debug_adds_the_traceback(recipe, monkeypatch, capsys):
    monkeypatch.setattr("fewstep.engine.trainer.train", raising(ZeroDivisionError("by nothing\nsecond line")))
    assert main(["train", str(recipe)]) == 1
    assert complaint(capsys) == "error: unexpected ZeroDivisionError: by nothing; rerun with --debug"
    assert main(["train", str(recipe), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_exits_1(recipe, monkeypatch, capsys):
    monkeypatch.setattr("fewstep.engine.trainer.train", raising(KeyboardInterrupt()))
    assert main(["train", str(recipe)]) == 1
    assert complaint(capsys) == "error: interrupted"


def test_of_several_processes_each_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["plan", "absent.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error (process 1): no recipe")


def raising(error: BaseException):
    """A function that raises `error` whatever it is given."""

    def function(*args, **kwargs):
        raise error

    return function


def test_no_words_at_all_show_the_help(capsys):
    assert main([]) == 0
    assert "Usage: fewstep" in capsys.readouterr().out


def test_help_and_the_package_import_neither_torch_nor_pydantic():
    check = "import sys, fewstep, fewstep.cli.main as m; m.main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert cli.__name__ in loaded
    assert not loaded & {"torch", "diffusers", "pydantic", "numpy", "yaml", "matplotlib"}


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fewstep", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "fewstep")
