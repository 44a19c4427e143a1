"""Text as tokens: raw lines for pretraining and distillation, and labelled lines for a task.

Rows have `tokens` int64 and `mask` bool, both [n, length], and `labels` [n], where -100 means "no label".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from .batch import Cond
from .source import Source, SourceConfig, digest
from .tokenizer import TrainedTokenizer, Words, corpus_file, read_text, tokenizer_of

if TYPE_CHECKING:
    from ..draws import Draw

NO_LABEL = -100


class TextConfig(SourceConfig):
    """What both sources share. `tokenizer` is a folder with tokenizer.json, or `{corpus: FILE, vocab_size: N}`."""

    path: str = Field(description="UTF-8 text file, or the name of a shipped one")
    tokenizer: str | TrainedTokenizer
    length: int = Field(default=128, gt=2, description="tokens of a row, with the two special ones")
    skip: int = Field(default=0, ge=0, description="lines at the head of the file that are no samples")


class Text(Source):
    """Rows of tokens held in memory. Subclasses call `hold` at the end of their constructor."""

    words: Words
    names: list[str] | None = None  # of the classes

    def hold(self, words: Words, tokens: Tensor, mask: Tensor, labels: Tensor | None = None) -> None:
        """Keeps `tokens` and `mask` [N, length], and `labels` [N]."""
        self.words, self.tokens, self.mask = words, tokens.int(), mask
        self.labels = labels if labels is not None else torch.full((len(tokens),), NO_LABEL)

    def __len__(self) -> int:
        return len(self.tokens)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`tokens`, `mask`, `labels`, and an empty `cond`. Nothing is random here."""
        return {"cond": Cond(), "tokens": self.tokens[ids].long(), "mask": self.mask[ids], "labels": self.labels[ids]}

    def content_key(self) -> str:
        """Digest of tokens and labels, and of the vocabulary that the tokens are numbers of."""
        rows = (array.numpy().tobytes() for array in (self.tokens, self.labels))
        return digest(self.words.key(), str(tuple(self.tokens.shape)), *rows)


class TextLinesConfig(TextConfig):
    """`{source: text_lines, path: wordnet/general.txt, tokenizer: {corpus: wordnet/general.txt}, length: 32}`."""

    pack: bool = Field(default=False, description="join lines and cut at `length`, instead of one line a row")
    column: int | None = Field(default=None, ge=0, description="read this column of a tab-separated file")


class TextLines(Text):
    """Raw text, a line a row, or packed without padding. Empty lines are left out."""

    Config = TextLinesConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        c = self.config
        words = tokenizer_of(c.tokenizer)
        lines = _lines(c)
        if c.column is not None:
            lines = [_column(c, line, c.column) for line in lines]
        self.hold(words, *(words.packed if c.pack else words.rows)(lines, c.length))


class TextLabelsConfig(TextConfig):
    """`{source: text_labels, path: wordnet/task-train.tsv, tokenizer: ..., length: 32, copies: 1}`."""

    classes: list[str] | None = Field(default=None, description="labels in the order of their numbers; default: sorted")
    regression: bool = Field(default=False, description="labels are numbers to predict")
    copies: int = Field(default=0, ge=0, description="augmented copies of every row")
    unk: float = Field(default=0.1, ge=0, le=1, description="share of a copy's words that become unknown")
    label_copies: bool = Field(default=True, description="whether copies keep their label")


class TextLabels(Text):
    """Lines `label<TAB>text`. An empty label means there is none.

    With `copies: k`, sample i + c n (c = 1..k) is sample i with every word unknown with probability `unk`: the data
    augmentation of ERNIE's data distillation. Without a draw (validation) the copies are plain.
    """

    Config = TextLabelsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        c = self.config
        words = tokenizer_of(c.tokenizer)
        lines = _lines(c)
        said = [_column(c, line, 0).strip() for line in lines]
        self.names = None if c.regression else c.classes or sorted({label for label in said if label})
        self.classes = 1 if self.names is None else len(self.names)
        labels = _values(c, said) if self.names is None else _numbers(c, said, self.names)
        self.hold(words, *words.rows([_column(c, line, 1) for line in lines], c.length), labels)

    def __len__(self) -> int:
        return len(self.tokens) * (1 + self.config.copies)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`tokens`, `mask`, `labels`, and an empty `cond`; words of copies are replaced by addressed draws."""
        rows = super().fetch(ids % len(self.tokens), draw)
        if not self.config.copies:
            return rows
        copy = ids >= len(self.tokens)
        if not self.config.label_copies:
            rows["labels"] = torch.where(copy, NO_LABEL, rows["labels"])
        if draw is not None:
            lost = draw.uniform("unk", self.config.length).cpu() <= self.config.unk
            plain = torch.isin(rows["tokens"], torch.tensor(self.words.special))
            rows["tokens"] = rows["tokens"].masked_fill(lost & copy[:, None] & ~plain, self.words.unk)
        return rows


def _lines(config: TextConfig) -> list[str]:
    text = read_text(corpus_file(config.path))
    lines = [line for line in text.split("\n")[config.skip :] if line.strip()]
    if not lines:
        raise UserError(f"'{config.path}' holds no text after {config.skip} skipped lines")
    return lines


def _column(config: TextConfig, line: str, column: int) -> str:
    columns = line.split("\t")
    if column >= len(columns):
        raise UserError(f"'{config.path}' has no column {column} in the line {line[:60]!r}")
    return columns[column]


def _values(config: TextLabelsConfig, said: list[str]) -> Tensor:
    try:
        return torch.tensor([float(label or NO_LABEL) for label in said])
    except ValueError as error:
        raise UserError(f"'{config.path}' has a label that is no number, with `regression: true`: {error}") from None


def _numbers(config: TextLabelsConfig, said: list[str], names: list[str]) -> Tensor:
    number = {name: i for i, name in enumerate(names)} | {"": NO_LABEL}
    unknown = next((label for label in said if label not in number), None)
    if unknown is not None:
        raise UserError(f"'{config.path}' has the label '{unknown}', which `classes` does not name")
    return torch.tensor([number[label] for label in said])
