"""`fewstep evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .answers import answer, number, only_json, say, table
from .arguments import Guidance, Json, Seed, Steps

Scored = Annotated[Path, typer.Argument(metavar="MODEL", help="An exported model folder, or a folder of images.")]
Metrics = Annotated[str, typer.Option("--metrics", metavar="A,B", help="Names with commas between.")]
Count = Annotated[
    int | None, typer.Option("--n", "-n", min=2, help="Images to draw; default: as many as the reference has.")
]
Features = Annotated[
    str | None, typer.Option("--features", metavar="NAME", help="Feature network; default: the model's own.")
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference", metavar="SOURCE", help="Real images: a data source, or '{source: image_folder, path: ...}'."
    ),
]
Reward = Annotated[
    str | None,
    typer.Option("--reward", metavar="NAME", help="Reward of the metric `reward`, or '{hpsv2: {from: FOLDER}}'."),
]
Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="Images drawn at once; default: 256, with prompts 8.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep images, manifest and scores there.")]


def evaluate(
    model: Scored,
    metrics: Metrics = "fid,prdc",
    n: Count = None,
    features: Features = None,
    reference: Reference = None,
    reward: Reward = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    batch: Batch = None,
    out: Out = None,
    json: Json = None,
) -> None:
    """Score a model, or a folder of images, against real images."""
    from ..evaluation.evaluate import evaluate as score

    with only_json(json):
        real, judge = reference_of(reference), _mapping("--reward", reward, "a reward's name, or {NAME: {key: value}}")
        found = score(model, metrics.split(","), n, features, real, seed, steps, guidance, batch, out, judge)
    answer(found, json, lambda: _show(found))


def reference_of(text: str | None) -> str | dict[str, Any] | None:
    """A source's name as it is; `{source: ..., ...}` as a mapping. UserError for anything else."""
    return _mapping("--reference", text, "a data source's name, or {source: NAME, key: value}")


def _mapping(option: str, text: str | None, allowed: str) -> str | dict[str, Any] | None:
    if text is None or not text.lstrip().startswith("{"):
        return text
    import yaml

    try:
        return dict(yaml.safe_load(text))
    except (yaml.YAMLError, TypeError, ValueError):
        raise UserError(f"{option} {text}: write {allowed}") from None


def _show(found: dict[str, Any]) -> None:
    rows = [(s["label"], number(s["value"], 4), s["n"], s["reference"]) for s in found["scores"]]
    table(("score", "value", "n", "reference"), rows)
    say(model=found["model"], **{key: number(found[key]) for key in ("steps", "nfe", "ms_per_image") if key in found})
