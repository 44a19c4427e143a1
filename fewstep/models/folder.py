"""Model folders: which family a folder holds, and its network and path, read without running code from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..maths.angle_path import AngleFlowPath
from ..maths.log_path import LogFlowPath
from ..maths.paths import FlowPath, Path, VPPath
from ..resources import locate
from .hub import find_model, local
from .known import KNOWN
from .registry import FAMILIES
from .times import TIMES, read_times

if TYPE_CHECKING:
    from .family import DiffusionFamily, Loaded

CARD = "fewstep.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_model(source: str | FilePath) -> Loaded:
    """The network of a local folder, or of a hub id in the local cache.

    On the meta device, where a plan asks for sizes, a known hub id need not be there. Raises UserError when there is no
    such model, no family that knows it, or a pickle in a folder (what a cached snapshot holds beside safetensors stays
    unread).
    """
    known = KNOWN.get(str(source))
    if known is not None and on_meta() and local(source) is None:
        return FAMILIES.get(known.family).build(**known.build)
    folder = find_model(source)
    if folder == locate(source):
        refuse_pickles(folder)
    return FAMILIES.get(family_of(folder)).load(folder)


def on_meta() -> bool:
    """Whether networks are made without storage, for their sizes alone."""
    return torch.get_default_device().type == "meta"


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
    config = _network_config(folder)
    for name in FAMILIES.names():
        holds = getattr(FAMILIES.get(name), "holds", None)
        if holds is not None and holds(config):
            return name
    found = config.get("_class_name") or (config.get("architectures") or ["no network"])[0]
    raise UserError(f"'{folder}' holds {found}, which no family knows: known are {', '.join(FAMILIES.names())}")


def _network_config(folder: FilePath) -> dict[str, Any]:
    for part in ("unet", "transformer", "."):
        file = folder / part / "config.json"
        if file.exists():
            return json.loads(file.read_text())
    return {}


def load_component(family: DiffusionFamily, folder: FilePath) -> Loaded:
    """Network of a diffusers folder in float32, with the path its scheduler's config describes; weightless on meta."""
    from importlib import import_module

    from .family import Loaded

    module_name, class_name = family.facts.network.split(":")
    network = getattr(import_module(module_name), class_name)
    component = folder / family.facts.component
    place = component if component.is_dir() else folder
    try:
        if on_meta():
            module = network.from_config(network.load_config(place))
        else:
            module = network.from_pretrained(place, use_safetensors=True).float()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {class_name} from '{folder}': {str(error).splitlines()[0]}") from error
    if (folder / TIMES).is_dir():
        read_times(module, folder / TIMES)
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
    if str(config.get("_class_name", "")).startswith("FlowMatchProtein"):
        return LogFlowPath()
    if config.get("_class_name") == "SCMScheduler":
        return AngleFlowPath()
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    if flow or str(config.get("_class_name", "")).startswith("Flow"):
        return FlowPath(shift=float(config.get("shift") or config.get("flow_shift") or 1.0))
    return _vp(config)


def path_from(said: Mapping[str, Any]) -> Path:
    """A path from a recipe or a card: `{kind: flow, shift: 1}`, or `{kind: vp, <scheduler config>}`."""
    said = dict(said)
    kind = said.pop("kind", "flow")
    if kind == "flow":
        return FlowPath(**said)
    if kind == "log_flow":
        return LogFlowPath(**said)
    if kind == "angle_flow":
        return AngleFlowPath(**said)
    if kind == "vp":
        return _vp(said)
    raise UserError(f"unknown path kind '{kind}': write flow, log_flow or vp")


def _vp(config: Mapping[str, Any]) -> VPPath:
    with torch.device("cpu"):  # a path is numbers, also where a plan makes networks on the meta device
        return VPPath.from_scheduler(config)
