"""`fewstep export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .answers import answer, megabytes, only_json, say
from .arguments import Json, Run
from .sample import hint

To = Annotated[Path, typer.Option("--to", help="Folder to write; it must be empty or new.")]
At = Annotated[
    int | None, typer.Option("--checkpoint", metavar="N", help="Step of the checkpoint; default: the newest.")
]
Layout = Annotated[
    str | None,
    typer.Option(
        "--lora-layout", metavar="LAYOUT", help="Keys of the LoRA file: diffusers (default), peft, kohya or comfyui."
    ),
]
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="Ask, then upload the folder to the Hugging Face hub."),
]
Private = Annotated[bool, typer.Option("--private", help="With --push: others do not see the repository.")]
Yes = Annotated[bool, typer.Option("--yes", help="With --push: upload without asking.")]


def export(
    run: Run,
    to: To,
    checkpoint: At = None,
    lora_layout: Layout = None,
    push: Push = None,
    private: Private = False,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Write a checkpoint's student as a model folder, and upload it if asked to."""
    from ..engine.exporting import export as write

    _check_push(push, private, yes)
    with only_json(json):
        folder = write(run, to, checkpoint, lora_layout)
        address = _pushed(folder, push, private, yes) if push is not None else None
    found = {"model": str(folder), **({"pushed": address} if push is not None else {})}
    answer(found, json, lambda: say(model=folder, sample=hint(folder), pushed=address))


def _check_push(name: str | None, private: bool, yes: bool) -> None:
    """Before the work: whether there will be an answer, and a place and a token to upload with."""
    if name is None:
        if private or yes:
            raise UserError(
                f"{'--private' if private else '--yes'} goes with --push OWNER/NAME: leave it out, or add that"
            )
        return
    from ..exporting.push import check_target

    check_target(name)
    if not (yes or sys.stdin.isatty()):
        raise UserError("--push asks before it uploads, and no terminal can answer here: add --yes")


def _pushed(folder: Path, name: str, private: bool, yes: bool) -> str | None:
    """The address; None when the answer was no."""
    from ..exporting.push import push

    files = [file for file in folder.rglob("*") if file.is_file()]
    size = megabytes(sum(file.stat().st_size for file in files))
    seen = "private" if private else "public, unless it is there already and private"
    what = f"upload '{folder}' ({len(files)} files, {size}) to https://huggingface.co/{name} ({seen})?"
    if not yes and not typer.confirm(what, err=True):
        return None
    return push(folder, name, private)
