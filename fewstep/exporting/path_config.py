"""A path written as data: for fewstep.json, and as the beta table of a diffusers scheduler's config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from ..errors import UserError
from ..maths.angle_path import AngleFlowPath
from ..maths.log_path import LogFlowPath
from ..maths.paths import FlowPath, Path, VPPath
from ..maths.tables import alphas_cumprod

# Flow paths on another clock than the shifted one, by their kind in fewstep.json.
CLOCKS: Mapping[type[Path], str] = {LogFlowPath: "log_flow", AngleFlowPath: "angle_flow"}
# Tables that widely used models were trained with, by the words diffusers has for them.
KNOWN_BETAS: tuple[Mapping[str, Any], ...] = (
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02},
)


def kind_of(path: Path) -> str:
    """ "flow" or "vp"; UserError for a path that no exported scheduler knows."""
    if isinstance(path, FlowPath):
        return "flow"
    if isinstance(path, VPPath):
        return "vp"
    raise UserError(
        f"a student on a {type(path).__name__} cannot be exported: only flow and variance-preserving ones can"
    )


def path_config(path: Path) -> dict[str, Any]:
    """`path` in words that `models.folder.path_from` reads back to an equal path."""
    if isinstance(path, VPPath):
        return {"kind": "vp", **vp_config(path)}
    return {"kind": CLOCKS.get(type(path)) or kind_of(path), **asdict(path)}


def vp_config(path: VPPath) -> dict[str, Any]:
    """Scheduler config of the path's table and prediction type: by name where diffusers has one, else all betas."""
    count = len(path.alphas_cumprod)
    abar = torch.tensor(path.alphas_cumprod, dtype=torch.float64)
    head = {"num_train_timesteps": count, "prediction_type": path.prediction_type}
    for betas in _named(count):
        if torch.allclose(alphas_cumprod(betas), abar, rtol=1e-9, atol=0):
            return {**betas, **head}
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    return {"trained_betas": (1 - abar / before).tolist(), **head}


def _named(count: int) -> Iterator[dict[str, Any]]:
    for known, rescale in product(KNOWN_BETAS, ({}, {"rescale_betas_zero_snr": True})):
        yield {**known, "num_train_timesteps": count, **rescale}
