"""A folder of pictures with a caption each, in a table or in text files beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .image_folder import list_images
from .pictures import Pictures, PicturesConfig

TABLE = "metadata.jsonl"
KEYS = ("text", "caption")


class CaptionsConfig(PicturesConfig):
    """`{source: captions, path: photos, size: 512}`."""

    path: str


class Captions(Pictures):
    """A folder of pictures with a caption each; rows are those of `Pictures`.

    Captions stand in `metadata.jsonl`, a line `{"file_name": "a.png", "text": "..."}` a picture (Hugging Face's
    imagefolder; the key may be `caption`), or in `a.txt` beside `a.png`. Samples come in the order of the table's lines
    (a picture that it does not list is left out), or of file names. A picture that cannot be decoded raises UserError
    when it is fetched; `skip_corrupt` decodes all of them once at the start and leaves out those that fail. `files` are
    the pictures served.
    """

    Config = CaptionsConfig
    kind = "captions"

    def __init__(self, **config: Any):
        super().__init__(**config)
        self._serve(captioned(Path(self.config.path)))
        if self.config.skip_corrupt:
            self._serve([(self.files[i], self.prompts[i]) for i in self.sound(len(self))])
        self.hold()

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, i: int) -> Path:
        """The file."""
        return self.files[i]

    def caption(self, i: int) -> str:
        """As the table or the text file says."""
        return self.prompts[i]

    def called(self, i: int) -> str:
        """The file's path."""
        return str(self.files[i])

    def _serve(self, pairs: Sequence[tuple[Path, str]]) -> None:
        self.files, self.prompts = [file for file, _ in pairs], [text for _, text in pairs]


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) of every sample in a folder.

    UserError when there is no such folder or no picture, or a picture lacks its caption or a caption its picture.
    """
    if not folder.is_dir():
        raise UserError(f"captions: no folder '{folder}': set `path` to a folder of pictures with captions")
    return _from_table(folder / TABLE) if (folder / TABLE).is_file() else _from_neighbours(list_images(folder)[0])


def _from_table(table: Path) -> list[tuple[Path, str]]:
    lines = _text(table).split("\n")
    pairs = [_entry(table, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise UserError(f"captions: '{table}' is empty: write a line a picture, or remove it and use .txt files")
    missing = next((file for file, _ in pairs if not file.is_file()), None)
    if missing is not None:
        raise UserError(f"captions: '{table}' names '{missing.name}', which is not there: remove the line")
    return pairs


def _entry(table: Path, number: int, line: str) -> tuple[Path, str]:
    where = f"captions: line {number} of '{table}'"
    try:
        said = json.loads(line)
        name = said["file_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{where} is no {{"file_name": ..., "text": ...}}: correct it') from None
    caption = next((said[key] for key in KEYS if isinstance(said.get(key), str)), None)
    if caption is None:
        raise UserError(f"{where} has no caption for '{name}': write it as `text` or `caption`")
    return table.parent / name, caption


def _from_neighbours(files: Sequence[Path]) -> list[tuple[Path, str]]:
    bare = next((file for file in files if not file.with_suffix(".txt").is_file()), None)
    if bare is not None:
        raise UserError(f"captions: '{bare}' has no caption: write '{bare.stem}.txt' beside it, or list it in {TABLE}")
    return [(file, _text(file.with_suffix(".txt")).strip()) for file in files]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"captions: '{file}' is not UTF-8: convert it") from None
