"""Prompts without pictures, for methods whose student makes its own samples."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import Tensor

from ..errors import UserError, nearest
from .batch import Cond
from .encoded import CacheConfig
from .source import Source, digest

if TYPE_CHECKING:
    from ..draws import Draw

JSON = (".jsonl", ".ndjson")


class PromptsConfig(CacheConfig):
    """`{source: prompts, path: prompts.txt}`, or `{source: prompts, path: prompts.jsonl, column: caption}`."""

    path: str = Field(description="UTF-8 text with one prompt a line, or .jsonl")
    column: str = Field(default="prompt", description="of a .jsonl file: where a line's prompt stands")
    size: int | None = Field(
        default=None,
        gt=0,
        description="pixels a side that are drawn, for networks of any size; default: the pipeline's own",
    )
    skip_corrupt: bool = Field(default=False, description="leave out lines that hold no prompt, with a warning")


class Prompts(Source):
    """One prompt a line. `prompt` is a list; `cond` is empty until a family fills it.

    A line of a .jsonl file is an object with the prompt under `column`, or a bare string. A prompt's id is its line
    number, from 0; with `skip_corrupt` it is its number among the lines that hold one.
    """

    Config = PromptsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        file = Path(self.config.path)
        lines = _lines(file)
        if file.suffix.lower() in JSON:
            found = [_entry(line, self.config.column) for line in lines]
        else:
            found = [(line, "is empty: a prompt's index is its line number") for line in lines]
        self.row_shape = None if self.config.size is None else (3, self.config.size, self.config.size)
        self.prompts = self._kept([prompt for prompt, _ in found], [fault for _, fault in found])

    def __len__(self) -> int:
        return len(self.prompts)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`prompt`, a list of n strings."""
        return {"cond": Cond(), "prompt": [self.prompts[i] for i in ids.tolist()]}

    def content_key(self) -> str:
        """Digest of the prompts."""
        return digest(*self.prompts)

    def _kept(self, prompts: Sequence[str], faults: Sequence[str]) -> list[str]:
        path, bad = self.config.path, [i for i, prompt in enumerate(prompts) if not prompt.strip()]
        if not bad:
            return list(prompts)
        first = f"line {bad[0] + 1} of '{path}' {faults[bad[0]]}"
        if not self.config.skip_corrupt:
            raise UserError(f"prompts: {first}; mend it, or set `skip_corrupt: true`")
        if len(bad) == len(prompts):
            raise UserError(f"prompts: none of the {len(bad)} lines of '{path}' holds a prompt: {first}")
        warnings.warn(
            f"prompts: left out {len(bad)} of {len(prompts)} lines that hold no prompt, the first: {first}",
            stacklevel=4,
        )
        return [prompt for prompt in prompts if prompt.strip()]


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"prompts: no file '{file}': set `path` to a text file with one prompt a line") from None
    except UnicodeDecodeError:
        raise UserError(f"prompts: '{file}' is not UTF-8: convert it") from None
    # not splitlines(): U+2028 and form feeds inside a prompt would shift the index of all that follow
    lines = [line.rstrip("\r") for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise UserError(f"prompts: '{file}' is empty: write one prompt a line")
    return lines


def _entry(line: str, column: str) -> tuple[str, str]:
    """The prompt of a line of JSON, and what is wrong with the line where it holds none."""
    try:
        said = json.loads(line)
    except ValueError:
        return "", f'is no JSON: write {{"{column}": "..."}}'
    if isinstance(said, str):
        return said, "is empty"
    if not isinstance(said, dict):
        return "", f'is neither an object nor a string: write {{"{column}": "..."}}'
    if column not in said:
        return "", f"has no column '{column}': {nearest(column, map(str, said))}"
    prompt = said[column]
    return (prompt, f"has an empty '{column}'") if isinstance(prompt, str) else ("", f"has no text in '{column}'")
