"""Word pieces: trained on a corpus and cached by its content, or read from a model folder, and saved beside a model.

words = tokenizer_of("runs/teacher/model")                           # a folder with tokenizer.json
words = tokenizer_of(TrainedTokenizer(corpus="wordnet/general.txt"))
    tokens, mask = words.rows(["a kind of fish"], length=32)

Text becomes [CLS] pieces [SEP] and padding.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..errors import UserError
from ..resources import asset
from .source import digest
from .wordpiece import learn_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How the five special tokens are spelled: BERT's way, then RoBERTa's.
SPECIAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
FILE = "tokenizer.json"
LEARNED = "pieces 1"  # goes up when the same corpus would give another vocabulary


class TrainedTokenizer(BaseModel):
    """`{corpus: wordnet/general.txt, vocab_size: 4000}`: lower-cased word pieces."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    corpus: str = Field(description="text file, or the name of a shipped one")
    vocab_size: int = Field(default=4000, gt=len(SPECIAL))
    lowercase: bool = True


@dataclass(frozen=True)
class Words:
    """A tokenizer and the ids of its special tokens."""

    tokenizer: Tokenizer
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int

    @property
    def size(self) -> int:
        """Number of entries; a model needs an embedding for each."""
        return self.tokenizer.get_vocab_size()

    @property
    def special(self) -> tuple[int, ...]:
        """Ids that stand for no text."""
        return (self.pad, self.unk, self.cls, self.sep, self.mask)

    def rows(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 and mask bool, both [n, length]: [CLS] text [SEP], cut to `length` or padded."""
        return self._fill([ids[: length - 2] for ids in self._ids(texts)], length)

    def packed(self, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """All texts one after the other, [SEP] between, cut into rows of `length`; only the last row has padding."""
        stream: list[int] = []
        for ids in self._ids(texts):
            stream += [self.sep, *ids] if stream else ids
        return self._fill([stream[i : i + length - 2] for i in range(0, len(stream), length - 2)], length)

    def key(self) -> str:
        """Digest of vocabulary and rules."""
        return digest(self.tokenizer.to_str())

    def save(self, folder: Path, max_length: int) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as `AutoTokenizer.from_pretrained` reads them."""
        from transformers import PreTrainedTokenizerFast

        names = {f"{role}_token": self.tokenizer.id_to_token(getattr(self, role)) for role in SPECIAL}
        whole = PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, model_max_length=max_length, **names)
        whole.save_pretrained(folder)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _fill(self, texts: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
        tokens = torch.full((len(texts), length), self.pad, dtype=torch.int64)
        mask = torch.zeros(len(texts), length, dtype=torch.bool)
        for row, ids in enumerate(texts):
            n = len(ids) + 2
            tokens[row, :n] = torch.tensor([self.cls, *ids, self.sep])
            mask[row, :n] = True
        return tokens, mask


def tokenizer_of(said: str | TrainedTokenizer) -> Words:
    """The tokenizer in a folder or tokenizer.json, or one trained on a corpus (from the cache when there is one).

    UserError when there is no such file, or it has not the five special tokens.
    """
    tokenizer = _read(Path(said)) if isinstance(said, str) else _trained(said)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    found = {role: _find(tokenizer, spellings) for role, spellings in SPECIAL.items()}
    missing = [role for role, number in found.items() if number is None]
    if missing:
        raise UserError(f"tokenizer '{said}' has no {missing[0]} token: it is not one of a text encoder")
    return Words(tokenizer, **found)  # type: ignore[arg-type]


def corpus_file(name: str) -> Path:
    """A text file by path, or a shipped one by name. UserError when there is neither."""
    for file in (Path(name), asset(name)):
        if file.is_file():
            return file
    raise UserError(f"no text file '{name}': give a path, or the name of a shipped text such as wordnet/general.txt")


def read_text(file: Path) -> str:
    """A whole text file. UserError when it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"'{file}' is not UTF-8: convert it") from None


def _find(tokenizer: Tokenizer, spellings: Sequence[str]) -> int | None:
    return next((i for i in map(tokenizer.token_to_id, spellings) if i is not None), None)


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no tokenizer '{path}': give a folder that holds {FILE}, or {{corpus: FILE, vocab_size: N}}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"'{file}' is no tokenizer: {error}") from None


def _trained(spec: TrainedTokenizer) -> Tokenizer:
    corpus = corpus_file(spec.corpus)
    key = digest(LEARNED, corpus.read_bytes(), spec.model_dump_json(exclude={"corpus"}))
    file = _cache() / f"{key[:32]}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        _train(corpus, spec).save(str(aside))
        aside.replace(file)  # several processes may train at once: the last whole file wins
    return _read(file)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep" / "tokenizers"


def _train(corpus: Path, spec: TrainedTokenizer) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    name = {role: spellings[0] for role, spellings in SPECIAL.items()}
    normalizer = normalizers.BertNormalizer(lowercase=spec.lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    text = normalizer.normalize_str(read_text(corpus))
    words = Counter(word for line in text.split("\n") for word, _ in splitter.pre_tokenize_str(line))
    pieces = [*name.values(), *learn_pieces(words, spec.vocab_size - len(name))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=name["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    tokenizer.add_special_tokens(list(name.values()))
    cls, sep = name["cls"], name["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, vocabulary[token]) for token in (cls, sep)],
    )
    return tokenizer
