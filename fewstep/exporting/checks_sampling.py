"""Does the folder sample as it was trained: scheduler, code, versions, and two images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from ..draws import Draw
from ..errors import UserError
from ..maths.paths import Path
from ..maths.solvers import Schedule
from ..models.folder import path_from
from ..models.registry import FAMILIES
from ..models.times import TIMES
from .card import schedule_from
from .finding import Check, Finding, Findings, Subject
from .fresh import chains_of, given_noise, images_of
from .grids import SECOND_TIME, Pairs, grid, same_pairs, start_of, trained_pairs
from .guidance_number import guidance_number
from .index import INDEX, foreign_code, read_index
from .network import class_count, network_of, takes_lengths, takes_prompts
from .pipeline import addresses, load_pipeline
from .targets import row_of, trained_at

OLDEST = (0, 36)  # of diffusers: has every class that folders name
SINCE = {"ZImagePipeline": (0, 39)}  # asked for N steps, it takes other levels in older ones
MANY_STEPS = 50  # of a chain, more of which would tell no more
COLLAPSED = 0.01  # nm, of coordinates
_RESTORE = "restore scheduler/scheduler_config.json from the export"


def _scheduler(model: Subject) -> Findings:
    file = model.folder / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return
    config = json.loads(file.read_text())
    name = str(config["_class_name"])
    if model.said.get("pipeline"):
        yield from _against_card(model.said, name, config)
    elif config.get("timestep_spacing") == "leading":
        yield Finding("warn", f"{name} spaces its steps 'leading'", "few steps want timestep_spacing: trailing")


def _against_card(said: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Findings:
    """The class, then every setting, then the levels that come out."""
    path, schedule = path_from(said["path"]), schedule_from(said["schedule"])
    if name != said["scheduler"]:
        yield Finding("error", f"the scheduler is {name}; exported was {said['scheduler']}", _RESTORE)
        return
    try:
        exported = row_of(said["pipeline"], name).scheduler_for(path, schedule)
        found = type(exported).from_config(config)
        theirs = grid(found, said["pipeline"], schedule.steps, start_of(path))
    except (ValueError, TypeError, UserError) as error:
        yield Finding("error", f"{name} cannot make {schedule.steps} steps ({error})", _RESTORE)
        return
    changed = [key for key, value in exported.config.items() if key[0] != "_" and found.config.get(key) != value]
    if changed:
        was, now = exported.config[changed[0]], found.config.get(changed[0])
        yield Finding("error", f"{name} has {changed[0]} = {now}; exported was {was}", _RESTORE)
    ours = trained_pairs(path, schedule.u)
    if not same_pairs(ours, theirs):
        yield Finding("error", f"{name} feeds timesteps {_labels(theirs)}; trained were {_labels(ours)}", _RESTORE)
    elif not changed:
        yield Finding("ok", f"{name} steps on the {schedule.steps} levels that were trained")
        yield from _offered(said, found, path, schedule)


def _offered(said: Mapping[str, Any], scheduler: Any, path: Path, schedule: Schedule) -> Findings:
    """A student of a grid must find the levels of every number of steps it is offered for there."""
    asked = said["steps"] if schedule.origin or schedule.target else []
    off = [n for n in asked if not trained_at(scheduler, said["pipeline"], path, schedule, n)]
    if off:
        levels = f"{schedule.origin} levels that were trained" if schedule.origin else "levels of its path"
        what = f"{off[0]} steps call the network off the {levels}"
        yield Finding("warn", what, f"sample it in {schedule.steps} steps")


def _second_time(model: Subject) -> Findings:
    """The pipeline must tell the network what it was trained to be told."""
    if not model.said.get("times"):
        return
    index, schedule = read_index(model.folder), model.said["schedule"]
    if not (index.get(TIMES) or [None])[0]:
        yield Finding(
            "error", f"{INDEX} names no {TIMES}, so the second time is never told", "restore it from the export"
        )
        return
    changed = [word for word in SECOND_TIME if index.get(word) != schedule[word]]
    if changed:
        what = f"{INDEX} has {changed[0]} = {index.get(changed[0])}; exported was {schedule[changed[0]]}"
        yield Finding("error", what, "restore it from the export")
    else:
        yield Finding("ok", f"the network is told its second time ('{schedule['target']}')")


def _labels(pairs: Pairs) -> str:
    return " ".join(f"{label:.4g}" for label, _ in pairs)


def _code(model: Subject) -> Findings:
    foreign = foreign_code(model.folder)
    if foreign:
        yield Finding("warn", f"brings code that is not fewstep's: {foreign[0]}", "read it before you trust it")
    elif model.said.get("remote_code"):
        files = model.said["remote_code"]  # before two-time students, the name of one file
        files = files if isinstance(files, str) else " and ".join(files)
        what = f"diffusers wants trust_remote_code=True for {files}; 0.36 runs it without asking"
        yield Finding("ok", what, "with fewstep_pipelines installed, its class loads the folder and runs nothing of it")
    elif (model.folder / INDEX).exists():
        yield Finding("ok", "needs no code of its own: stock diffusers classes")


def _versions(model: Subject) -> Findings:
    if not (model.folder / INDEX).exists():
        return
    installed = version("diffusers")
    oldest = SINCE.get(str(model.said.get("pipeline")), OLDEST)
    needed = ".".join(map(str, oldest))
    if tuple(int(part) for part in installed.split(".")[:2]) < oldest:
        yield Finding("error", f"diffusers {installed} is older than {needed}", f"install diffusers >= {needed}")
    else:
        made = model.said.get("versions", {}).get("diffusers", "an unknown version")
        yield Finding("ok", f"loads with diffusers >= {needed}; written by {made}, read by {installed}")


def _loads(model: Subject) -> Findings:
    if (model.folder / INDEX).exists():
        yield from _samples(model)
        return
    try:
        FAMILIES.get(str(model.said["family"])).load(model.folder)
    except (KeyError, UserError) as error:
        yield Finding("error", f"does not load: {error}", "export the model again")
    else:
        yield Finding("ok", f"loads as family {model.said['family']}")


def _samples(model: Subject) -> Findings:
    """Two images in one step, or in as few as were trained; or two chains."""
    if foreign_code(model.folder):
        yield Finding("warn", "not loaded, because that would run its code", "load it with trust_remote_code=True")
        return
    try:
        pipeline = load_pipeline(model.folder, device="cpu")
    except UserError as error:
        yield Finding("error", str(error), "export the model again")
        return
    steps = min(model.said.get("steps") or [1])
    if takes_lengths(pipeline):
        yield from _chains(pipeline, min(steps, MANY_STEPS))
        return
    labels = [0, 0] if class_count(network_of(pipeline)) else None
    prompts = ["a photo of a cat"] * 2 if takes_prompts(pipeline) else None
    with given_noise(pipeline, addresses(Draw.for_images(0, np.arange(2)))):
        scale, size = model.said.get("schedule", {}).get("guidance"), model.said.get("size")
        number = None if scale is None else guidance_number(type(pipeline).__name__, scale)
        images = images_of(pipeline, 2, labels, steps, number, prompts, size)
    if not np.isfinite(images).all():
        yield Finding("error", f"a {steps}-step sample holds NaN", "go back to an earlier checkpoint")
    elif images.std() == 0 or ((images <= 0) | (images >= 1)).mean() > 0.99:
        yield Finding("warn", f"a {steps}-step sample is one flat or wholly saturated image", "look at more samples")
    else:
        yield Finding("ok", f"loads, and samples in {steps} step{'s' if steps > 1 else ''}")


def _chains(pipeline: Any, steps: int) -> Findings:
    """Two short chains. In fewer steps than the teacher's hundreds they need not look like proteins."""
    config: Any = network_of(pipeline).config
    with given_noise(pipeline, addresses(Draw.for_images(0, np.arange(2)))):
        chains = chains_of(pipeline, [config.get("shortest") or 40] * 2, steps).cpu()
    if not chains.isfinite().all():
        yield Finding("error", f"a {steps}-step sample holds NaN", "go back to an earlier checkpoint")
    elif chains.std() < COLLAPSED:
        yield Finding("warn", f"a {steps}-step sample has all residues in one place", "look at more samples")
    else:
        yield Finding("ok", f"loads, and makes chains in {steps} step{'s' if steps > 1 else ''}")


SAMPLING_CHECKS: tuple[Check, ...] = (_scheduler, _second_time, _code, _versions, _loads)
