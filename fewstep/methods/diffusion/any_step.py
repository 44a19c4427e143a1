"""What any-step methods share: a student with two times, and one checkpoint for every number of steps.

The student V(x, t, s) answers the mean velocity from t down to s <= t. Tuned in full it gains an input for s, which adds
nothing at s = t; an adapter reads s from a shifted label. Three ways to sample it:

    any      x <- x - (t - s) V(x, t, s), s the next level
    few      x <- (1 - s) x0 + s n with x0 = x - t V(x, t, 0)
    multi    x <- x - (t - s) V(x, t, t): plain Euler on the instantaneous velocity
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...maths.solvers import Kind, Schedule, Target
from ..base import DiffusionMethod, MethodConfig

if TYPE_CHECKING:
    from ...models.denoiser import Denoiser

OFFERED = (1, 2, 4, 8, 50)
Sampler = Literal["any", "few", "multi"]
SAMPLERS: dict[Sampler, tuple[Kind, Target]] = {
    "any": ("ode", "next"),
    "few": ("renoise", "zero"),
    "multi": ("ode", "same"),
}


class AnyStepConfig(MethodConfig):
    """Knobs that all any-step methods have."""

    sampler: Sampler = Field(default="any", description="of the exported model: any, few or multi")
    steps: int = Field(default=4, gt=0, description="of a sample, unless another number is asked for")


class AnyStepMethod(DiffusionMethod):
    """Base of methods whose student is sampled in any number of steps."""

    Config = AnyStepConfig
    student: Denoiser

    def schedule(self) -> Schedule:
        """Evenly spaced levels on the student's clock."""
        kind, target = SAMPLERS[self.config.sampler]
        return Schedule(kind, self.student.path.grid(self.config.steps), target=target, **self.sampling())

    def sampling(self) -> dict[str, Any]:
        """What else the schedule says: guidance, rescale, last."""
        return {}

    def steps_offered(self) -> tuple[int, ...]:
        """Every number works; these are worth a line in a table."""
        return tuple(sorted({*OFFERED, self.config.steps}))
