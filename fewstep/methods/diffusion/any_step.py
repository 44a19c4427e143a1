"""What any-step methods share: a student with two times, and one checkpoint for every number of steps.

The student V(x, t, s) answers the mean velocity from t down to s <= t. Tuned in full it gains an input for s, which adds
nothing at s = t; an adapter reads s from a shifted label. Three ways to sample it:

    any      x <- x - (t - s) V(x, t, s), s the next level
    few      x <- (1 - s) x0 + s n with x0 = x - t V(x, t, 0)
    multi    x <- x - (t - s) V(x, t, t): plain Euler on the instantaneous velocity
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...maths.solvers import Kind, Schedule, Target
from ..base import DiffusionMethod, MethodConfig

if TYPE_CHECKING:
    from ...models.denoiser import Denoiser

OFFERED = (1, 2, 4, 8, 50)
Quarters = Annotated[float, Field(ge=0, le=1, multiple_of=0.25)]  # a share of the rows that `split_rows` can keep
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

    Config: ClassVar[type[AnyStepConfig]] = AnyStepConfig
    student: Denoiser

    def schedule(self) -> Schedule:
        """Evenly spaced levels on the student's clock."""
        kind, target = SAMPLERS[self.config.sampler]
        return Schedule(kind, self.student.path.grid(self.config.steps), target=target, **self.sampling())

    def sampling(self) -> dict[str, Any]:
        """What else the schedule says: guidance, rescale, last."""
        return {}

    def steps_offered(self) -> tuple[int, ...]:
        """Every number works; these are worth a line in a table.

        An adapter is exported for stock pipelines, some of which make the levels of one number alone.
        """
        if self.student.handle.shifted and self.student.around is not None:
            return (self.config.steps,)
        return tuple(sorted({*OFFERED, self.config.steps}))


def split_rows(rows: int, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers outside and inside of a part: the last `share` of each four rows (0, .25, .5, .75 or 1).

    They do not depend on how a batch is cut, as long as it is cut in fours.
    """
    first = 4 - round(4 * share)
    inside = [i for i in range(rows) if i % 4 >= first]
    outside = [i for i in range(rows) if i % 4 < first]
    return torch.tensor(outside, device=device, dtype=torch.long), torch.tensor(inside, device=device, dtype=torch.long)
