"""Which pipeline and scheduler make a student's samples: a table, and the search in it.

A student must be trained on the pairs (label the network is fed, noise level the step uses) of the scheduler it is
exported with; some schedulers feed an integer label while they step with a nearby level. So rows are chosen by what
their scheduler object says after `set_timesteps`, called as the pipeline calls it:

    def schedule(path): return Schedule("ode", path.grid(4))       # the method's own, on any path

    path = training_path(family, path, schedule)                   # before training
    target = target_for(family, path, schedule(path))              # at export: the first row with exactly these pairs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from ..maths.clocks import shift
from ..maths.paths import FlowPath, Path
from ..maths.solvers import Kind, Schedule
from .grids import OWN, grid, same_pairs, start_of, trained_pairs
from .path_config import kind_of, vp_config

if TYPE_CHECKING:
    from ..models.family import DiffusionFamily

Guidance = Literal["embedded", "baked", "cfg", "none"]


def _same(path: Path) -> Path:
    return path


@dataclass(frozen=True)
class Target:
    """A row. It serves families whose stock pipeline is `serves` (or, "*", all without text) on `path`, sampled by `kind`.

    labels: True for class-conditional networks only, False for unconditional ones only, None for both.
    pipeline: "module:Class". scheduler: class in diffusers. config(path, schedule): what the scheduler is made with.
    trained(path): the path to train on so that this scheduler's pairs are met.
    guides: the pipeline does classifier-free guidance. decodes: it turns latents into images.
    embeds: it feeds its guidance_scale to a network that has that input, and does not guide such a network.
    """

    serves: str
    path: Literal["flow", "vp"]
    kind: Kind
    pipeline: str
    scheduler: str
    config: Callable[[Any, Schedule], dict[str, Any]]
    labels: bool | None = None
    trained: Callable[[Any], Path] = _same
    guides: bool = False
    decodes: bool = False
    embeds: bool = False

    @property
    def pipeline_name(self) -> str:
        """The pipeline's class name."""
        return self.pipeline.split(":")[1]

    def scheduler_for(self, path: Path, schedule: Schedule) -> Any:
        """The scheduler object, in whose steps `schedule` was trained."""
        return scheduler_class(self.scheduler)(**self.config(path, schedule))

    def pipeline_class(self) -> Any:
        """The pipeline's class."""
        module, name = self.pipeline.split(":")
        return getattr(import_module(module), name)

    def guidance(self, schedule: Schedule) -> Guidance:
        """What the pipeline's guidance_scale does to a student of `schedule`.

        "embedded": it is an input of the network. "baked": nothing, since the network is saved with an input that is not
        looked at, so that the pipeline does not guide it. "cfg": classifier-free guidance. "none": there is no such word.
        """
        if schedule.embedded:
            return "embedded"
        if self.embeds and schedule.guidance == 1:
            return "baked"
        return "cfg" if self.guides else "none"


def _dpm(path: FlowPath, _schedule: Schedule) -> dict[str, Any]:
    return {
        "num_train_timesteps": path.num_train_timesteps,
        "solver_order": 1,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": path.shift,
        "final_sigmas_type": "zero",
    }


def _flow(path: FlowPath, _schedule: Schedule) -> dict[str, Any]:
    return {"num_train_timesteps": path.num_train_timesteps, "shift": path.shift}


def _ddim(path: Any, _schedule: Schedule) -> dict[str, Any]:
    return {**vp_config(path), "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}


def _lcm(path: Any, schedule: Schedule) -> dict[str, Any]:
    # timestep_scaling takes the boundary condition's c_skip from 2e-7 to 0, which makes the step exact.
    levels = schedule.origin or schedule.steps
    return {**vp_config(path), "original_inference_steps": levels, "clip_sample": False, "timestep_scaling": 1e4}


def _integer(path: FlowPath) -> FlowPath:
    """DPMSolverMultistepScheduler starts at clock 1 - 1/K and feeds whole labels."""
    count = path.num_train_timesteps
    if count == 1:
        return path  # fed t itself: this scheduler cannot, and its grid will not match
    return FlowPath(path.shift, count, integer_timesteps=True, t_max=shift(1 - 1 / count, path.shift))


def _plain(path: FlowPath) -> FlowPath:
    if path.zero_signal:
        return replace(path, integer_timesteps=False)
    return FlowPath(path.shift, path.num_train_timesteps)


def _text(pipeline: str) -> tuple[Target, ...]:
    """Rows of a stock text-to-image pipeline on DDPM tables."""

    def row(kind: Kind, scheduler: str, config: Callable[[Any, Schedule], dict[str, Any]]) -> Target:
        def offset(path: Any, schedule: Schedule) -> dict[str, Any]:
            return {**config(path, schedule), "steps_offset": 1}  # unused here, but the pipeline insists on it

        place = f"diffusers:{pipeline}"
        return Target(pipeline, "vp", kind, place, scheduler, offset, guides=True, decodes=True, embeds=True)

    return row("renoise", "LCMScheduler", _lcm), row("ode", "DDIMScheduler", _ddim)


def _own(
    path: Literal["flow", "vp"], kind: Kind, scheduler: str, config: Callable, trained: Callable = _same
) -> Target:
    """A row of the pipeline that folders carry."""
    return Target("*", path, kind, OWN, scheduler, config, trained=trained, guides=True, decodes=True)


_PIXELS, _CONSISTENCY = "ConsistencyModelPipeline", "diffusers:ConsistencyModelPipeline"
TARGETS: tuple[Target, ...] = (
    Target(_PIXELS, "flow", "ode", _CONSISTENCY, "DPMSolverMultistepScheduler", _dpm, trained=_integer),
    Target(_PIXELS, "vp", "ode", "diffusers:DDIMPipeline", "DDIMScheduler", _ddim, labels=False),
    Target(_PIXELS, "vp", "ode", _CONSISTENCY, "DDIMScheduler", _ddim, labels=True),
    Target(_PIXELS, "vp", "renoise", _CONSISTENCY, "LCMScheduler", _lcm),
    *_text("StableDiffusionPipeline"),
    *_text("StableDiffusionXLPipeline"),
    _own("flow", "ode", "FlowMatchEulerDiscreteScheduler", _flow, _plain),
    # FlowMatchEuler's own stochastic sampling ignores the generator in diffusers 0.36 and 0.38; this class does not.
    _own("flow", "renoise", "FlowMatchLCMScheduler", _flow, _plain),
    _own("vp", "ode", "DDIMScheduler", _ddim),
    _own("vp", "renoise", "LCMScheduler", _lcm),
)


def row_of(pipeline: str, scheduler: str) -> Target:
    """The first row of a pipeline and scheduler, by their class names. UserError when a folder names others."""
    for row in TARGETS:
        if (row.pipeline_name, row.scheduler) == (pipeline, scheduler):
            return row
    raise UserError(f"fewstep exports no {pipeline} with a {scheduler}")


def scheduler_class(name: str) -> Any:
    """The diffusers scheduler called `name`; UserError when the installed version has none."""
    found = getattr(import_module("diffusers"), name, None)
    if found is None:
        raise UserError(f"this version of diffusers has no {name}: install diffusers >= 0.36")
    return found


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
) -> Path:
    """The path to train a student on, so that a scheduler exists which feeds it what it was trained on.

    schedule(path): the student's schedule on a path. It is the teacher's own path, except that stock flow schedulers
    with whole labels start a little below noise. Raises UserError when no scheduler steps on the schedule's levels.
    """
    for row in _rows(family, path, labels, latent):
        trained = row.trained(path)
        if _fits(row, trained, schedule(trained)):
            return trained
    raise _no_target(path, schedule(path))


def training_start(family: DiffusionFamily, path: Path, schedule: Callable[[Path], Schedule], **asked: bool) -> float:
    """Clock value of the first level on `training_path`: 1, or .999 for whole labels and for tables of 1000."""
    return schedule(training_path(family, path, schedule, **asked)).u[0]


def target_for(
    family: DiffusionFamily, path: Path, schedule: Schedule, labels: bool = True, latent: bool = False
) -> Target:
    """The first row whose scheduler, made from config alone, feeds exactly the pairs of `schedule` on `path`.

    labels: whether the network is class-conditional. latent: whether a VAE decodes. UserError when there is no row.
    """
    for row in _rows(family, path, labels, latent):
        if _fits(row, path, schedule):
            return row
    raise _no_target(path, schedule)


def trained_levels(path: Path, schedule: Schedule) -> tuple[float, ...]:
    """Clock values that the student was trained at: the whole grid from which `schedule` was picked."""
    return path.grid(schedule.origin) if schedule.origin else schedule.u


def offered_steps(target: Target, path: Path, schedule: Schedule) -> list[int]:
    """Numbers of steps, up to the schedule's, at which the exported folder calls the network at trained levels only."""
    scheduler = target.scheduler_for(path, schedule)
    counts = range(1, schedule.steps + 1)
    return [n for n in counts if trained_at(scheduler, target.pipeline_name, path, schedule, n)]


def trained_at(scheduler: Any, pipeline: str, path: Path, schedule: Schedule, steps: int) -> bool:
    """Whether a `steps`-step run calls the network at trained levels only; no, where the scheduler refuses so many."""
    levels = trained_pairs(path, trained_levels(path, schedule))
    try:
        visited = grid(scheduler, pipeline, steps, start_of(path))
    except ValueError:
        return False
    return all(any(same_pairs([pair], [level]) for level in levels) for pair in visited)


def _rows(family: DiffusionFamily, path: Path, labels: bool, latent: bool) -> Iterator[Target]:
    """Rows whose pipeline runs networks of this family and sort."""
    textless = family.facts.null in ("class", "none")
    for row in TARGETS:
        serves = row.serves == family.facts.pipeline or (row.serves == "*" and textless)
        if start_of(path) != 1 and row.pipeline != OWN:
            continue  # stock pipelines start from pure noise
        if serves and row.path == kind_of(path) and row.labels in (None, labels) and row.decodes >= latent:
            yield row


def _fits(row: Target, path: Path, schedule: Schedule) -> bool:
    guided = schedule.guidance != 1 and not schedule.embedded
    if (row.kind, "fresh") != (schedule.kind, schedule.noise) or row.guides < guided or row.embeds < schedule.embedded:
        return False
    try:
        theirs = grid(row.scheduler_for(path, schedule), row.pipeline_name, schedule.steps, start_of(path))
    except ValueError:  # a scheduler that refuses so many levels
        return False
    return same_pairs(trained_pairs(path, schedule.u), theirs)


def _no_target(path: Path, schedule: Schedule) -> UserError:
    return UserError(
        f"no diffusers scheduler makes these {schedule.steps} levels of a {kind_of(path)} path with '{schedule.kind}' "
        "from its config: train on the levels that exporting.targets.training_path gives, e.g. 1, 2, 4 or 8 evenly "
        "spaced ones, or ones picked from 50 on a table of 1000"
    )
