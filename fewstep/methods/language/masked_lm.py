"""Masked-word pretraining (Devlin et al., arXiv 1810.04805, section 3.1): makes a pretrained encoder from raw text."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.batch import Batch
from ...data.text import Text
from ...draws import Draw
from ...maths.losses import cross_entropy_rows
from ...models.text_encoder import read, width, word_embeddings
from ...roles import Handle, Role, merged
from ..base import Mean, Method, MethodConfig, Paper, Total, Update
from .text_classify import check_text, with_tokenizer

PRETRAIN = {"lr": 1e-4, "weight_decay": 0.01, "decay": "linear"}


class MaskedLMConfig(MethodConfig):
    """Knobs of `masked_lm`."""

    share: float = Field(default=0.15, gt=0, lt=1, description="of the words, which are to be guessed")
    masked: float = Field(default=0.8, ge=0, le=1, description="of these, shown as [MASK]")
    random: float = Field(default=0.1, ge=0, le=1, description="of these, as a random word; the rest as themselves")


class MaskedHead(nn.Module):
    """logits = E LayerNorm(gelu(W h + b)) + c with E the encoder's word embeddings."""

    def __init__(self, features: int, vocab_size: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(features, features), nn.LayerNorm(features)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """hidden [n, features], embeddings [vocab, features] -> [n, vocab]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), embeddings, self.bias)


class MaskedLM(Method):
    """min -log p(word | the other words) over 15 % of the words. Term: `masked_word`. The head is dropped at export."""

    name = "masked_lm"
    kind = "language"
    paper = Paper("BERT: Pre-training of Deep Bidirectional Transformers", "arXiv:1810.04805")
    Config = MaskedLMConfig
    student: Handle
    head: Handle

    def roles(self) -> tuple[Role, ...]:
        """The encoder, called student as everywhere, and the head that guesses words."""
        optimizer = {"optimizer": PRETRAIN}
        return (
            Role("student", tune="full", train_mode=True, defaults=optimizer),
            Role("head", tune="full", build=_head, defaults=optimizer),
        )

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
        """As in `Method`; UserError when the data does not fit the student."""
        super().bind(handles, sources, stores)
        check_text(sources, self.student)

    def train_step(self, batch: Batch, draw: Draw) -> Generator[Update | Total, Mapping[str, Tensor], None]:
        """Hides words and guesses them; the mean is over all guessed words of the step."""
        shown, guessed = self.hide(batch.tokens, batch.mask, self.sources["train"], draw)
        n = yield Total(words=guessed.float().sum())
        hidden = read(self.student, shown, batch.mask).hidden[-1]
        # Logits of the words that are not guessed would cost six times as much.
        logits = self.head(hidden[guessed], word_embeddings(self.student.module))
        wrong = cross_entropy_rows(logits, batch.tokens[guessed])
        yield Update(("student", "head"), {"masked_word": Mean(wrong, n["words"])})

    def exported_module(self) -> nn.Module:
        """The encoder alone, with its tokenizer."""
        return with_tokenizer(merged(self.student), self.sources)

    def hide(self, tokens: Tensor, mask: Tensor, source: Text, draw: Draw) -> tuple[Tensor, Tensor]:
        """The tokens as shown to the encoder, and which of them are to be guessed, both [rows, length]."""
        words, length = source.words, tokens.shape[1]
        special = torch.isin(tokens, torch.tensor(words.special, device=tokens.device))
        guessed = (draw.uniform("guessed", length) <= self.config.share) & mask & ~special
        fate = draw.uniform("fate", length)
        masked = guessed & (fate <= self.config.masked)
        random = guessed & ~masked & (fate <= self.config.masked + self.config.random)
        shown = torch.where(random, draw.integers("random", words.size, length), tokens)
        return shown.masked_fill(masked, words.mask), guessed


def _head(handles: Mapping[str, Handle]) -> nn.Module:
    module = handles["student"].module
    return MaskedHead(width(module), len(word_embeddings(module)))
