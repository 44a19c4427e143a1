"""The table of pipelines and schedulers that folders are written with; `targets` searches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from ..errors import UserError
from ..maths.clocks import shift
from ..maths.log_path import LogFlowPath
from ..maths.paths import FlowPath, Path
from ..maths.solvers import Kind, Schedule
from .grids import CARRIED, OWN, SECOND_TIME, start_of
from .path_config import vp_config

Guidance = Literal["embedded", "baked", "cfg", "none"]


def _same(path: Path) -> Path:
    return path


def _nothing(_path: Path, _schedule: Schedule) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Target:
    """A row. It serves families whose stock pipeline is `serves` (or, "*", all without text) on `path`, sampled by `kind`.

    labels: True for class-conditional networks only, False for unconditional ones only, None for both.
    pipeline: "module:Class". scheduler: class in diffusers. config(path, schedule): what the scheduler is made with.
    trained(path): the path to train on so that this scheduler's pairs are met.
    guides: the pipeline does classifier-free guidance. always: it does, in a way that no schedule means, unless it is
    told a guidance_scale of 1. decodes: it turns latents into images.
    embeds: it feeds its guidance_scale to a network that has that input, and does not guide such a network.
    times: it tells a second time to a network that reads one. rescales: it knows energy-preserving guidance.
    defaults(path, schedule): what the pipeline is made with, for those whose files folders carry.
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
    always: bool = False
    decodes: bool = False
    embeds: bool = False
    times: bool = False
    rescales: bool = False
    defaults: Callable[[Path, Schedule], dict[str, Any]] = _nothing

    @property
    def carried(self) -> bool:
        """Whether folders carry the pipeline's file."""
        return self.pipeline.startswith(f"{CARRIED}:")

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
        return "cfg" if self.guides or self.always else "none"


def scheduler_class(name: str) -> Any:
    """The scheduler called `name`, of diffusers or carried; UserError when the installed version has none."""
    carried: Any = import_module(CARRIED)
    found = getattr(carried if name in carried.__all__ else import_module("diffusers"), name, None)
    if found is None:
        raise UserError(f"this version of diffusers has no {name}: install diffusers >= 0.36")
    return found


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
    # A two-time student was trained everywhere: any number of steps may be picked from the whole table.
    levels = len(path.alphas_cumprod) if schedule.target else schedule.origin or schedule.steps
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


def _text(pipeline: str, embeds: bool = True) -> tuple[Target, ...]:
    """Rows of a stock text-to-image pipeline on DDPM tables; embeds: its networks may have a guidance input."""

    def row(kind: Kind, scheduler: str, config: Callable[[Any, Schedule], dict[str, Any]]) -> Target:
        def offset(path: Any, schedule: Schedule) -> dict[str, Any]:
            return {**config(path, schedule), "steps_offset": 1}  # unused here, but the pipeline insists on it

        place = f"diffusers:{pipeline}"
        return Target(pipeline, "vp", kind, place, scheduler, offset, guides=True, decodes=True, embeds=embeds)

    return row("renoise", "LCMScheduler", _lcm), row("ode", "DDIMScheduler", _ddim)


def _flow_ends(path: FlowPath, schedule: Schedule) -> dict[str, Any]:
    """Asked for N alone, flow schedulers go down almost to 0; stretched to end at its second level, two steps are right."""
    ends = {"shift_terminal": path.time(schedule.u[-1])} if schedule.steps == 2 else {}
    return {**_flow(path, schedule), **ends}


def _flow_text(pipeline: str) -> tuple[Target, ...]:
    """Rows of a stock text-to-image pipeline that hands its scheduler N alone, on the flow path; "renoise" for N <= 2."""

    def row(kind: Kind, scheduler: str, config: Callable[[Any, Schedule], dict[str, Any]], trained: Callable) -> Target:
        place = f"diffusers:{pipeline}"
        return Target(pipeline, "flow", kind, place, scheduler, config, trained=trained, guides=True, decodes=True)

    return (
        row("ode", "DPMSolverMultistepScheduler", _dpm, _integer),
        row("renoise", "FlowMatchLCMScheduler", _flow_ends, _plain),
    )


def _sigmas_text(pipeline: str, **more: bool) -> tuple[Target, ...]:
    """Rows of a stock text-to-image pipeline that hands its scheduler sigmas, on the flow path.

    Its own guidance rescales what it guides, which no schedule means, or needs a negative prompt: these rows are for
    students without. more: words of `Target`.
    """

    def row(kind: Kind, scheduler: str) -> Target:
        words: dict[str, Any] = {"trained": _plain, "decodes": True, **more}
        return Target(pipeline, "flow", kind, f"diffusers:{pipeline}", scheduler, _flow, **words)

    # These pipelines hand their generator to no scheduler: with the second one `torch.manual_seed` repeats an image.
    return row("ode", "FlowMatchEulerDiscreteScheduler"), row("renoise", "FlowMatchLCMScheduler")


def _own(
    path: Literal["flow", "vp"],
    kind: Kind,
    scheduler: str,
    config: Callable,
    trained: Callable = _same,
    serves: str = "*",
    pipeline: str = OWN,
) -> Target:
    """A row of a pipeline that folders carry."""
    words: dict[str, Any] = {"guides": True, "decodes": True, "times": True, "rescales": True}
    return Target(serves, path, kind, pipeline, scheduler, config, trained=trained, defaults=_own_defaults, **words)


def _own_defaults(path: Path, schedule: Schedule) -> dict[str, Any]:
    """What the pipeline does unless it is told otherwise."""
    return {
        "default_steps": schedule.steps,
        "default_guidance_scale": schedule.guidance,
        "start": start_of(path),
        **{word: getattr(schedule, word) for word in SECOND_TIME},
    }


def _carried_text(stock: str, ours: str) -> tuple[Target, ...]:
    """Rows of our own form of a stock text-to-image pipeline, for what the stock one cannot do."""
    place = f"{CARRIED}:{ours}"
    return (
        _own("flow", "ode", "FlowMatchEulerDiscreteScheduler", _flow, _plain, stock, place),
        _own("flow", "renoise", "FlowMatchLCMScheduler", _flow, _plain, stock, place),
    )


def _protein(kind: Kind, scheduler: str, config: Callable[[Any, Schedule], dict[str, Any]]) -> Target:
    """A row of protein backbones, whose pipeline and scheduler folders carry."""
    place = f"{CARRIED}:FewStepProteinPipeline"
    words: dict[str, Any] = {"guides": True, "defaults": _protein_defaults}
    return Target("FewStepProteinPipeline", "flow", kind, place, scheduler, config, **words)


def _protein_defaults(_path: Path, schedule: Schedule) -> dict[str, Any]:
    return {"default_steps": schedule.steps, "default_guidance_scale": schedule.guidance}


def _log_grid(path: LogFlowPath, schedule: Schedule) -> dict[str, Any]:
    return {"first": path.first, "noise_scale": schedule.noise_scale}


def _langevin(_path: Path, schedule: Schedule) -> dict[str, Any]:
    return {"noise_scale": schedule.noise_scale, "renewal": schedule.renewal}


_SPRINT = "SanaSprintPipeline"
_PIXELS, _CONSISTENCY = "ConsistencyModelPipeline", "diffusers:ConsistencyModelPipeline"
TARGETS: tuple[Target, ...] = (
    Target(_PIXELS, "flow", "ode", _CONSISTENCY, "DPMSolverMultistepScheduler", _dpm, trained=_integer),
    Target(_PIXELS, "vp", "ode", "diffusers:DDIMPipeline", "DDIMScheduler", _ddim, labels=False),
    Target(_PIXELS, "vp", "ode", _CONSISTENCY, "DDIMScheduler", _ddim, labels=True),
    Target(_PIXELS, "vp", "renoise", _CONSISTENCY, "LCMScheduler", _lcm),
    *_text("StableDiffusionPipeline"),
    *_text("StableDiffusionXLPipeline"),
    *_text("PixArtSigmaPipeline", embeds=False),
    *_flow_text("StableDiffusion3Pipeline"),
    *_flow_text("SanaPipeline"),
    *_flow_text("WanPipeline"),
    Target(_SPRINT, "flow", "renoise", f"diffusers:{_SPRINT}", "SCMScheduler", _nothing, decodes=True, embeds=True),
    *_sigmas_text("QwenImagePipeline"),
    *_sigmas_text("ZImagePipeline", guides=True),
    *_sigmas_text("FluxPipeline", embeds=True),
    *_sigmas_text("Lumina2Pipeline", always=True),
    *_carried_text("StableDiffusion3Pipeline", "FewStepSD3Pipeline"),
    *_carried_text("SanaPipeline", "FewStepSanaPipeline"),
    *_carried_text("QwenImagePipeline", "FewStepQwenImagePipeline"),
    _protein("renoise", "FlowMatchProteinScheduler", _log_grid),
    _protein("sde", "FlowMatchProteinSDEScheduler", _langevin),
    _own("flow", "ode", "FlowMatchEulerDiscreteScheduler", _flow, _plain),
    # FlowMatchEuler's own stochastic sampling ignores the generator in diffusers 0.36 and 0.38; this class does not.
    _own("flow", "renoise", "FlowMatchLCMScheduler", _flow, _plain),
    _own("vp", "ode", "DDIMScheduler", _ddim),
    _own("vp", "renoise", "LCMScheduler", _lcm),
)
