"""Model folders: which family a folder holds, and its network and path, read without running code from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..maths.paths import FlowPath, Path, VPPath
from ..resources import locate
from .registry import FAMILIES

if TYPE_CHECKING:
    from .family import DiffusionFamily, Loaded

CARD = "fewstep.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_model(source: str | FilePath) -> Loaded:
    """The network in a local folder. Raises UserError when there is no such folder, no known family, or only pickles."""
    folder = locate(source)
    if not folder.is_dir():
        raise UserError(
            f"no model folder '{source}': give the path of an exported model or of a pipeline saved by diffusers"
        )
    refuse_pickles(folder)
    return FAMILIES.get(family_of(folder)).load(folder)


def refuse_pickles(folder: FilePath) -> None:
    """Raises UserError when `folder` holds a pickle; loading one can run any code."""
    found = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix in _PICKLES)
    if found:
        raise UserError(
            f"'{folder}' holds a pickle ({found[0]}), which is never loaded: convert it to safetensors and remove it"
        )


def card(folder: FilePath) -> dict[str, Any]:
    """`fewstep.json` of an exported folder; empty for folders from elsewhere."""
    file = folder / CARD
    return json.loads(file.read_text()) if file.exists() else {}


def family_of(folder: FilePath) -> str:
    """The family's name: from fewstep.json, else from the network's class in the pipeline folder."""
    said = card(folder).get("family")
    if said is not None:
        return str(said)
    found = _network_class(folder)
    for name in FAMILIES.names():
        facts = getattr(FAMILIES.get(name), "facts", None)
        if facts is not None and found is not None and facts.network.split(":")[1] == found:
            return name
    raise UserError(
        f"'{folder}' holds {found or 'no network'}, which no family knows: known are {', '.join(FAMILIES.names())}"
    )


def _network_class(folder: FilePath) -> str | None:
    for part in ("unet", "transformer", "."):
        file = folder / part / "config.json"
        if file.exists():
            config = json.loads(file.read_text())
            return str(config.get("_class_name") or (config.get("architectures") or [None])[0])
    return None


def load_component(family: DiffusionFamily, folder: FilePath) -> Loaded:
    """Network of a diffusers folder in float32, with the path its scheduler's config describes."""
    from importlib import import_module

    from .family import Loaded

    module_name, class_name = family.facts.network.split(":")
    network = getattr(import_module(module_name), class_name)
    component = folder / family.facts.component
    try:
        module = network.from_pretrained(component if component.is_dir() else folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {class_name} from '{folder}': {str(error).splitlines()[0]}") from error
    return Loaded(module, family.name, _path_in(folder))


def _path_in(folder: FilePath) -> Path:
    said = card(folder).get("path")
    if said is not None:
        return path_from(said)
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.exists():
        raise UserError(f"'{folder}' has no scheduler/scheduler_config.json, so its noise schedule is unknown")
    return path_from_scheduler(json.loads(file.read_text()))


def path_from_scheduler(config: Mapping[str, Any]) -> Path:
    """The path that a diffusers scheduler config describes: flow for flow-matching schedulers, else variance preserving."""
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    if flow or str(config.get("_class_name", "")).startswith("Flow"):
        return FlowPath(shift=float(config.get("shift") or config.get("flow_shift") or 1.0))
    return VPPath.from_scheduler(config)


def path_from(said: Mapping[str, Any]) -> Path:
    """A path from a recipe or a card: `{kind: flow, shift: 1}`, or `{kind: vp, <scheduler config>}`."""
    said = dict(said)
    kind = said.pop("kind", "flow")
    if kind == "flow":
        return FlowPath(**said)
    if kind == "vp":
        return VPPath.from_scheduler(said)
    raise UserError(f"unknown path kind '{kind}': write flow or vp")
