"""Is the folder whole: no pickles, nothing missing or changed, weights that are numbers."""

from __future__ import annotations

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..models.folder import refuse_pickles
from .atomic import sha256
from .finding import Check, Finding, Findings, Subject
from .index import INDEX, components

CONFIGS = {  # of components that are no network
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "feature_extractor": "preprocessor_config.json",
}


def _pickles(model: Subject) -> Findings:
    try:
        refuse_pickles(model.folder)
    except UserError as error:
        yield Finding("error", str(error).split(":")[0], "convert it to safetensors and remove it")


def _complete(model: Subject) -> Findings:
    if model.said.get("pipeline") and not (model.folder / INDEX).exists():
        yield Finding("error", f"{INDEX} is missing", "copy the whole folder again")
    try:
        parts = components(model.folder)
    except UserError as error:
        yield Finding("error", str(error), "copy the whole folder again")
        return
    for name, part in parts.items():
        config = next((file for kind, file in CONFIGS.items() if name.startswith(kind)), "config.json")
        if not (model.folder / name / config).exists():
            yield Finding("error", f"{name}/{config} of a {part} is missing", "copy the whole folder again")


def _hashes(model: Subject) -> Findings:
    recorded = model.said.get("sha256", {})
    for name, digest in recorded.items():
        if not (model.folder / name).exists():
            yield Finding("error", f"{name} is missing", "copy the whole folder again")
        elif sha256(model.folder / name) != digest:
            yield Finding("error", f"{name} is not the file that was exported: its sha256 differs", "copy it again")
    if recorded and all((model.folder / name).exists() for name in recorded):
        yield Finding("ok", f"{len(recorded)} files compared with the sha256 recorded at export")


def _finite(model: Subject) -> Findings:
    files = sorted(model.folder.rglob("*.safetensors"))
    if not files:
        yield Finding("error", "no weights: there is no safetensors file", "export the model again")
    for file in files:
        name = file.relative_to(model.folder)
        try:
            with safe_open(file, "pt") as tensors:
                bad = [key for key in tensors.keys() if not torch.isfinite(tensors.get_tensor(key)).all()]  # noqa: SIM118
        except SafetensorError as error:
            yield Finding("error", f"{name} cannot be read ({error})", "copy it again")
            continue
        if bad:
            yield Finding("error", f"{name}: {bad[0]} holds NaN or infinity", "go back to an earlier checkpoint")


FILE_CHECKS: tuple[Check, ...] = (_pickles, _complete, _hashes, _finite)
