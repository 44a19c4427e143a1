"""From a trained role to a folder that others load: at a run's end, and later from any of its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.encoded import dressed, fitting
from ..data.registry import make_source
from ..draws import Draw
from ..errors import UserError
from ..exporting.card import licence_of
from ..exporting.folder import export as write_folder
from ..exporting.grids import grid, start_of
from ..exporting.lora import check_layout
from ..exporting.network import class_count
from ..exporting.pipeline import addresses
from ..exporting.reload import reload_check
from ..exporting.targets import exported, row_of, target_for, trained_at, training_path
from ..maths.paths import Path as NoisePath
from ..maths.solvers import Schedule
from ..methods.base import DiffusionMethod, Method
from ..models.folder import card
from ..models.hub import local
from ..models.registry import FAMILIES
from ..nets.extra_inputs import reads
from ..recipe import Recipe, load_recipe
from ..roles import Handle, assemble, hold
from . import checkpoint, distributed
from .snapshot import place, restore_roles

if TYPE_CHECKING:
    from .trainer import Trainer


# A schedule of more steps than MANY is checked in FEW: hundreds of stochastic steps spread the rounding of other sums to
# 2 % of a chain, as a chaotic map would.
MANY, FEW = 100, 4


def meet_export(method: Method, handles: dict[str, Handle]) -> None:
    """Sets the exported role's path to the one whose pairs (label fed, level stepped from) an exported scheduler has.

    Asked before training, so that a schedule which no scheduler makes is refused now (UserError), not at the end.
    """
    handle = handles.get(method.exported())
    if not isinstance(method, DiffusionMethod) or handle is None or handle.path is None:
        return
    family = FAMILIES.get(str(handle.family))
    if not family.facts.pipeline:
        return

    def schedule_on(path: NoisePath) -> Schedule:
        handle.path = getattr(method, method.exported()).path = path
        return exported(family, method.schedule())

    _check_adapter(method, handle)
    sort: dict[str, Any] = {"labels": class_count(handle.module) is not None, "latent": handle.around is not None}
    sort |= {"reads": reads(handle.module), "steps": method.steps_offered()}
    path = training_path(family, handle.path, schedule_on, **sort)
    schedule = schedule_on(path)
    target = target_for(family, path, schedule, **sort)
    scheduler = target.scheduler_for(path, schedule)
    for n in method.steps_offered() if schedule.origin else ():
        if not trained_at(scheduler, target.pipeline_name, path, schedule, n):
            raise UserError(
                f"{n} steps would visit levels that are not among the {schedule.origin} trained: leave {n} out"
            )


def _check_adapter(method: DiffusionMethod, handle: Handle) -> None:
    """An adapter reads its second time from the label, which only at s = 0 is the one that pipelines feed."""
    if handle.shifted and method.schedule().target != "zero":
        raise UserError(
            f"{handle.name}.tune is lora: such a student is sampled with config.sampler: few, or write tune: full"
        )


def export_run(trainer: Trainer) -> Path | None:
    """Writes `model/` of a run that just ended; None on other processes, or when the method exports nothing."""
    if distributed.rank() != 0 or trainer.method.exported() not in trainer.handles:
        return None
    if trainer.recipe.train.shard:  # this process has a part of each network; the checkpoint has them whole
        return export(trainer.folder, trainer.folder / "model")
    model = _write(trainer.method, trainer.handles, trainer.recipe, trainer.folder / "model", trainer.total)
    if trainer.recipe.train.check_export:
        check_export(trainer.method, model)
    return model


def export(run: str | Path, to: str | Path, step: int | None = None, lora_layout: str | None = None) -> Path:
    """Writes the exported role of a checkpoint (the newest, or that of `step`) of the run folder into the folder `to`.

    lora_layout: diffusers (default), peft, kohya or comfyui: keys of the LoRA file beside a student that is an adapter.
    The same as `fewstep export RUN --to DIR`. Raises UserError when there is no such run, checkpoint, adapter, or name
    of a layer, or `to` is taken.
    """
    check_layout(lora_layout or "diffusers")
    folder, target = Path(run), Path(to)
    root = folder / "checkpoints"
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"'{folder}' is no run folder: it has no recipe.yaml")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"'{target}' is not empty: choose another folder")
    done = checkpoint.steps(root)
    if not done or (step is not None and step not in done):
        raise UserError(f"'{folder}' has no checkpoint{f' of step {step}' if step else ''}: it has {done or 'none'}")
    recipe = load_recipe(folder / "recipe.yaml")
    saved = checkpoint.load(root / f"step-{step if step is not None else done[-1]}")
    method = recipe.build_method()
    # frozen parts that the method builds (judges) are in no model: their weights need not be here any more
    roles = [r for r in method.roles() if f"{r.name}.role" in saved.files or (r.tune == "frozen" and r.build is None)]
    sources = {name: make_source(config) for name, config in recipe.data.items()}
    handles = assemble(roles, recipe.roles, recipe.train.seed, fit=fitting(sources))
    method.bind(handles, dressed(sources, handles), {})
    meet_export(method, handles)
    if lora_layout is not None and handles[method.exported()].adapter is None:
        raise UserError(
            f"'{folder}' trained no adapter (tune: lora), so there is no LoRA file: leave --lora-layout out"
        )
    restore_roles(handles, saved)
    model = _write(method, handles, recipe, target, place(saved).total, lora_layout or "diffusers")
    if recipe.train.check_export:
        check_export(method, model)
    return model


def check_export(method: Method, model: Path, rows: int | None = None, seed: int = 0) -> float:
    """Largest difference between the method's own samples and those of a fresh process that has only diffusers.

    A student told a second time is sampled in other numbers of steps too. rows: default 20, or 2 where a VAE decodes.
    RunFailed when the samples differ or the folder does not load there. 0 for models that no pipeline samples.
    """
    if not isinstance(method, DiffusionMethod) or not card(model).get("pipeline"):
        return 0.0
    role = getattr(method, method.exported())
    schedule = _checked(method, card(model))
    rows = rows or (20 if role.around is None else 2)
    further = {n: replace(schedule, u=role.path.grid(n)) for n in _further(method, decodes=role.around is not None)}
    with _whole_float32(role.handle):
        samples = method.samples(rows, seed, schedule)
        others = {n: method.samples(rows, seed, other) for n, other in further.items()}
    asked = method.sources["train"].fetch(torch.arange(rows) % len(method.sources["train"]), None)
    noise = addresses(Draw.for_images(seed, np.arange(rows)))
    cond = asked["cond"]
    start, *later = [noise(i, (rows, *role.shape(cond))) for i in range(max(schedule.steps, *further, 0))]
    lengths = role.family.lengths(cond)
    asked_of = (cond.get("label"), later, asked.get("prompt"), others, lengths, schedule.steps)
    return reload_check(model, samples, start, *asked_of)


def _checked(method: DiffusionMethod, said: Mapping[str, Any]) -> Schedule:
    """The method's schedule; for one of many steps that of FEW, as the exported scheduler makes it."""
    schedule = method.schedule()
    if schedule.steps <= MANY:
        return schedule
    path = getattr(method, method.exported()).path
    scheduler = row_of(said["pipeline"], said["scheduler"]).scheduler_for(path, schedule)
    visited = grid(scheduler, said["pipeline"], FEW, start_of(path))
    return replace(schedule, u=tuple(path.clock(t) for _, t in visited))


def _further(method: DiffusionMethod, decodes: bool) -> list[int]:
    """Numbers of steps, beside its own, at which a student told a second time is held to its folder: 1, and up to 8."""
    if method.schedule().target is None:
        return []
    affordable = [n for n in method.steps_offered() if n <= (2 if decodes else 8)]
    return sorted({*affordable[:1], *affordable[-1:]} - {method.schedule().steps})


@contextmanager
def _whole_float32(handle: Handle) -> Iterator[None]:
    """Without autocast and TF32: the folder is sampled in float32 on the CPU."""
    kept, handle.autocast = handle.autocast, None
    narrow = handle.narrow
    if narrow:
        hold(handle.module, torch.float32)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        handle.autocast = kept
        if narrow:
            hold(handle.module, torch.bfloat16)  # what it was, to the bit


def _write(
    method: Method, handles: dict[str, Handle], recipe: Recipe, to: Path, steps: int, lora_layout: str = "diffusers"
) -> Path:
    handle = handles[method.exported()]
    diffusion = method if isinstance(method, DiffusionMethod) else None
    with handle.averaged():  # the file with the adapter holds what is merged
        return write_folder(
            method.exported_module(),
            FAMILIES.get(str(handle.family)),
            handle.path,
            diffusion.schedule() if diffusion else None,
            to,
            steps_offered=diffusion.steps_offered() if diffusion else (),
            card=_card(method, handle, recipe, steps),
            adapter=handle.adapter,
            around=handle.around,
            lora_layout=lora_layout,
        )


def _card(method: Method, handle: Handle, recipe: Recipe, steps: int) -> dict[str, Any]:
    paper = {"title": method.paper.title, "id": method.paper.id} if method.paper is not None else None
    return {
        "method": recipe.method,
        "paper": paper,
        "base": handle.origin,
        "training_steps": steps,
        "recipe": recipe.plain(),
        "evaluation": recipe.evaluation.model_dump(exclude_none=True),
        **_licence(handle.origin),
        **_guidance_range(method),
        **_folds(method),
        **_size(handle),
    }


def _licence(origin: str | None) -> dict[str, str]:
    """What the base's own model card says, if there is one here."""
    folder = local(origin) if origin is not None else None
    return licence_of(folder) if folder is not None else {}


def _size(handle: Handle) -> dict[str, Any]:
    """Height and width in pixels, of videos after the number of frames, where the data alone says them: stock pipelines of
    such networks have to be told."""
    family = FAMILIES.get(str(handle.family)) if handle.path is not None else None
    if family is None or not family.facts.latent.any_size:
        return {}
    *frames, height, width = family.row_shape(handle.module)[1:]
    factor, together = getattr(handle.around, "factor", 1), family.facts.latent.frames
    return {"size": [*((n - 1) * together + 1 for n in frames), height * factor, width * factor]}


def _folds(method: Method) -> dict[str, Any]:
    """CATH codes that the data counted, by which a fold is asked for."""
    found = [source.folds for source in method.sources.values() if getattr(source, "folds", None) is not None]
    return {"folds": list(found[0].codes)} if found else {}


def _guidance_range(method: Method) -> dict[str, Any]:
    """Where the guidance that the network is fed was trained."""
    scale = getattr(method.config, "guidance_scale", None)
    if not isinstance(method, DiffusionMethod) or not method.schedule().embedded or not isinstance(scale, tuple):
        return {}
    return {"guidance_range": list(scale)}
