"""Which pipeline and scheduler make a student's samples: a table, and the search in it.

A student must be trained on the pairs (label the network is fed, noise level the step uses) of the scheduler it is
exported with; some schedulers feed an integer label while they step with a nearby level. So rows are chosen by what
their scheduler object says after `set_timesteps`, called as the pipeline calls it:

    def schedule(path): return Schedule("ode", path.grid(4))       # the method's own, on any path

    path = training_path(family, path, schedule)                   # before training
    target = target_for(family, path, schedule(path))              # at export: the first row with exactly these pairs

A two-time student is told its second time by the pipelines that folders carry, which have the component `times`. Told
s = t it is an ordinary network, and so is an adapter told s = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..maths.paths import Path
from ..maths.solvers import Schedule
from .grids import grid, same_pairs, start_of, trained_pairs
from .path_config import kind_of
from .rows import TARGETS, Target

if TYPE_CHECKING:
    from ..models.family import DiffusionFamily


def row_of(pipeline: str, scheduler: str) -> Target:
    """The first row of a pipeline and scheduler, by their class names. UserError when a folder names others."""
    for row in TARGETS:
        if (row.pipeline_name, row.scheduler) == (pipeline, scheduler):
            return row
    raise UserError(f"fewstep exports no {pipeline} with a {scheduler}")


def exported(family: DiffusionFamily, schedule: Schedule) -> Schedule:
    """How a folder is sampled. Where no pipeline of the family feeds a guidance, the student's is in its weights for good."""
    feeds = any(row.embeds for row in TARGETS if row.serves == family.facts.pipeline)
    return replace(schedule, guidance=1.0, embedded=False) if schedule.embedded and not feeds else schedule


def training_path(
    family: DiffusionFamily,
    path: Path,
    schedule: Callable[[Path], Schedule],
    labels: bool = True,
    latent: bool = False,
    reads: Sequence[str] = (),
    steps: Sequence[int] = (),
) -> Path:
    """The path to train a student on, so that a scheduler exists which feeds it what it was trained on.

    schedule(path): the student's schedule on a path. It is the teacher's own path, except that stock flow schedulers
    with whole labels start a little below noise. Raises UserError when no scheduler steps on the schedule's levels.
    The other words are those of `target_for`.
    """
    for row in _rows(family, path, labels, latent):
        trained = row.trained(path)
        if _fits(row, trained, schedule(trained), reads, steps):
            return trained
    raise _no_target(family, path, schedule(path), reads)


def training_start(family: DiffusionFamily, path: Path, schedule: Callable[[Path], Schedule], **asked: Any) -> float:
    """Clock value of the first level on `training_path`: 1, or .999 for whole labels and for tables of 1000."""
    return schedule(training_path(family, path, schedule, **asked)).u[0]


def target_for(
    family: DiffusionFamily,
    path: Path,
    schedule: Schedule,
    labels: bool = True,
    latent: bool = False,
    reads: Sequence[str] = (),
    steps: Sequence[int] = (),
) -> Target:
    """The first row whose scheduler, made from config alone, feeds exactly the pairs of `schedule` on `path`.

    labels: whether the network is class-conditional. latent: whether a VAE decodes. reads: its extra inputs. steps: what
    a student with two times is offered for, all of which the scheduler has to make. UserError when there is no row.
    """
    for row in _rows(family, path, labels, latent):
        if _fits(row, path, schedule, reads, steps):
            return row
    raise _no_target(family, path, schedule, reads)


def trained_levels(path: Path, schedule: Schedule) -> tuple[float, ...]:
    """Clock values that the student was trained at: the whole grid from which `schedule` was picked."""
    return path.grid(schedule.origin) if schedule.origin else schedule.u


def offered_steps(target: Target, path: Path, schedule: Schedule) -> list[int]:
    """Numbers of steps, up to the schedule's, at which the exported folder calls the network at trained levels only."""
    scheduler = target.scheduler_for(path, schedule)
    counts = range(1, schedule.steps + 1)
    return [n for n in counts if trained_at(scheduler, target.pipeline_name, path, schedule, n)]


def trained_at(scheduler: Any, pipeline: str, path: Path, schedule: Schedule, steps: int) -> bool:
    """Whether a `steps`-step run calls the network at trained levels only; no, where the scheduler refuses so many.

    A student told a second time was trained at all levels: those visited must be the path's own `steps`.
    """
    try:
        visited = grid(scheduler, pipeline, steps, start_of(path))
    except ValueError:
        return False
    if schedule.target:
        return same_pairs(trained_pairs(path, path.grid(steps)), visited)
    levels = trained_pairs(path, trained_levels(path, schedule))
    return all(any(same_pairs([pair], [level]) for level in levels) for pair in visited)


def _rows(family: DiffusionFamily, path: Path, labels: bool, latent: bool) -> Iterator[Target]:
    """Rows whose pipeline runs networks of this family and sort."""
    textless = _textless(family)
    for row in TARGETS:
        serves = row.serves == family.facts.pipeline or (row.serves == "*" and textless)
        if start_of(path) != 1 and not row.carried:
            continue  # stock pipelines start from pure noise
        if serves and row.path == kind_of(path) and row.labels in (None, labels) and row.decodes >= latent:
            yield row


def _textless(family: DiffusionFamily) -> bool:
    return family.facts.null in ("class", "none")


def _fits(row: Target, path: Path, schedule: Schedule, reads: Sequence[str], steps: Sequence[int]) -> bool:
    if (row.kind, "fresh") != (schedule.kind, schedule.noise) or not _means(row, schedule, reads):
        return False
    if schedule.target and getattr(path, "integer_timesteps", False):
        return False  # trained on any label
    try:
        scheduler = row.scheduler_for(path, schedule)
        theirs = grid(scheduler, row.pipeline_name, schedule.steps, start_of(path))
    except ValueError:  # a scheduler that refuses so many levels
        return False
    offered = steps if schedule.target else ()
    return same_pairs(trained_pairs(path, schedule.u), theirs) and all(
        trained_at(scheduler, row.pipeline_name, path, schedule, n) for n in offered
    )


def _means(row: Target, schedule: Schedule, reads: Sequence[str]) -> bool:
    """Whether the row's pipeline calls the network as the schedule says: its guidance and its second time."""
    guided = schedule.guidance != 1 and not schedule.embedded
    rescaled = guided and schedule.rescale is not None
    fed = row.guides >= guided and row.embeds >= schedule.embedded and row.rescales >= rescaled
    return fed and row.times >= _is_told(schedule, reads)


def _is_told(schedule: Schedule, reads: Sequence[str]) -> bool:
    """Whether the network is told a second time that changes its answer: at s = t nothing is added."""
    return "s" in reads and schedule.target in ("next", "zero")


def _no_target(family: DiffusionFamily, path: Path, schedule: Schedule, reads: Sequence[str]) -> UserError:
    serving = [row for row in TARGETS if row.serves in (family.facts.pipeline, "*" if _textless(family) else None)]
    if _is_told(schedule, reads) and not any(row.times for row in serving):
        return UserError(
            f"no pipeline tells a {family.name} student its second time: write `student: {{tune: lora}}` with "
            "config.sampler: few, or sampler: multi"
        )
    guided = schedule.guidance != 1 and not schedule.embedded
    if guided and schedule.rescale and serving and not any(row.rescales for row in serving):
        return UserError(
            f"{family.facts.pipeline} does not keep the norm of what it guides (rescale: energy): sample the student "
            "without, config.guidance_scale: 1"
        )
    if guided and serving and not any(row.guides for row in serving):
        return UserError(
            f"{family.facts.pipeline} rescales what it guides or guides not at all, which no schedule means: train the "
            "student with the teacher's guidance_scale inside, so that it is sampled without"
        )
    return UserError(
        f"no diffusers scheduler makes these {schedule.steps} levels of a {kind_of(path)} path with '{schedule.kind}' "
        "from its config: train on the levels that exporting.targets.training_path gives, e.g. 1, 2, 4 or 8 evenly "
        "spaced ones, or ones picked from 50 on a table of 1000"
    )
