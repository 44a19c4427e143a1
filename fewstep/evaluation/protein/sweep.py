"""What less noise buys and costs: one model sampled at several noise scales."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from .evaluate import evaluate_chains
from .files import Reference, holds_chains, load_reference

SCALES = (1.0, 0.8, 0.6, 0.45, 0.3, 0.0)
SWEEP_FILE = "sweep.json"
FACTS = ("noise_scale", "seconds_per_100", "effective_seconds")


def sweep(
    model: str | Path,
    noise_scales: Sequence[float] = SCALES,
    reference: str | Path | Reference | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`evaluate_chains` of an exported protein model at each noise scale: `{model, n, lengths, seed, steps, nfe, rows}`.

    Each row has noise_scale, seconds_per_100, effective_seconds and all values. All rows share their noises. out: gains
    sweep.json, and a folder noise-SCALE for each. options: as in `evaluate_chains`. Raises UserError for a folder that
    is no model.
    """
    folder = Path(model)
    if not (holds_chains(folder) and (folder / "model_index.json").exists()):
        raise UserError(f"'{folder}' is no protein model: noise scales belong to one that makes chains")
    real = load_reference(reference) if not isinstance(reference, Reference) else reference
    rows, found = [], {}
    for scale in noise_scales:
        place = Path(out) / f"noise-{scale:g}" if out is not None else None
        found = evaluate_chains(folder, reference=real, noise_scale=scale, out=place, **options)
        rows.append({**{name: found[name] for name in FACTS}, **found["values"]})
    shared = {name: found[name] for name in ("model", "n", "lengths", "seed", "steps", "nfe")} if found else {}
    answer = {**shared, "rows": rows}
    if out is not None:
        (Path(out) / SWEEP_FILE).write_text(json.dumps(_finite(answer), indent=1) + "\n")
    return answer


def _finite(found: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not abs(found) < float("inf") else found
