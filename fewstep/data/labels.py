"""Data-free sources: conditions without samples, for methods whose student makes its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from .batch import Cond
from .source import Source, SourceConfig, digest

if TYPE_CHECKING:
    from ..draws import Draw


class LabelsConfig(SourceConfig):
    """`{source: labels, classes: 10}`."""

    classes: int = Field(gt=0)
    count: int = Field(default=50_000, gt=0, description="samples in one pass")


class Labels(Source):
    """Class labels alone: sample i has label i mod classes, so every class comes equally often."""

    Config = LabelsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.classes = self.config.classes

    def __len__(self) -> int:
        return self.config.count

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`cond.label` [n]."""
        return {"cond": Cond(label=torch.as_tensor(ids) % self.config.classes)}

    def content_key(self) -> str:
        """Digest of the two numbers."""
        return digest(f"labels {self.config.classes} {self.config.count}")


class PromptsConfig(SourceConfig):
    """`{source: prompts, path: prompts.txt}`."""

    path: str


class Prompts(Source):
    """A UTF-8 text file with one prompt a line. `prompt` is a list; `cond` is empty until a family fills it."""

    Config = PromptsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.prompts = _read_lines(Path(self.config.path))

    def __len__(self) -> int:
        return len(self.prompts)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`prompt`, a list of n strings."""
        return {"cond": Cond(), "prompt": [self.prompts[i] for i in ids.tolist()]}

    def content_key(self) -> str:
        """Digest of the lines."""
        return digest(*self.prompts)


def _read_lines(file: Path) -> list[str]:
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
    if "" in lines:
        raise UserError(
            f"prompts: line {lines.index('') + 1} of '{file}' is empty: a prompt's index is its line number"
        )
    return lines
