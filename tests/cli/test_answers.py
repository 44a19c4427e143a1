"""How commands answer: JSON alone on stdout, files, tables; and that the first process speaks for all."""

from __future__ import annotations

import json

import pytest

from fewstep.cli.answers import answer, megabytes, number, only_json, table
from fewstep.cli.main import main
from fewstep.errors import UserError

FIELDS = {"name", "kind", "paper", "roles", "proven"}


def test_methods_answer_with_the_fields_that_scripts_read(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(set(m) == FIELDS for m in found)
    assert all(m["proven"] in ("measured", "unit", "reconstruction") for m in found)
    assert {"decoupled_dmd", "flow_matching"} <= {m["name"] for m in found}


def test_methods_are_a_table_for_people(capsys):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert "decoupled_dmd" in shown
    assert "{" not in shown


def test_what_libraries_print_stays_out_of_the_json(monkeypatch, capsys):
    def chatty() -> list:
        print("loading ...")
        return []

    monkeypatch.setattr("fewstep.methods.listing.list_methods", chatty)
    assert main(["methods", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == []
    assert said.err == "loading ...\n"


def test_json_goes_to_a_file_beside_the_table(tmp_path, capsys):
    file = tmp_path / "new" / "methods.json"
    assert main(["methods", "--json", str(file)]) == 0
    assert {m["name"] for m in json.loads(file.read_text())} >= {"decoupled_dmd"}
    assert "decoupled_dmd" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write --json"):
        answer({}, str(tmp_path), lambda: None)


def test_numbers_that_json_has_not_become_null(capsys):
    answer({"a": float("nan"), "b": [1.5, float("inf")], 3: (None,)}, "-", lambda: None)
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "3": [None]}


def test_only_the_first_of_several_processes_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    answer({}, "-", lambda: print("shown"))
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    answer({}, None, lambda: print("shown"))
    assert capsys.readouterr().out == "shown\n"


def test_tables_show_brackets_as_they_are(capsys):
    table(("score", "value"), [("fid[digits-cnn]", 1)])
    assert "fid[digits-cnn]" in capsys.readouterr().out


def test_without_a_promise_stdout_is_left_alone(capsys):
    with only_json("file.json"):
        print("here")
    assert capsys.readouterr().out == "here\n"


def test_numbers_and_sizes_are_short():
    assert [number(v) for v in (12345, 0.012345, None)] == ["12,345", "0.0123", "–"]
    assert [megabytes(v) for v in (0, 3 << 20, 5 << 29)] == ["–", "3.00 MiB", "2.50 GiB"]
