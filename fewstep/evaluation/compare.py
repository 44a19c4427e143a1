"""Two runs under one protocol: differences of means over the same prompts, with an interval and a sign test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .bootstrap import mean_interval, sign_test
from .manifest import METRICS_FILE, Score, read_scores, same_protocol
from .protocol_run import PROTOCOL_FILE, VALUES_FILE


def compare_runs(a: str | Path, b: str | Path) -> dict[str, Any]:
    """`{a, b, n, rows}` of two folders that `evaluate` wrote; a row a metric: `metric, a, b, difference` (b - a).

    Metrics of images add `low, high`, the 95 % bootstrap interval of the mean difference over prompts, which are drawn in
    pairs, and a sign test over prompts: `wins` (b above a), `losses`, `ties` and `p`. Sets, such as FID, have no pairs.
    UserError names the first field in which the two protocols differ.
    """
    folders = Path(a), Path(b)
    left, right = map(_scores, folders)
    said = [_said(folder) for folder in folders]
    _comparable(said[0], said[1], f"'{a}' and '{b}'")
    shared = [name for name in left if name in right]
    if not shared:
        raise UserError(
            f"'{a}' has {', '.join(left)}, '{b}' {', '.join(right)}, none in common: score both under one protocol"
        )
    values = [_values(folder, int(facts.get("per_prompt", 1))) for folder, facts in zip(folders, said)]
    rows = [_row(left[name], right[name], *(v.get(name) for v in values)) for name in shared]
    return {"a": str(a), "b": str(b), "n": left[shared[0]].protocol.n, "rows": rows}


def _row(a: Score, b: Score, left: Tensor | None, right: Tensor | None) -> dict[str, Any]:
    same_protocol(asdict(a.protocol), asdict(b.protocol), f"{a.label} of the two")
    row = {"metric": a.protocol.metric, "label": a.label, "a": a.value, "b": b.value, "difference": b.value - a.value}
    if left is None or right is None:
        return row
    found, signs = mean_interval(right - left), sign_test(right - left)
    return {**row, "low": found.low, "high": found.high, "prompts": found.n, **asdict(signs)}


def _comparable(a: Mapping[str, Any], b: Mapping[str, Any], what: str) -> None:
    """Of images from elsewhere the seed is not known, and not held against them."""
    unknown = {"seed"} if "seed" not in a or "seed" not in b else set()
    left, right = ({k: v for k, v in x.items() if k not in unknown} for x in (a, b))
    same_protocol(left, right, what)


def _scores(folder: Path) -> dict[str, Score]:
    if not (folder / METRICS_FILE).is_file():
        raise UserError(f"no {METRICS_FILE} in '{folder}': score it first, with `fewstep evaluate ... --out {folder}`")
    return {score.protocol.metric: score for score in read_scores(folder / METRICS_FILE)}


def _said(folder: Path) -> dict[str, Any]:
    file = folder / PROTOCOL_FILE
    if not file.is_file():
        return {}
    try:
        said: dict[str, Any] = json.loads(file.read_text())
    except ValueError:
        raise UserError(f"'{file}' is damaged: score the folder anew") from None
    return said


def _values(folder: Path, per_prompt: int) -> dict[str, Tensor]:
    """Means over the images of each prompt [prompts], by metric."""
    file = folder / VALUES_FILE
    if not file.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        names = [name for name in rows[0] if name != "index"]
        columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names}
        return {name: column.view(-1, per_prompt).mean(1) for name, column in columns.items()}
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError):
        raise UserError(f"'{file}' is damaged: score the folder anew") from None
