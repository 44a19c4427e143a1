"""Weights from elsewhere as a model folder that says how it must be sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..maths.log_path import ALONE, FIRST, PER_DECADE, LogFlowPath, few_step_schedule, teacher_schedule
from ..maths.solvers import Schedule
from ..models.proteina import PROTEINA, load_proteina
from .folder import export

TEACHER_STEPS = 400


def convert_proteina(
    file: Path,
    to: Path,
    steps: int | None = None,
    noise_scale: float = 0.45,
    prefix: str | None = None,
    order: Sequence[str] | None = None,
) -> Path:
    """Writes the pipeline folder `to` of Proteina's weights in the safetensors `file`, and returns it.

    steps: of a distilled network, which is sampled on its own grid; None: a teacher, with its stochastic sampler in 400.
    noise_scale: factor of the noise; of its standard deviation for a distilled network, of its variance for a teacher.
    Other words and errors are those of `load_proteina`.
    """
    loaded = load_proteina(file, prefix, order)
    path, schedule = sampled(steps, noise_scale)
    card = {"base": file.name}
    return export(loaded.module, PROTEINA, path, schedule, to, steps_offered=[schedule.steps], card=card)


def sampled(steps: int | None, noise_scale: float) -> tuple[LogFlowPath, Schedule]:
    """Path and schedule of a network distilled for `steps`, or of a teacher."""
    if steps is None:
        path = LogFlowPath()
        return path, teacher_schedule(path, TEACHER_STEPS, noise_scale)
    first = ALONE if steps == 1 else FIRST
    path = LogFlowPath(t_max=10 ** (-first / PER_DECADE), zero_signal=True)
    return path, few_step_schedule(path, steps, noise_scale)
