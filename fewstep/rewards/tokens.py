"""Prompts as token ids, by the tokenizer that lies beside a judge's weights or is named for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .weights import Published, planning

Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]  # -> input_ids and attention_mask, [rows, length]
_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))


def tokenizer(kind: str, place: Path | None, option: str, length: int) -> Tokenize | None:
    """The tokenizer in a folder, which pads and cuts to `length`. kind: transformers' class, e.g. "CLIPTokenizer".

    None where nothing will be read: on the meta device. UserError when the folder has none.
    """
    if place is None or planning():
        return None
    import transformers

    if not _holds_one(place):
        raise UserError(f"{option}: '{place}' has no tokenizer: copy tokenizer.json (or its vocabulary) into it")
    made = getattr(transformers, kind).from_pretrained(place, local_files_only=True)

    def tokenize(prompts: Sequence[str]) -> Mapping[str, Tensor]:
        return made(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    return tokenize


def tokenizer_for(place: Path | None, published: Published, said: str | None) -> Path | None:
    """Where the tokenizer of the weights at `place` lies: as said, else beside them, else where it is published."""
    if place is None or planning():
        return None
    beside = place if place.is_dir() else place.parent
    return beside if said is None and _holds_one(beside) else published.find(said)


def _holds_one(place: Path) -> bool:
    return any(all((place / name).is_file() for name in names) for names in _FILES)
