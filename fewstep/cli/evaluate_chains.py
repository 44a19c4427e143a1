"""`fewstep evaluate` of whatever holds protein chains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .answers import number, say, table
from .arguments import numbers

if TYPE_CHECKING:
    from ..evaluation.protein.designability import Judges

METRIC = "protein"
COLUMNS = {
    "noise_scale": "noise scale",
    "valid": "valid",
    "designable": "designable",
    "bond_error": "bond error, A",
    "helix": "helix",
    "strand": "strand",
    "left_handed": "left-handed",
    "diversity": "diversity TM",
    "folds": "folds",
    "seconds_per_100": "s / 100",
    "effective_seconds": "s / valid",
}


def score(
    model: Path,
    metrics: str | None,
    length: str | None,
    noise_scales: str | None,
    compared: int | None,
    design: str | None,
    fold: str | None,
    images: Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """What `evaluate_chains`, or with several noise scales `sweep`, finds; options are theirs.

    images: options that only images have, by name; UserError when one is given, or another metric than `protein`.
    """
    from ..evaluation.protein.evaluate import DEFAULT_LENGTHS, MOST_COMPARED, evaluate_chains
    from ..evaluation.protein.sweep import sweep

    if metrics not in (None, METRIC):
        raise UserError(f"--metrics {metrics}: chains have the metric {METRIC}, which is all their numbers")
    given = [name for name, value in images.items() if value is not None]
    if given:
        raise UserError(f"--{given[0]} is for images, and '{model}' holds protein chains: leave it out")
    lengths = tuple(numbers(length, "--length")) if length else DEFAULT_LENGTHS
    scales, options["judges"] = _scales(noise_scales), _judges(design, fold)
    options["compared"] = compared or MOST_COMPARED
    if len(scales) > 1:
        return sweep(model, scales, lengths=lengths, **options)
    return evaluate_chains(model, lengths=lengths, noise_scale=scales[0] if scales else None, **options)


def _judges(design: str | None, fold: str | None) -> Judges | None:
    if design is None and fold is None:
        return None
    if design is None or fold is None:
        raise UserError("designability takes both --design module:function and --fold FOLDER, or neither")
    from ..evaluation.protein.designability import Judges

    return Judges.named(design, fold)


def show(found: Mapping[str, Any]) -> None:
    """A row a score, or a row a noise scale."""
    if "rows" in found:
        known = [key for key in COLUMNS if any(key in row for row in found["rows"])]
        table([COLUMNS[key] for key in known], [[number(row.get(key)) for key in known] for row in found["rows"]])
    else:
        rows = [(s["metric"], number(s["value"], 4), s["n"], s["reference"]) for s in found["scores"]]
        table(("score", "value", "n", "reference"), rows)
    told = ("lengths", "noise_scale", "steps", "nfe", "seconds_per_100", "effective_seconds")
    facts = {key: found[key] if isinstance(found[key], str) else number(found[key]) for key in told if key in found}
    say(model=found["model"], **facts)


def _scales(text: str | None) -> list[float]:
    try:
        scales = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        scales = [-1.0]
    if any(not 0 <= scale < float("inf") for scale in scales):
        raise UserError(f"--noise-scales={text}: write numbers from 0 with commas between, e.g. 1,.45,0") from None
    return scales
