"""`fewstep evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from . import evaluate_chains
from .answers import answer, number, only_json, say, table
from .arguments import Guidance, Json, numbers

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
Steps = Annotated[
    str | None,
    typer.Option("--steps", metavar="K[,K...]", help="Sampler steps; several: a table and a plot, a row each."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Noise of image i is a function of (seed, i); default: the protocol's, or 0."),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        metavar="NAME",
        help="coco2014-30k, coco2017-5k, mjhq-30k, hpsv2, imagereward, or a .yaml file; goes on where it was cut off.",
    ),
]
Prompts = Annotated[
    str | None, typer.Option("--prompts", metavar="FILE", help="Prompts in place of the protocol's own.")
]
Teacher = Annotated[
    Path | None, typer.Option("--teacher", metavar="MODEL", help="Beside the model, at the same --steps.")
]
DEFAULT_METRICS = "fid,prdc"


def evaluate(
    model: Scored,
    metrics: Metrics = None,
    protocol: Protocol = None,
    prompts: Prompts = None,
    n: Count = None,
    features: Features = None,
    reference: Reference = None,
    reward: Reward = None,
    steps: Steps = None,
    teacher: Teacher = None,
    guidance: Guidance = None,
    seed: Seed = None,
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

    counts = numbers(steps, "--steps") if steps is not None else []
    if any(count < 1 for count in counts):
        raise UserError(f"--steps={steps}: write numbers from 1")
    shared: dict[str, Any] = {"n": n, "reference": reference, "batch": batch, "out": out}
    shared["seed"] = seed if protocol is not None else seed or 0
    of_images: dict[str, Any] = {"features": features, "reward": reward, "guidance": guidance}
    of_images |= {"protocol": protocol, "prompts": prompts, "teacher": teacher}
    chains = holds_chains(model)
    with only_json(json):
        if chains:
            asked: dict[str, Any] = {"length": length, "noise_scales": noise_scales, "compared": compared}
            asked |= {"design": design, "fold": fold, "steps": _one(counts)}
            found = evaluate_chains.score(model, metrics, images=of_images, **asked, **shared)
        else:
            of_chains = {"length": length, "noise-scales": noise_scales, "compared": compared}
            of_chains |= {"design": design, "fold": fold}
            _refuse_chains(model, metrics, of_chains)
            found = _images(model, metrics, counts, **shared, **of_images)
    answer(found, json, lambda: evaluate_chains.show(found) if chains else _show(found))


def _images(
    model: Path,
    metrics: str | None,
    counts: list[int],
    teacher: Path | None,
    protocol: str | None,
    prompts: str | None,
    reference: str | None,
    **options: Any,
) -> dict[str, Any]:
    options["reference"] = reference_of(reference)
    several = len(counts) > 1 or teacher is not None
    if several and not counts:
        raise UserError("--teacher stands beside the model at given step counts: give --steps, e.g. --steps 1,2,4,8")
    if protocol is None and prompts is not None:
        raise UserError(
            "--prompts belongs to a protocol: give --protocol, or --reference '{source: prompts, path: FILE}'"
        )
    run = _plain if protocol is None else _under
    return run(model, protocol, metrics, prompts, counts if several else None, teacher, steps=_one(counts), **options)


def _plain(
    model: Path,
    _protocol: str | None,
    metrics: str | None,
    _prompts: str | None,
    counts: list[int] | None,
    teacher: Path | None,
    steps: int | None,
    out: Path | None,
    reward: str | None,
    **options: Any,
) -> dict[str, Any]:
    from ..evaluation.evaluate import evaluate as score
    from ..evaluation.sweep import sweep

    judge = _mapping("--reward", reward, "a reward's name, or {NAME: {key: value}}")
    names = (metrics or DEFAULT_METRICS).split(",")
    if counts is None:
        return score(model, names, steps=steps, out=out, reward=judge, **options)

    def run(folder: Path, count: int, place: Path | None) -> dict[str, Any]:
        return score(folder, names, steps=count, out=place, reward=judge, **options)

    return sweep(model, counts, run, teacher, out)


def _under(
    model: Path,
    protocol: str | None,
    metrics: str | None,
    prompts: str | None,
    counts: list[int] | None,
    teacher: Path | None,
    steps: int | None,
    out: Path | None,
    **options: Any,
) -> dict[str, Any]:
    from ..evaluation.protocol_run import run_protocol, sweep_protocol

    assert protocol is not None
    for name in ("features", "reward"):
        if options.pop(name) is not None:
            raise UserError(
                f"--{name}: a protocol says its own: write it under `metrics` of a .yaml file that is `like` it"
            )
    names = metrics.split(",") if metrics is not None else None
    if counts is not None:
        return sweep_protocol(model, protocol, counts, teacher, out, prompts=prompts, metrics=names, **options)
    return run_protocol(model, protocol, out, prompts=prompts, metrics=names, steps=steps, **options)


def _one(counts: list[int]) -> int | None:
    if len(counts) > 1:
        return None
    return counts[0] if counts else None


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
    if "rows" in found:
        _show_sweep(found)
        return
    rows = [(s["label"], number(s["value"], 4), _interval(s), s["n"], s["reference"]) for s in found["scores"]]
    with_intervals = any("interval" in s for s in found["scores"])
    columns = ("score", "value", "95 % interval", "n", "reference")
    kept = [i for i in range(5) if with_intervals or i != 2]
    table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
    facts: dict[str, Any] = {key: number(found[key]) for key in ("steps", "nfe", "ms_per_image") if key in found}
    if "latency" in found:
        facts["latency"] = f"{number(found['latency']['median_ms'])} ms for {found['latency']['batch']}"
    say(model=found["model"], protocol=found.get("protocol"), **facts, out=found.get("out"))


def _show_sweep(found: dict[str, Any]) -> None:
    from ..evaluation.sweep import metrics_of

    names = metrics_of(found["rows"])
    rows = [[r["who"], *(number(r[key], 4) for key in ("steps", "nfe", "ms", *names))] for r in found["rows"]]
    table(("model", "steps", "NFE", "ms", *names), rows)
    say(model=found["model"], teacher=found["teacher"], n=found["n"])


def _interval(score: dict[str, Any]) -> str:
    low, high = score.get("interval", (None, None))
    return f"{number(low, 4)} .. {number(high, 4)}" if low is not None else ""
