"""Arguments that several commands share, and the two liberties taken with words before typer reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="a.b=c", help="Fields to override, e.g. train.steps=500.")
]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An exported model folder.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Seed = Annotated[int, typer.Option("--seed", help="Noise of image i is a function of (seed, i).")]
Steps = Annotated[int | None, typer.Option("--steps", help="Sampler steps; default: what the model was distilled for.")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Guidance scale, 1 = off; default: what the model says.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run pipeline code that lies in the folder.")]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="[FILE]", help="Answer in JSON, into FILE; without FILE to stdout, and nothing else there."
    ),
]


def tidy(argv: Sequence[str]) -> list[str]:
    """Moves `--debug` to the front, where typer looks for it, and turns a `--json` without a file into `--json=-`.

    The word after `--json` is its file unless it is an option or an override (`a.b=c`); `--json=FILE` always works.
    """
    words = [word for word in argv if word != "--debug"]
    front = ["--debug"] if len(words) < len(argv) else []
    return front + [_whole(word, after) for word, after in zip(words, [*words[1:], None])]


def _whole(word: str, after: str | None) -> str:
    if word != "--json" or after == "-":
        return word
    alone = after is None or after.startswith("-") or "=" in after
    return "--json=-" if alone else word


def numbers(text: str, option: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2]; UserError that names the option."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option}={text}: write whole numbers with commas between, e.g. 0,1,2") from None
