"""The prompts of a protocol, from the files in which benchmarks publish them.

captions.txt, prompts.jsonl     one a line, as the data source `prompts` reads them
prompts.json                    ["a cat", ...] or [{"prompt": "a cat"}, ...]
meta_data.json                  {id: {"category": ..., "prompt": ...}}: pictures are called category/id
captions_val2017.json           COCO's annotations: of every image the caption with the smallest annotation id
prompts/                        a folder of .json lists, a style each: pictures are called style/00000
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.prompts import JSON, Prompts
from ..data.source import digest
from ..errors import UserError

LINES = (".txt", *JSON)


@dataclass(frozen=True)
class PromptSet:
    """Texts in order, index by index. groups: the style or category of each. names: of pictures, as benchmarks call them."""

    texts: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Digest of the texts in order."""
        return digest(*self.texts)

    def first(self, n: int) -> PromptSet:
        """n of them: the first, or of groups an equal share of each, in order."""
        if n > len(self):
            raise UserError(f"there are {len(self)} prompts, not {n}: lower n, or give more with --prompts")
        chosen = [i * len(self) // n for i in range(n)] if self.groups else range(n)
        return self.pick(chosen)

    def pick(self, rows: Iterable[int]) -> PromptSet:
        """Those rows, in that order; a row may come again."""
        rows = tuple(rows)

        def of(column: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if column is None else tuple(column[i] for i in rows)

        return PromptSet(tuple(self.texts[i] for i in rows), of(self.groups), of(self.names))

    def refuse_duplicates(self) -> None:
        """UserError that names the first prompt that comes twice."""
        seen: dict[str, int] = {}
        for i, text in enumerate(self.texts):
            if text in seen:
                raise UserError(
                    f"prompts {seen[text]} and {i} (from 0) are the same, '{text[:60]}': remove one, or set "
                    "`prompts: {duplicates: true}` in the protocol"
                )
            seen[text] = i


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a file or folder in one of the forms above. UserError names the file, and the entry that is wrong."""
    if path.is_dir():
        return _styles(path)
    if path.suffix.lower() in LINES:
        return PromptSet(tuple(Prompts(path=str(path)).prompts), _tags(path))
    if path.suffix.lower() != ".json":
        raise UserError(
            f"prompts: '{path}' is none of {', '.join(LINES)}, .json, or a folder of .json lists: convert it"
        )
    said = _load(path)
    if isinstance(said, list):
        return PromptSet(_list(said, path))
    if isinstance(said, dict) and "annotations" in said:
        return _coco(said["annotations"], path)
    if isinstance(said, dict):
        return _categories(said, path)
    raise UserError(f"prompts: '{path}' holds neither a list nor a mapping: write [\"a prompt\", ...]")


def _tags(path: Path) -> tuple[str, ...] | None:
    """The `tag` of each line of JSON, by which GenEval's tasks are told; None when not every line has one."""
    if path.suffix.lower() not in JSON:
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    tags = [line.get("tag") if isinstance(line, dict) else None for line in lines]
    return tuple(map(str, tags)) if all(tags) else None


def _styles(folder: Path) -> PromptSet:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"prompts: no .json file in '{folder}': put a list of prompts a style there")
    texts: list[str] = []
    groups: list[str] = []
    names: list[str] = []
    for file in files:
        found = _list(_load(file), file)
        texts += found
        groups += [file.stem] * len(found)
        names += [f"{file.stem}/{i:05d}" for i in range(len(found))]
    return PromptSet(tuple(texts), tuple(groups), tuple(names))


def _list(said: Any, file: Path) -> tuple[str, ...]:
    if not isinstance(said, list) or not said:
        raise UserError(f"prompts: '{file}' holds no list of prompts: write [\"a prompt\", ...]")
    return tuple(_text(x.get("prompt") if isinstance(x, Mapping) else x, i, file) for i, x in enumerate(said))


def _categories(said: Mapping[str, Any], file: Path) -> PromptSet:
    rows = [(str(key), x) for key, x in said.items()]
    wrong = next((key for key, x in rows if not isinstance(x, Mapping) or not isinstance(x.get("category"), str)), None)
    if wrong is not None or not rows:
        raise UserError(
            f"prompts: '{file}' at '{wrong}' has no category and prompt: write {{id: {{category, prompt}}}}"
        )
    texts = tuple(_text(x.get("prompt"), key, file) for key, x in rows)
    return PromptSet(texts, tuple(x["category"] for _, x in rows), tuple(f"{x['category']}/{key}" for key, x in rows))


def _coco(annotations: Sequence[Mapping[str, Any]], file: Path) -> PromptSet:
    chosen: dict[int, tuple[int, str]] = {}
    try:
        for entry in annotations:
            image, this = int(entry["image_id"]), (int(entry["id"]), str(entry["caption"]))
            chosen[image] = min(chosen.get(image, this), this)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"prompts: '{file}' is no caption file of COCO ({error}): fetch it anew") from None
    # captions end in stray blanks and line breaks
    return PromptSet(tuple(" ".join(chosen[image][1].split()) for image in sorted(chosen)))


def _text(said: Any, where: int | str, file: Path) -> str:
    if not isinstance(said, str) or not said.strip():
        raise UserError(f"prompts: entry {where} of '{file}' holds no prompt: mend it")
    return said


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"prompts: no file '{file}'") from None
    except ValueError as error:
        raise UserError(f"prompts: '{file}' is no JSON ({error}): mend it, or fetch it anew") from None
