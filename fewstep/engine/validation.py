"""Scores while training: rows that the method itself reports, and metrics of generated samples by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.encoded import plain
from ..data.source import Source
from ..errors import UserError, nearest
from ..evaluation.registry import METRICS
from ..methods.base import Method
from ..recipe import Recipe, ValidateSpec
from .preview import to_uint8

MOST = 10_000  # real images that samples are compared with
CHAINS, MOST_ALIGNED = (
    "protein",
    20,
)  # the metric of chains, which is all their numbers; an alignment takes milliseconds


@dataclass
class Best:
    """Remembers the step with the best value of one metric; that checkpoint is kept."""

    metric: str | None = None
    smaller: bool = False
    step: int | None = None
    value: float | None = None

    @classmethod
    def of(cls, spec: ValidateSpec | None) -> Best:
        """From `validate.best`: "accuracy", or "-fid" when smaller is better."""
        name = spec.best if spec is not None else None
        return cls(name.lstrip("-") if name else None, bool(name) and str(name).startswith("-"))

    def offer(self, step: int, numbers: Mapping[str, float]) -> None:
        """Takes the step when its value beats the best so far."""
        new = numbers.get(f"validation.{self.metric}")
        if new is None:
            return
        if self.value is None or (new < self.value if self.smaller else new > self.value):
            self.step, self.value = step, new

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step, "value": self.value}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.step, self.value = state["step"], state["value"]


@torch.no_grad()
def validate(
    method: Method, source: Source, spec: ValidateSpec, recipe: Recipe, device: torch.device
) -> dict[str, float]:
    """`validation.<name>` for each metric of the recipe; UserError for one that neither the method nor the registry knows."""
    numbers = _rows(method, source, spec.n, recipe.train.batch, device)
    named = [m for m in spec.metrics if m not in numbers]
    unknown = [m for m in named if m not in METRICS and m != CHAINS]
    if unknown:
        known = [*numbers, *METRICS.names(), CHAINS]
        raise UserError(f"validate.metrics: unknown '{unknown[0]}': {nearest(unknown[0], known)}")
    if named:
        numbers.update(_samples(method, source, named, spec.n, recipe))
    return {f"validation.{name}": value for name, value in numbers.items()}


def _rows(method: Method, source: Source, n: int, batch: int, device: torch.device) -> dict[str, float]:
    if type(method).validation is Method.validation:
        return {}  # no rows are fetched, decoded and encoded for nothing
    sums: dict[str, Tensor] = {}
    total = min(n, len(source))
    with _evaluating(method):
        for start in range(0, total, batch):
            ids = torch.arange(start, min(start + batch, total))
            rows = method.validation(Batch(ids, source.fetch(ids, None)).to(device))
            for name, values in rows.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + values.float().sum()
    return {name: float(value) / total for name, value in sums.items()}


class _evaluating:
    """Holds the method's networks in eval mode for a block, without touching frozen ones that are there already."""

    def __init__(self, method: Method):
        handles = [value for value in vars(method).values() if hasattr(value, "module")]
        self.modules = [h.module for h in handles if isinstance(h.module, torch.nn.Module) and h.module.training]

    def __enter__(self) -> None:
        for module in self.modules:
            module.eval()

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            module.train()


def _samples(method: Method, source: Source, metrics: list[str], n: int, recipe: Recipe) -> dict[str, float]:
    from ..evaluation.evaluate import contents, judge_for, network_for, score

    _check_sort(method, metrics)
    if metrics == [CHAINS]:
        return _of_chains(method, n, recipe.train.seed)
    spec = recipe.evaluation
    network, (judge, _) = network_for(metrics, spec.features), judge_for(metrics, spec.reward)
    samples = method.samples(n, recipe.train.seed)
    if samples is None:
        raise UserError(f"validate.metrics: {', '.join(metrics)} need a method that generates")
    drawn_for = plain(method.sources.get("train", source))  # samples are of the first conditions of `train`
    asked = drawn_for.fetch(torch.arange(n) % len(drawn_for), None)
    labels, prompts = asked["cond"].get("label"), asked.get("prompt")
    return score(to_uint8(samples), labels, lambda: contents(plain(source), MOST)[0], network, metrics, judge, prompts)


def _check_sort(method: Method, metrics: list[str]) -> None:
    """UserError for metrics of images in a method of chains, or the other way round."""
    draws = getattr(method, "draws", None)
    wrong = [name for name in metrics if (name == CHAINS) != (draws == "chains")]
    if wrong:
        mend = f"write {CHAINS}" if draws == "chains" else "leave it out"
        raise UserError(f"validate.metrics: '{wrong[0]}' does not score what {method.name} makes: {mend}")


def _of_chains(method: Any, n: int, seed: int) -> dict[str, float]:
    """`score_chains` of chains of the first lengths in the data."""
    from ..evaluation.protein.preview import unpadded
    from ..evaluation.protein.scores import score_chains

    mask = method.preview_cond(n)["mask"]
    return score_chains(unpadded(method.samples(n, seed), mask), compared=MOST_ALIGNED)
