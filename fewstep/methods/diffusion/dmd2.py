"""DMD2 (Yin et al., arXiv 2405.14867): distribution matching alone, then with a discriminator on real samples.

    stage "data_free"   L_G = 0.5 |x^ - sg[x^ + (x0_teacher,guided - x0_fake) / m]|^2, conditions only
    stage "real"        the same + w softplus(-D(x^_tau)), D on features of the fake model, against real samples

It is `decoupled_dmd` with one noise level for both directions (`coupled`), one normaliser, and this order of stages: the
discriminator is only asked once the student makes images that a real one can be told from. With `regulariser: gan`,
`guidance_scale: 1` and `gan_features: teacher` the second stage alone is LADD's loss (arXiv 2403.12015).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ..base import Event, Paper, Stage
from .decoupled_dmd import DecoupledDMD, DecoupledDMDConfig

DATA_FREE, REAL = "data_free", "real"


class DMD2Config(DecoupledDMDConfig):
    """Knobs of `DMD2`: those of `DecoupledDMD` with the paper's choices, and the length of the first stage."""

    schedule: Literal["coupled", "full", "constrained", "hybrid"] = "coupled"
    normaliser: Literal["none", "dmd2", "per_branch"] = "dmd2"
    regulariser: Literal["dm", "none", "meanvar", "gan", "dm+gan"] = "dm+gan"
    sampler: Literal["ode", "renoise"] = "renoise"
    data_free_steps: int | None = Field(
        default=None, gt=0, description="of the first stage, which needs no samples; null: only the second one"
    )


class DMD2(DecoupledDMD):
    """Needs conditions in the first stage (`data.prompts`), samples with conditions in the second (`data.train`)."""

    name = "dmd2"
    paper = Paper("Improved Distribution Matching Distillation for Fast Image Synthesis", "arXiv:2405.14867")
    Config = DMD2Config
    stage = REAL

    def stages(self) -> Sequence[Stage]:
        """The data-free stage when it has steps; then the one with the discriminator, at a twentieth of the rates."""
        players = ("student", *self.critics)
        if self.config.data_free_steps is None:
            return (Stage(REAL, self.train_step, trains=players),)
        alone = tuple(name for name in players if name != "discriminator")
        first = Stage(DATA_FREE, self.train_step, "prompts", trains=alone, steps=self.config.data_free_steps)
        return (first, Stage(REAL, self.train_step, trains=players, lr=0.05))

    @property
    def judged(self) -> bool:
        """The discriminator waits for the second stage."""
        return super().judged and self.stage == REAL

    def on(self, event: Event) -> None:
        """Remembers the stage."""
        super().on(event)
        if event.kind == "stage_start":
            self.stage = event.stage
