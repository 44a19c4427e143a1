"""Which pipeline and scheduler make a student's samples: a table, and the grid that each row really steps on.

A student must be trained on the pairs (label the network is fed, noise level the step uses) of the scheduler it is
exported with; some schedulers feed an integer label while they step with a nearby level. So rows are chosen by what
their scheduler object says after `set_timesteps`, called as the pipeline calls it:

    path = training_path(family, path, "ode", steps=4)        # before training
    schedule = Schedule("ode", path.grid(4))
    target = target_for(family, path, schedule)               # at export: the first row with exactly these pairs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import UserError
from ..maths.clocks import shift
from ..maths.paths import FlowPath, Path
from ..maths.solvers import Kind, Schedule
from .path_config import kind_of, vp_config

if TYPE_CHECKING:
    from ..models.family import DiffusionFamily

OWN = "fewstep_pipelines:FewStepClassPipeline"
Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Target:
    """A row. It serves families whose stock pipeline is `serves` (or "*") on `path`, sampled by `kind`.

    labels: True for class-conditional networks only, False for unconditional ones only, None for both.
    pipeline: "module:Class". scheduler: class in diffusers. config(path, steps): what the scheduler is made with.
    trained(path): the path to train on so that this scheduler's pairs are met.
    """

    serves: str
    path: Literal["flow", "vp"]
    kind: Kind
    pipeline: str
    scheduler: str
    config: Callable[[Any, int], dict[str, Any]]
    labels: bool | None = None
    trained: Callable[[Any], Path] = lambda path: path

    @property
    def own(self) -> bool:
        """Whether it is the pipeline that folders carry, which alone here guides and decodes latents."""
        return self.pipeline == OWN

    def scheduler_for(self, path: Path, steps: int) -> Any:
        """The scheduler object, in steps that `steps` levels were trained for."""
        return scheduler_class(self.scheduler)(**self.config(path, steps))

    def pipeline_class(self) -> Any:
        """The pipeline's class."""
        module, name = self.pipeline.split(":")
        return getattr(import_module(module), name)


def _dpm(path: FlowPath, _steps: int) -> dict[str, Any]:
    return {
        "num_train_timesteps": path.num_train_timesteps,
        "solver_order": 1,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": path.shift,
        "final_sigmas_type": "zero",
    }


def _flow(path: FlowPath, _steps: int) -> dict[str, Any]:
    return {"num_train_timesteps": path.num_train_timesteps, "shift": path.shift}


def _ddim(path: Any, _steps: int) -> dict[str, Any]:
    return {**vp_config(path), "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}


def _lcm(path: Any, steps: int) -> dict[str, Any]:
    # timestep_scaling takes the boundary condition's c_skip from 2e-7 to 0, which makes the step exact.
    return {**vp_config(path), "original_inference_steps": steps, "clip_sample": False, "timestep_scaling": 1e4}


def _integer(path: FlowPath) -> FlowPath:
    """DPMSolverMultistepScheduler starts at clock 1 - 1/K and feeds whole labels."""
    count = path.num_train_timesteps
    if count == 1:
        return path  # fed t itself: this scheduler cannot, and its grid will not match
    return FlowPath(path.shift, count, integer_timesteps=True, t_max=shift(1 - 1 / count, path.shift))


def _plain(path: FlowPath) -> FlowPath:
    return FlowPath(path.shift, path.num_train_timesteps)


_CONSISTENCY = "diffusers:ConsistencyModelPipeline"
_DPM, _EULER, _RENOISE = "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"
TARGETS: tuple[Target, ...] = (
    Target("ConsistencyModelPipeline", "flow", "ode", _CONSISTENCY, _DPM, _dpm, trained=_integer),
    Target("ConsistencyModelPipeline", "vp", "ode", "diffusers:DDIMPipeline", "DDIMScheduler", _ddim, labels=False),
    Target("ConsistencyModelPipeline", "vp", "ode", _CONSISTENCY, "DDIMScheduler", _ddim, labels=True),
    Target("ConsistencyModelPipeline", "vp", "renoise", _CONSISTENCY, "LCMScheduler", _lcm),
    Target("*", "flow", "ode", OWN, _EULER, _flow, trained=_plain),
    # FlowMatchEuler's own stochastic sampling ignores the generator in diffusers 0.36 and 0.38; this class does not.
    Target("*", "flow", "renoise", OWN, _RENOISE, _flow, trained=_plain),
    Target("*", "vp", "ode", OWN, "DDIMScheduler", _ddim),
    Target("*", "vp", "renoise", OWN, "LCMScheduler", _lcm),
)


def row_of(pipeline: str, scheduler: str) -> Target:
    """The first row of a pipeline and scheduler, by their class names. UserError when a folder names others."""
    for row in TARGETS:
        if (row.pipeline.split(":")[1], row.scheduler) == (pipeline, scheduler):
            return row
    raise UserError(f"fewstep exports no {pipeline} with a {scheduler}")


def scheduler_class(name: str) -> Any:
    """The diffusers scheduler called `name`; UserError when the installed version has none."""
    found = getattr(import_module("diffusers"), name, None)
    if found is None:
        raise UserError(f"this version of diffusers has no {name}: install diffusers >= 0.36")
    return found


def passes_sigmas(pipeline: str, scheduler: Any) -> bool:
    """Whether the pipeline (its class name) hands the scheduler sigmas 1, 1-1/N, ... and not the number N alone."""
    return pipeline == OWN.split(":")[1] and type(scheduler).__name__.startswith("FlowMatch")


def grid(scheduler: Any, pipeline: str, steps: int) -> Pairs:
    """[(label fed, flow time stepped from)] of a `steps`-step run, read from the scheduler after `set_timesteps`."""
    if passes_sigmas(pipeline, scheduler):
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    labels = scheduler.timesteps
    if is_flow(scheduler):
        return list(zip(labels.tolist(), scheduler.sigmas[: len(labels)].tolist()))
    abar = scheduler.alphas_cumprod.double()[labels.long()]
    return list(zip(labels.tolist(), torch.sigmoid((torch.log1p(-abar) - torch.log(abar)) / 2).tolist()))


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler object (or its config's class) steps in flow times."""
    return type(scheduler).__name__.startswith("Flow") or bool(scheduler.config.get("use_flow_sigmas"))


def trained_pairs(path: Path, u: Sequence[float]) -> Pairs:
    """[(label fed, flow time)] at clock values u, as rollouts feed them."""
    return [(path.timestep(path.time(level)), path.time(level)) for level in u]


def same_pairs(ours: Pairs, theirs: Pairs) -> bool:
    """Equal up to float32: labels to 1e-3 of 1000, flow times to 1e-5."""
    close = (abs(a[0] - b[0]) < 1e-3 and abs(a[1] - b[1]) < 1e-5 for a, b in zip(ours, theirs))
    return len(ours) == len(theirs) and all(close)


def training_path(
    family: DiffusionFamily, path: Path, kind: Kind, steps: int, guidance: float = 1.0, latent: bool = False
) -> Path:
    """The path to train a `steps`-step student on, so that a scheduler exists which feeds it what it was trained on.

    The clock values to train at are `training_path(...).grid(steps)`. It is the teacher's own path, except that stock
    flow schedulers with whole labels start a little below noise. Raises UserError when no row has such a grid.
    """
    for row in _rows(family, path, kind, labels=True, own=latent or guidance != 1):
        trained = row.trained(path)
        if _fits(row, trained, Schedule(kind, trained.grid(steps))):
            return trained
    raise _no_target(path, kind, steps)


def training_start(
    family: DiffusionFamily, path: Path, kind: Kind, steps: int, guidance: float = 1.0, latent: bool = False
) -> float:
    """Clock value of the first level of `training_path`: 1, or .999 for whole labels and for tables of 1000."""
    trained = training_path(family, path, kind, steps, guidance, latent)
    return trained.grid(steps)[0]


def target_for(
    family: DiffusionFamily, path: Path, schedule: Schedule, labels: bool = True, latent: bool = False
) -> Target:
    """The first row whose scheduler, made from config alone, feeds exactly the pairs of `schedule` on `path`.

    labels: whether the network is class-conditional. latent: whether a VAE decodes. UserError when there is no row.
    """
    if schedule.noise == "fresh":
        for row in _rows(family, path, schedule.kind, labels, own=latent or schedule.guidance != 1):
            if _fits(row, path, schedule):
                return row
    raise _no_target(path, schedule.kind, schedule.steps)


def offered_steps(target: Target, path: Path, schedule: Schedule) -> list[int]:
    """Numbers of steps at which the exported folder calls the network at trained levels only."""
    scheduler = target.scheduler_for(path, schedule.steps)
    name, levels = target.pipeline.split(":")[1], trained_pairs(path, schedule.u)
    grids = {n: grid(scheduler, name, n) for n in range(1, schedule.steps + 1)}
    return [n for n, pairs in grids.items() if all(any(same_pairs([p], [q]) for q in levels) for p in pairs)]


def _rows(family: DiffusionFamily, path: Path, kind: Kind, labels: bool, own: bool) -> Iterator[Target]:
    for row in TARGETS:
        serves = row.serves in ("*", family.facts.pipeline) and row.labels in (None, labels)
        if serves and (row.path, row.kind) == (kind_of(path), kind) and row.own >= own:
            yield row


def _fits(row: Target, path: Path, schedule: Schedule) -> bool:
    scheduler = row.scheduler_for(path, schedule.steps)
    theirs = grid(scheduler, row.pipeline.split(":")[1], schedule.steps)
    return same_pairs(trained_pairs(path, schedule.u), theirs)


def _no_target(path: Path, kind: str, steps: int) -> UserError:
    return UserError(
        f"no diffusers scheduler makes these {steps} levels of a {kind_of(path)} path with '{kind}' from its config: "
        "train on the levels that exporting.targets.training_path gives, e.g. 1, 2, 4 or 8 evenly spaced ones"
    )
