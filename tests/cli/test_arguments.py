"""What happens to words before typer reads them."""

from __future__ import annotations

import pytest

from fewstep.cli.arguments import numbers, tidy
from fewstep.errors import UserError


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("methods --json", "methods --json=-"),
        ("methods --json -", "methods --json -"),
        ("methods --json out.json", "methods --json out.json"),
        ("methods --json=out.json", "methods --json=out.json"),
        ("sample M --json -n 4", "sample M --json=- -n 4"),
        ("plan R --json train.steps=5", "plan R --json=- train.steps=5"),
        ("train R --debug", "--debug train R"),
        ("--debug train R", "--debug train R"),
    ],
)
def test_json_may_lack_its_file_and_debug_may_stand_anywhere(typed, read):
    assert tidy(typed.split()) == read.split()


def test_labels_are_whole_numbers_with_commas():
    assert numbers("0,10,2", "--labels") == [0, 10, 2]
    with pytest.raises(UserError, match=r"--labels=1;2: write whole numbers"):
        numbers("1;2", "--labels")
