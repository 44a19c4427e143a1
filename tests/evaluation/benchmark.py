"""A tiny text-to-image model under a tiny protocol, for tests of what happens on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fewstep.cli.main import main

PROMPTS = ("a cat", "a dog in a hat", "red boats", "an old map", "two owls", "the sea")


def protocol(folder: Path, clip: Path, **said: Any) -> Path:
    """A protocol of six prompts, scored by a tiny CLIP; said: other keys, None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    options = {"from": str(clip)}
    base = {"prompts": {"path": "prompts.txt"}, "metrics": {"clip_score": options, "hpsv2": options}}
    whole = {key: value for key, value in {**base, **said}.items() if value is not None}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(whole))
    return folder / "tiny.yaml"


def evaluated(capsys: Any, *words: object) -> dict[str, Any]:
    """The answer of `fewstep evaluate ... --json`; it must succeed."""
    code, out, err = said(capsys, "evaluate", *words, "--json")
    assert code == 0, err
    return json.loads(out)


def said(capsys: Any, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err
