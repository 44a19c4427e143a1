"""ERNIE-Tiny: four stages from general to task knowledge, one change at a time (Su et al., arXiv 2106.02241).

    stage                   teacher      text      terms
    gd   general            pretrained   general   attention, hidden
    ged  general-enhanced   finetuned    general   attention, hidden
    tad  task-adaptive      finetuned    task      attention, hidden
    tsd  task-specific      finetuned    task      attention, hidden, soft, hard

The paper's training code is not public: latent losses and layer map are those of the TinyBERT family
(arXiv 1909.10351), step sizes are of the usual order.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.batch import Batch
from ...draws import Draw
from ...errors import UserError
from ...maths.divergences import forward_kl
from ...models.text_encoder import Reading, classes_of, depth, heads, logits, read, width
from ...roles import Handle, Role, merged
from ..base import Mean, Method, MethodConfig, Paper, Stage, Total, Update
from .text_classify import (
    check_classes,
    check_text,
    classifier,
    hard_rows,
    labelled,
    scores,
    with_task,
    with_tokenizer,
)


@dataclass(frozen=True)
class Plan:
    """What changes from stage to stage: teacher, source, whether labels and logits count, batch, factor on the rate."""

    teacher: str
    data: str
    task: bool
    batch: int
    lr: float

    @property
    def trains(self) -> tuple[str, ...]:
        """Roles that step."""
        return ("student", "projectors", "head") if self.task else ("student", "projectors")


PLANS: Mapping[str, Plan] = {
    "gd": Plan("pretrained", "general", task=False, batch=256, lr=1.0),
    "ged": Plan("finetuned", "general", task=False, batch=256, lr=0.2),
    "tad": Plan("finetuned", "task", task=False, batch=32, lr=0.1),
    "tsd": Plan("finetuned", "task", task=True, batch=32, lr=0.06),
}
OPTIMIZER = {"lr": 5e-4, "weight_decay": 0.01, "decay": "linear"}


class ErnieTinyConfig(MethodConfig):
    """Knobs of ERNIE-Tiny. `weights` has the terms attention, hidden, soft and hard."""

    layer_map: tuple[int, ...] | None = Field(
        default=None, description="teacher's layer (1..N) for each student layer; default: every N/M-th"
    )
    attention: Literal["scores", "probs"] = Field(default="scores", description="what `mse` compares")
    attention_loss: Literal["mse", "kl"] = "mse"
    shared_projector: bool = Field(default=True, description="one projection for all layers, instead of one a layer")
    temperature: float = Field(default=1.0, gt=0, description="of the soft labels")


class Projectors(nn.Module):
    """H -> H W from the student's width to the teacher's, without bias, for hidden states j = 0..M.

    W starts orthogonal, and as the identity between equal widths, so that a copy of the teacher starts with no loss.
    """

    def __init__(self, student: int, teacher: int, count: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(student, teacher, bias=False) for _ in range(count))
        for layer in self.layers:
            (nn.init.eye_ if student == teacher else nn.init.orthogonal_)(layer.weight)  # type: ignore[arg-type]

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """M + 1 times [rows, length, student] -> [rows, length, teacher]."""
        return [self.layers[min(j, len(self.layers) - 1)](h) for j, h in enumerate(hidden)]


class ErnieTiny(Method):
    """L_lat = L_attn + L_hidn in all stages, + L_soft + L_hard in the last.

    L_attn = 1/M sum_j mean over heads and valid pairs of (A^S_j - A^T_g(j))^2            term `attention`
    L_hidn = 1/(M+1) sum_{j=0..M} mean over valid tokens, features of (H^S_j W - H^T_g(j))^2   term `hidden`
    L_soft = T^2 KL(softmax(z^T/T) || softmax(z^S/T)), over rows                           term `soft`
    L_hard = cross entropy over rows that have a label                                     term `hard`

    with g(j) = j N / M for M student and N teacher layers. Means are over the whole optimiser step.
    """

    name = "ernie_tiny"
    kind = "language"
    paper = Paper(
        "ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression", "arXiv:2106.02241"
    )
    proven = "reconstruction"
    Config = ErnieTinyConfig
    student: Handle
    projectors: Handle
    head: Handle
    layer_map: tuple[int, ...]

    def roles(self) -> tuple[Role, ...]:
        """Two frozen teachers, the student, its projections (dropped at export), and its classifier."""
        trained: dict[str, Any] = {"tune": "full", "defaults": {"optimizer": OPTIMIZER}}
        return (
            Role("pretrained"),
            Role("finetuned"),
            Role("student", train_mode=True, **trained),
            Role("projectors", build=self._projectors, **trained),
            Role("head", build=_head, **trained),
        )

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
        """As in `Method`; UserError when teachers, student and data do not fit each other."""
        super().bind(handles, sources, stores)
        teachers = [handles[name] for name in ("pretrained", "finetuned") if name in handles]
        check_text(sources, self.student, *teachers)
        check_same_size(teachers)
        self.layer_map = layer_map(self.config.layer_map, depth(self.student.module), depth(teachers[0].module))
        if "head" in handles:
            check_classes(sources, handles["head"].module.out_features, "finetune the teacher on these labels")  # type: ignore[arg-type]
        if heads(self.student.module) != heads(teachers[0].module):
            warnings.warn("student and teacher differ in attention heads: their averages are compared", stacklevel=2)

    def stages(self) -> Sequence[Stage]:
        """gd, ged, tad, tsd: each a run of `distil`. A recipe skips one with `stages: {gd: {skip: true}}`."""
        return tuple(
            Stage(
                name,
                partial(self.distil, plan),
                data=plan.data,
                trains=plan.trains,
                uses=(plan.teacher, *plan.trains),
                batch=plan.batch,
                lr=plan.lr,
            )
            for name, plan in PLANS.items()
        )

    def distil(self, plan: Plan, batch: Batch, draw: Draw) -> Generator[Update | Total, Mapping[str, Tensor], None]:
        """One step of a stage: teacher and student read the same text."""
        tokens, mask = batch.tokens, batch.mask
        lengths = mask.sum(1).float()
        n = yield Total(tokens=lengths.sum(), pairs=lengths.square().sum(), labels=labelled(batch.labels))
        teacher = getattr(self, plan.teacher)
        with torch.no_grad():
            theirs = read(teacher, tokens, mask, self.layer_map)
        ours = read(self.student, tokens, mask, range(1, len(self.layer_map) + 1))
        losses = self.latent(ours, theirs, mask, n)
        if plan.task:
            with torch.no_grad():
                target = logits(teacher, theirs)
            answer = self.head(ours.pooled)
            losses["soft"] = soft_rows(answer, target, self.config.temperature)
            losses["hard"] = Mean(hard_rows(answer, batch.labels), n["labels"])
        yield Update(plan.trains, losses)

    def latent(self, ours: Reading, theirs: Reading, mask: Tensor, n: Mapping[str, Tensor]) -> dict[str, Tensor | Mean]:
        """L_attn and L_hidn; n: tokens and pairs of tokens in the whole step."""
        kl = self.config.attention_loss == "kl"
        compare = attention_kl if kl else partial(attention_mse, probs=self.config.attention == "probs")
        maps = [compare(ours.scores[j], theirs.scores[g], mask) for j, g in enumerate(self.layer_map, 1)]
        states = zip(self.projectors(ours.hidden), (theirs.hidden[g] for g in (0, *self.layer_map)), strict=True)
        hidden = [hidden_mse(mine, other, mask) for mine, other in states]
        return {
            "attention": Mean(torch.stack(maps).mean(0), n["tokens" if kl else "pairs"]),
            "hidden": Mean(torch.stack(hidden).mean(0), n["tokens"]),
        }

    def validation(self, batch: Batch) -> Mapping[str, Tensor]:
        """`scores` of the classifier; chance before the last stage."""
        if not hasattr(self, "head"):
            return {}
        return scores(self.head(read(self.student, batch.tokens, batch.mask).pooled), batch.labels)

    def exported_module(self) -> nn.Module:
        """The student with its classifier, or the bare student when no stage trains one."""
        student = merged(self.student)
        if not hasattr(self, "head"):
            return with_tokenizer(student, self.sources)
        return with_task(student, merged(self.head), self.sources)

    def _projectors(self, handles: Mapping[str, Handle]) -> nn.Module:
        student, teacher = handles["student"].module, handles.get("finetuned", handles.get("pretrained"))
        count = 1 if self.config.shared_projector else depth(student) + 1
        return Projectors(width(student), width(teacher.module), count)  # type: ignore[union-attr]


def layer_map(said: Sequence[int] | None, student: int, teacher: int) -> tuple[int, ...]:
    """g(1..M) = j N / M for depths M and N, or the recipe's own map. UserError where that is none, or does not fit."""
    if said is None:
        if teacher % student:
            raise UserError(f"{teacher} teacher layers are no multiple of {student}: write config.layer_map")
        return tuple(teacher // student * j for j in range(1, student + 1))
    if len(said) != student or not all(1 <= g <= teacher for g in said):
        raise UserError(f"config.layer_map={list(said)}: write {student} layers of the teacher, each 1..{teacher}")
    return tuple(said)


def check_same_size(teachers: Sequence[Handle]) -> None:
    """UserError when the teachers differ in depth or width: the projections carry over from one to the other."""
    sizes = [(depth(t.module), width(t.module)) for t in teachers]
    if len(set(sizes)) > 1:
        raise UserError(f"pretrained has {sizes[0]} (layers, width) and finetuned {sizes[1]}: finetune that very model")


def attention_mse(ours: Tensor, theirs: Tensor, mask: Tensor, probs: bool) -> Tensor:
    """Sum over valid pairs of the heads' mean (A^S - A^T)^2, [rows], from scores [rows, heads, length, length]."""
    if probs:
        ours, theirs = _log_probs(ours, mask).exp(), _log_probs(theirs, mask).exp()
    if ours.shape[1] != theirs.shape[1]:
        ours, theirs = ours.mean(1, keepdim=True), theirs.mean(1, keepdim=True)
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    return ((ours - theirs) ** 2).masked_fill(~pairs, 0).mean(1).sum((1, 2))


def attention_kl(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """Sum over valid queries of the heads' mean KL(A^T || A^S), [rows], from scores [rows, heads, length, length]."""
    ours, theirs = _log_probs(ours, mask), _log_probs(theirs, mask)
    if ours.shape[1] != theirs.shape[1]:  # the average over heads; its missing factor 1/heads drops out in the softmax
        ours, theirs = ours.logsumexp(1, keepdim=True), theirs.logsumexp(1, keepdim=True)
    return forward_kl(ours, theirs).masked_fill(~mask[:, None], 0).mean(1).sum(1)


def hidden_mse(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """Sum over valid tokens of the features' mean (H^S W - H^T)^2, [rows], from [rows, length, features]."""
    return ((ours.float() - theirs.float()) ** 2).mean(-1).masked_fill(~mask, 0).sum(1)


def soft_rows(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p^T || p^S) of logits [rows, classes], or (z^S - z^T)^2 with one output, [rows]."""
    if ours.shape[-1] == 1:
        return (ours[:, 0].float() - theirs[:, 0].float()) ** 2
    return forward_kl(ours, theirs, temperature)


def _log_probs(scores: Tensor, mask: Tensor) -> Tensor:
    # The lowest finite number: -inf would give NaN in a row that is all padding.
    return F.log_softmax(scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min), dim=-1)


def _head(handles: Mapping[str, Handle]) -> nn.Module:
    return classifier(width(handles["student"].module), classes_of(handles["finetuned"]))
