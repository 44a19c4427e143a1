"""Plain finetuning of a text encoder with labels: makes the teachers of the language methods, and is their baseline.

Here are also the classifier, its loss and its score, which those methods share.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ...data.batch import Batch
from ...data.text import NO_LABEL, Text
from ...draws import Draw
from ...errors import UserError
from ...maths.losses import cross_entropy_rows
from ...models.text_encoder import carry_tokenizer, check_fits, read, width, with_classifier
from ...roles import Handle, Role, merged
from ..base import Mean, Method, MethodConfig, Total, Update

FINETUNE = {"lr": 3e-5, "weight_decay": 0.01, "decay": "linear"}


class TextClassifyConfig(MethodConfig):
    """Knobs of `text_classify`."""

    classes: int = Field(default=2, gt=0, description="1 = predict a number")


class TextClassify(Method):
    """min -log softmax(z)_y, z = A tanh(W h_first + b) + a: the classifier of BERT (arXiv 1810.04805). Term: `hard`."""

    name = "text_classify"
    kind = "language"
    Config = TextClassifyConfig
    student: Handle
    head: Handle

    def roles(self) -> tuple[Role, ...]:
        """An encoder, called student as everywhere, and a new linear head on it."""
        optimizer = {"optimizer": FINETUNE}
        return (
            Role("student", tune="full", train_mode=True, defaults=optimizer),
            Role("head", tune="full", build=self._head, defaults=optimizer),
        )

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
        """As in `Method`; UserError when the data does not fit the student or the number of classes."""
        super().bind(handles, sources, stores)
        check_text(sources, self.student)
        check_classes(sources, self.config.classes, "set config.classes to it")

    def train_step(self, batch: Batch, draw: Draw) -> Generator[Update | Total, Mapping[str, Tensor], None]:
        """One pass over labelled rows; rows without a label count nothing."""
        n = yield Total(labels=labelled(batch.labels))
        logits = self.head(read(self.student, batch.tokens, batch.mask).pooled)
        yield Update(("student", "head"), {"hard": Mean(hard_rows(logits, batch.labels), n["labels"])})

    def validation(self, batch: Batch) -> Mapping[str, Tensor]:
        """See `scores`."""
        return scores(self.head(read(self.student, batch.tokens, batch.mask).pooled), batch.labels)

    def exported_module(self) -> nn.Module:
        """Encoder and head as one network."""
        return with_task(merged(self.student), merged(self.head), self.sources)

    def _head(self, handles: Mapping[str, Handle]) -> nn.Module:
        return classifier(width(handles["student"].module), self.config.classes)


def classifier(features: int, classes: int) -> nn.Linear:
    """A linear head with weights N(0, 0.02^2) and no bias at first, as in BERT."""
    head = nn.Linear(features, classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def labelled(labels: Tensor) -> Tensor:
    """Number of rows that have a label, as a float."""
    return (labels != NO_LABEL).float().sum()


def hard_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of rows [rows, classes] with labels [rows], (z - y)^2 with one output; 0 without a label. [rows]"""
    known = labels != NO_LABEL
    if logits.shape[-1] == 1:
        rows = (logits[:, 0].float() - labels.float()) ** 2
    else:
        rows = cross_entropy_rows(logits, labels.clamp(min=0))
    return torch.where(known, rows, 0)


def scores(logits: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """Of rows that have a label: accuracy (0 or 1) and cross_entropy, or squared_error with one output."""
    rows = hard_rows(logits, labels)[labels != NO_LABEL]
    if logits.shape[-1] == 1:
        return {"squared_error": rows}
    return {"accuracy": (logits.argmax(-1) == labels)[labels != NO_LABEL].float(), "cross_entropy": rows}


def check_text(sources: Mapping[str, Any], *handles: Handle) -> None:
    """UserError when a source gives no tokens, other tokens than the next, or some that an encoder cannot read."""
    for name, source in sources.items():
        if not isinstance(source, Text):
            raise UserError(f"data.{name} gives no tokens: use the sources text_lines or text_labels")
        for handle in handles:
            check_fits(handle, source.words.size, source.tokens.shape[1])
    if len({source.words.key() for source in sources.values()}) > 1:
        raise UserError(f"data.{' and data.'.join(sources)} have different tokenizers: write the same one in all")


def check_classes(sources: Mapping[str, Any], classes: int, mend: str) -> None:
    """UserError when a labelled source has another number of classes."""
    for name, source in sources.items():
        if source.classes not in (None, classes):
            raise UserError(f"data.{name} has {source.classes} classes and the classifier {classes}: {mend}")


def with_task(encoder: nn.Module, head: nn.Module, sources: Mapping[str, Text]) -> nn.Module:
    """Encoder and classifier as one network, with the classes' names and the tokenizer of the sources."""
    names = next((source.names for source in sources.values() if source.names is not None), None)
    return with_tokenizer(with_classifier(encoder, head, names), sources)  # type: ignore[arg-type]


def with_tokenizer(module: nn.Module, sources: Mapping[str, Text]) -> nn.Module:
    """The network, which will be saved with the tokenizer of the sources."""
    return carry_tokenizer(module, next(iter(sources.values())).words)
