"""Numbers that may change over training: a constant, or `{linear: [0, 1], over: 1000}` in a recipe."""

from __future__ import annotations

import math
from typing import Union

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Ramp(BaseModel):
    """From `a` to `b` over the first `over` steps, then `b`. Exactly one of the three shapes is given:

    linear: a + (b - a) r; cosine: b + (a - b) (1 + cos(pi r)) / 2; exponential: a (b / a)^r; r = min(step / over, 1).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    linear: tuple[float, float] | None = None
    cosine: tuple[float, float] | None = None
    exponential: tuple[float, float] | None = None
    over: int = Field(gt=0)

    @model_validator(mode="after")
    def _one_shape(self) -> Ramp:
        if sum(shape is not None for shape in (self.linear, self.cosine, self.exponential)) != 1:
            raise ValueError("give exactly one of linear, cosine, exponential")
        if self.exponential is not None and min(self.exponential) <= 0:
            raise ValueError("exponential needs positive ends")
        return self

    def at(self, step: int) -> float:
        """Value after `step` steps."""
        r = min(step / self.over, 1.0)
        if self.linear is not None:
            a, b = self.linear
            return a + (b - a) * r
        if self.cosine is not None:
            a, b = self.cosine
            return b + (a - b) * (1 + math.cos(math.pi * r)) / 2
        assert self.exponential is not None
        a, b = self.exponential
        return a * (b / a) ** r


Scalar = Union[float, Ramp]  # noqa: UP007  (pydantic reads it at run time on 3.10 as well)


def value(scalar: Scalar, step: int) -> float:
    """`scalar` after `step` steps; a plain number is constant."""
    return scalar.at(step) if isinstance(scalar, Ramp) else float(scalar)
