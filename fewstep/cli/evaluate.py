"""`fewstep evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from . import evaluate_chains
from .answers import answer, number, only_json, say, table
from .arguments import Guidance, Json, Seed, Steps

Scored = Annotated[
    Path, typer.Argument(metavar="MODEL", help="An exported model folder, or a folder of images or protein structures.")
]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics", metavar="A,B", help="Names with commas between; default: fid,prdc, and of chains protein."
    ),
]
Count = Annotated[
    int | None,
    typer.Option("--n", "-n", min=2, help="Images to draw, default as many as the reference has; or chains, 100."),
]
Features = Annotated[
    str | None, typer.Option("--features", metavar="NAME", help="Feature network; default: the model's own.")
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="SOURCE",
        help="Real images: a data source, or '{source: image_folder, path: ...}'; real proteins: a folder, or chains.",
    ),
]
Reward = Annotated[
    str | None,
    typer.Option("--reward", metavar="NAME", help="Reward of the metric `reward`, or '{hpsv2: {from: FOLDER}}'."),
]
Batch = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Drawn at once; default: 256 images, with prompts 8; chains as fit."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep what was made and its scores there.")]
Length = Annotated[
    str | None,
    typer.Option("--length", metavar="A,B", help="Residues of protein chains, round and round; default: 100."),
]
NoiseScales = Annotated[
    str | None,
    typer.Option("--noise-scales", metavar="A,B", help="Chains at each of these, a row each, e.g. 1,.8,.6,.45,.3,0."),
]
Compared = Annotated[
    int | None,
    typer.Option(
        "--compared", min=2, help="Chains of a set that TM-scores are found for; default: 60, spread over it."
    ),
]
Design = Annotated[
    str | None,
    typer.Option(
        "--design", metavar="MODULE:FUNCTION", help="Designs sequences of a protein chain, for the score `designable`."
    ),
]
Fold = Annotated[
    str | None,
    typer.Option("--fold", metavar="FOLDER", help="ESMFold that folds them, or a module:function. Both or neither."),
]
DEFAULT_METRICS = "fid,prdc"


def evaluate(
    model: Scored,
    metrics: Metrics = None,
    n: Count = None,
    features: Features = None,
    reference: Reference = None,
    reward: Reward = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    batch: Batch = None,
    out: Out = None,
    length: Length = None,
    noise_scales: NoiseScales = None,
    compared: Compared = None,
    design: Design = None,
    fold: Fold = None,
    json: Json = None,
) -> None:
    """Score a model, or a folder of images or protein structures, against real ones."""
    from ..evaluation.protein.files import holds_chains

    shared: dict[str, Any] = {"n": n, "reference": reference, "seed": seed, "steps": steps, "batch": batch, "out": out}
    of_images: dict[str, Any] = {"features": features, "reward": reward, "guidance": guidance}
    chains = holds_chains(model)
    with only_json(json):
        if chains:
            asked: dict[str, Any] = {"length": length, "noise_scales": noise_scales, "compared": compared}
            asked |= {"design": design, "fold": fold}
            found = evaluate_chains.score(model, metrics, images=of_images, **asked, **shared)
        else:
            of_chains = {"length": length, "noise-scales": noise_scales, "compared": compared}
            of_chains |= {"design": design, "fold": fold}
            _refuse_chains(model, metrics, of_chains)
            found = _images(model, metrics or DEFAULT_METRICS, **shared, **of_images)
    answer(found, json, lambda: evaluate_chains.show(found) if chains else _show(found))


def _images(model: Path, metrics: str, reference: str | None, reward: str | None, **options: Any) -> dict[str, Any]:
    from ..evaluation.evaluate import evaluate as score

    judge = _mapping("--reward", reward, "a reward's name, or {NAME: {key: value}}")
    return score(model, metrics.split(","), reference=reference_of(reference), reward=judge, **options)


def _refuse_chains(model: Path, metrics: str | None, options: dict[str, Any]) -> None:
    asked = [f"--{name}" for name, value in options.items() if value is not None]
    if metrics == evaluate_chains.METRIC:
        asked.append(f"--metrics {metrics}")
    if asked:
        raise UserError(f"{asked[0]} is for protein chains, and '{model}' has none: leave it out")


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
