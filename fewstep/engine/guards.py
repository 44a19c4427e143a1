"""Guards watch what losses cannot say: they warn, then stop the run and name the last good checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..recipe import GuardSpec


@dataclass
class Guards:
    """Compares each look with the first one and with the recipe's limits. `warnings` collects what was said."""

    spec: GuardSpec
    first: dict[str, float] = field(default_factory=dict)
    breaches: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def take(self) -> list[str]:
        """Warnings since the last call."""
        said, self.warnings = self.warnings, []
        return said

    def check(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """Looks at logged numbers; returns the reason to stop, or None."""
        for name, value in numbers.items():
            if not math.isfinite(value) and self.spec.nan == "stop":
                return f"{name} is {value} at step {step}"
            reason = self._judge(f"finite {name}", not math.isfinite(value), f"{name} is {value} at step {step}")
            if reason:
                return reason
            if name.startswith("grad_norm.") and self.spec.grad_norm is not None:
                reason = self._judge(
                    name,
                    value > self.spec.grad_norm,
                    f"{name} is {value:.3g} at step {step} (limit {self.spec.grad_norm:g})",
                )
                if reason:
                    return reason
        return None

    def look(self, step: int, samples: Tensor) -> str | None:
        """Looks at generated samples [rows, ...]; returns the reason to stop, or None."""
        for name, value in sample_statistics(samples).items():
            if not math.isfinite(value):
                return f"the {name} of generated samples is {value} at step {step}"
            first = self.first.setdefault(name, value)
            reason = self._judge(
                name,
                self._breaks(name, value, first),
                f"the {name} of generated samples went from {first:.3g} to {value:.3g} at step {step}",
            )
            if reason:
                return reason
        return None

    def _breaks(self, name: str, value: float, first: float) -> bool:
        if name == "std" and self.spec.std_drift is not None:
            return abs(math.log(max(value, 1e-12) / max(first, 1e-12))) > self.spec.std_drift
        if name == "diversity" and self.spec.diversity is not None:
            return value < self.spec.diversity * first
        return name == "saturated" and self.spec.saturated is not None and value > self.spec.saturated

    def _judge(self, name: str, broken: bool, what: str) -> str | None:
        self.breaches[name] = self.breaches.get(name, 0) + 1 if broken else 0
        if not broken:
            return None
        self.warnings.append(what)
        return what if self.breaches[name] >= self.spec.patience else None


def sample_statistics(samples: Tensor) -> dict[str, float]:
    """std over all elements, diversity = mean distance between neighbours in the batch / sqrt(size), share of |x| > 1."""
    flat = samples.detach().float().flatten(1)
    distance = (flat - flat.roll(1, 0)).pow(2).mean(1).sqrt().mean()
    numbers = torch.stack([flat.std(), distance, (flat.abs() > 1).float().mean()])
    std, diversity, saturated = numbers.tolist()
    return {"std": std, "diversity": diversity, "saturated": saturated}
