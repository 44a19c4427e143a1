"""What is wrong with a model folder, and the mend. Nothing in the folder is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..draws import Draw
from ..errors import UserError
from ..models.folder import CARD, path_from, refuse_pickles
from ..models.registry import FAMILIES
from .atomic import sha256
from .card import FORMAT, schedule_from
from .fresh import given_noise, images_of
from .network import class_count, network_of
from .pipeline import INDEX, addresses, foreign_code, load_pipeline
from .targets import grid, same_pairs, scheduler_class, trained_pairs

Level = Literal["ok", "warn", "error"]
OLDEST = (0, 36)  # of diffusers: has every class that folders name


@dataclass(frozen=True)
class Finding:
    """One line of the report: how bad it is, what was found, and what to do about it (empty when nothing)."""

    level: Level
    what: str
    mend: str = ""


Findings = Iterator[Finding]
Check = Callable[[Path, Mapping[str, Any]], Findings]


def doctor(folder: str | Path) -> list[Finding]:
    """Findings about a model folder, in the order of the checks; after an error in the files nothing is loaded.

    Raises UserError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no model folder '{folder}'")
    found, said = _card(folder)
    for checks in (_FILES, _MEANING):
        if any(finding.level == "error" for finding in found):
            return found
        found += [finding for check in checks for finding in check(folder, said)]
    return found


def _card(folder: Path) -> tuple[list[Finding], dict[str, Any]]:
    file = folder / CARD
    if not file.exists():
        return [
            Finding("warn", f"no {CARD}: steps, guidance and noise levels are unknown", "export it with fewstep")
        ], {}
    try:
        said = json.loads(file.read_text())
        format_, family = said["format"], said["family"]
    except (ValueError, KeyError, TypeError) as error:
        return [Finding("error", f"{CARD} cannot be read ({error})", "export the model again")], {}
    if format_ > FORMAT:
        return [Finding("error", f"{CARD} has format {format_}, this fewstep knows {FORMAT}", "update fewstep")], said
    return [Finding("ok", f"{CARD}: family {family}, method {said.get('method', 'unknown')}")], said


def _pickles(folder: Path, said: Mapping[str, Any]) -> Findings:
    try:
        refuse_pickles(folder)
    except UserError as error:
        yield Finding("error", str(error).split(":")[0], "convert it to safetensors and remove it")


def _complete(folder: Path, said: Mapping[str, Any]) -> Findings:
    if said.get("pipeline") and not (folder / INDEX).exists():
        yield Finding("error", f"{INDEX} is missing", "copy the whole folder again")
    for name, part in _components(folder).items():
        config = "scheduler_config.json" if name == "scheduler" else "config.json"
        if not (folder / name / config).exists():
            yield Finding("error", f"{name}/{config} of a {part} is missing", "copy the whole folder again")


def _hashes(folder: Path, said: Mapping[str, Any]) -> Findings:
    recorded = said.get("sha256", {})
    for name, digest in recorded.items():
        if not (folder / name).exists():
            yield Finding("error", f"{name} is missing", "copy the whole folder again")
        elif sha256(folder / name) != digest:
            yield Finding("error", f"{name} is not the file that was exported: its sha256 differs", "copy it again")
    if recorded and all((folder / name).exists() for name in recorded):
        yield Finding("ok", f"{len(recorded)} files compared with the sha256 recorded at export")


def _finite(folder: Path, said: Mapping[str, Any]) -> Findings:
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        yield Finding("error", "no weights: there is no safetensors file", "export the model again")
    for file in files:
        name = file.relative_to(folder)
        try:
            with safe_open(file, "pt") as tensors:
                bad = [key for key in tensors.keys() if not torch.isfinite(tensors.get_tensor(key)).all()]  # noqa: SIM118
        except SafetensorError as error:
            yield Finding("error", f"{name} cannot be read ({error})", "copy it again")
            continue
        if bad:
            yield Finding("error", f"{name}: {bad[0]} holds NaN or infinity", "go back to an earlier checkpoint")


def _grid(folder: Path, said: Mapping[str, Any]) -> Findings:
    if not (folder / "scheduler" / "scheduler_config.json").exists():
        return
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    name = str(config["_class_name"])
    if not said.get("schedule"):
        if config.get("timestep_spacing") == "leading":
            yield Finding("warn", f"{name} spaces its steps 'leading'", "few steps want timestep_spacing: trailing")
        return
    schedule = schedule_from(said["schedule"])
    ours = trained_pairs(path_from(said["path"]), schedule.u)
    try:
        theirs = grid(scheduler_class(name).from_config(config), said["pipeline"], schedule.steps)
    except (ValueError, TypeError, UserError) as error:
        yield Finding("error", f"{name} cannot make {schedule.steps} steps ({error})", _RESTORE)
        return
    if name != said["scheduler"] or not same_pairs(ours, theirs):
        fed = " ".join(f"{label:.4g}" for label, _ in theirs)
        trained = " ".join(f"{label:.4g}" for label, _ in ours)
        yield Finding("error", f"{name} feeds timesteps {fed}; trained were {trained} of {said['scheduler']}", _RESTORE)
    else:
        yield Finding("ok", f"{name} steps on the {schedule.steps} levels that were trained")


def _code(folder: Path, said: Mapping[str, Any]) -> Findings:
    foreign = foreign_code(folder)
    if foreign:
        yield Finding("warn", f"brings code that is not fewstep's: {foreign[0]}", "read it before you trust it")
    elif said.get("remote_code"):
        what = f"diffusers needs trust_remote_code=True for {said['remote_code']}, and 0.36 runs it without asking"
        yield Finding("ok", what, "with fewstep_pipelines installed, its class loads the folder and runs nothing of it")
    elif (folder / INDEX).exists():
        yield Finding("ok", "needs no code of its own: stock diffusers classes")


def _versions(folder: Path, said: Mapping[str, Any]) -> Findings:
    if not (folder / INDEX).exists():
        return
    installed = version("diffusers")
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        yield Finding("error", f"diffusers {installed} is older than 0.36", "install diffusers >= 0.36")
    else:
        made = said.get("versions", {}).get("diffusers", "an unknown version")
        yield Finding("ok", f"loads with diffusers >= 0.36; written by {made}, read by {installed}")


def _loads(folder: Path, said: Mapping[str, Any]) -> Findings:
    if (folder / INDEX).exists():
        yield from _samples(folder, said)
        return
    try:
        FAMILIES.get(str(said["family"])).load(folder)
    except (KeyError, UserError) as error:
        yield Finding("error", f"does not load: {error}", "export the model again")
    else:
        yield Finding("ok", f"loads as family {said['family']}")


def _samples(folder: Path, said: Mapping[str, Any]) -> Findings:
    """Two images in one step, or in as few as were trained."""
    if foreign_code(folder):
        yield Finding("warn", "not loaded, because that would run its code", "load it with trust_remote_code=True")
        return
    try:
        pipeline = load_pipeline(folder, device="cpu")
    except UserError as error:
        yield Finding("error", str(error), "export the model again")
        return
    steps = min(said.get("steps") or [1])
    labels = [0, 0] if class_count(network_of(pipeline)) else None
    with torch.no_grad(), given_noise(pipeline, addresses(Draw.for_images(0, np.arange(2)))):
        images = images_of(pipeline, 2, labels, steps, said.get("schedule", {}).get("guidance"))
    if not np.isfinite(images).all():
        yield Finding("error", f"a {steps}-step sample holds NaN", "go back to an earlier checkpoint")
    elif images.std() == 0 or ((images <= 0) | (images >= 1)).mean() > 0.99:
        yield Finding("warn", f"a {steps}-step sample is one flat or wholly saturated image", "look at more samples")
    else:
        yield Finding("ok", f"loads, and samples in {steps} step{'s' if steps > 1 else ''}")


def _components(folder: Path) -> dict[str, str]:
    """Component folder -> class, from model_index.json."""
    if not (folder / INDEX).exists():
        return {}
    index = json.loads((folder / INDEX).read_text())
    pairs = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and len(v) == 2}
    return {name: str(part[1]) for name, part in pairs.items() if part[0] is not None}


_RESTORE = "restore scheduler/scheduler_config.json from the export"
_FILES: tuple[Check, ...] = (_pickles, _complete, _hashes, _finite)
_MEANING: tuple[Check, ...] = (_grid, _code, _versions, _loads)
