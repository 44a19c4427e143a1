"""`fewstep sample`: a picture of images, videos that play, or a folder of protein chains, as the model makes them."""

from __future__ import annotations

from itertools import cycle
from math import ceil, sqrt
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .answers import answer, number, only_json, say
from .arguments import Guidance, Json, Model, Seed, Steps, Trust, numbers

Count = Annotated[int, typer.Option("--n", "-n", min=1, help="Number of images, videos or chains.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="PLACE",
        help="Picture with all images in a grid, default grid.png; videos that play, default grid.gif, or a .png with 8 "
        "frames of each; or folder, default chains.",
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="What a text-to-image model draws; may be repeated."),
]
Labels = Annotated[str | None, typer.Option("--labels", metavar="0,1,2", help="Classes, repeated until there are n.")]
Lengths = Annotated[
    list[str] | None,
    typer.Option("--length", metavar="60,80", help="Residues of protein chains, repeated until there are n."),
]
Format = Annotated[str | None, typer.Option("--format", help="Files of protein chains: pdb (default) or cif.")]
NoiseScale = Annotated[
    float | None,
    typer.Option(
        "--noise-scale", help="Noise of a protein sampler; less is more regular. Default: what the model says."
    ),
]
Folds = Annotated[
    str | None,
    typer.Option(
        "--cath", metavar="3.40.50", help="Fold of protein chains: a CATH code, or labels C,A,T with 0 = not known."
    ),
]
Attention = Annotated[
    str | None,
    typer.Option("--attention", metavar="NAME", help="sdpa, xformers, or another attention backend of diffusers."),
]
Offload = Annotated[
    str | None,
    typer.Option(
        "--offload", metavar="HOW", help="Weights wait on the CPU: model (by network) or sequential (by layer)."
    ),
]


def sample(
    model: Model,
    n: Count = 16,
    seed: Seed = 0,
    out: Out = None,
    steps: Steps = None,
    guidance: Guidance = None,
    labels: Labels = None,
    prompt: Prompts = None,
    length: Lengths = None,
    file_format: Format = None,
    noise_scale: NoiseScale = None,
    cath: Folds = None,
    attention: Attention = None,
    offload: Offload = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Draw images or videos from a model folder into one picture, or protein chains into a folder."""
    from ..exporting.network import makes_videos, takes_lengths
    from ..exporting.pipeline import load_pipeline

    of_images = {"--labels": labels, "--prompt": prompt}
    of_chains = {"--length": length, "--format": file_format, "--noise-scale": noise_scale, "--cath": cath}
    with only_json(json):
        pipeline = load_pipeline(model, trust_remote_code, attention=attention, offload=offload)
        if takes_lengths(pipeline):
            _leave_out(of_images, "makes protein chains")
            asked: dict[str, Any] = {"steps": steps, "guidance": guidance, "noise_scale": noise_scale}
            asked["cath"] = None if cath is None else _fold(model, cath)
            found = _chains(pipeline, n, seed, out or Path("chains"), length, file_format or "pdb", **asked)
        else:
            _leave_out(of_chains, "makes images")
            asked = {"steps": steps, "guidance": guidance, "prompts": prompt}
            usual = Path("grid.gif" if makes_videos(pipeline) else "grid.png")
            found = _images(pipeline, n, seed, out or usual, labels, **asked)
    shown = {name: number(value) if isinstance(value, int | float) else _short(value) for name, value in found.items()}
    answer(found, json, lambda: say(**shown))


def hint(model: Path) -> str:
    """How the model in a folder is sampled."""
    from ..models.folder import card

    return f"fewstep sample {model} -n 16 --out {'chains' if 'lengths' in card(model) else 'grid.png'}"


def _images(pipeline: Any, n: int, seed: int, out: Path, labels: str | None, **asked: Any) -> dict[str, Any]:
    from ..engine.preview import save_grid
    from ..exporting.pipeline import generate

    classes = [c for c, _ in zip(cycle(numbers(labels, "--labels")), range(n))] if labels is not None else None
    made = generate(pipeline, n, seed, classes, **asked)
    file = save_grid(made.images, out, columns=ceil(sqrt(n)))
    steps = len(made.timesteps)
    return {"file": str(file), "n": n, "steps": steps, "nfe": made.nfe, "ms_per_image": made.ms_per_image}


def _chains(
    pipeline: Any,
    n: int,
    seed: int,
    out: Path,
    length: list[str] | None,
    file_format: str,
    **asked: Any,
) -> dict[str, Any]:
    from ..exporting.chains import check_format, generate_chains, save_chains, usual_length

    check_format(file_format)
    lengths = [size for said in length or () for size in numbers(said, "--length")] or [usual_length(pipeline)]
    made = generate_chains(pipeline, n, seed, lengths, **asked)
    files = save_chains(made, out, file_format)
    return {
        "files": [str(file) for file in files],
        "n": n,
        "lengths": sorted(set(made.lengths)),
        "noise_scale": made.noise_scale,
        "steps": len(made.timesteps),
        "nfe": made.nfe,
        "ms_per_chain": made.ms_per_chain,
    }


def _fold(model: Path, cath: str) -> list[int]:
    """Labels of "C,A,T", or of a code such as 3.40.50 for a model that says the codes it was trained with."""
    from ..data.folds import Folds
    from ..models.folder import card

    known = card(model).get("folds")
    if "," in cath:
        return numbers(cath, "--cath")
    if known is None:
        raise UserError(f"--cath={cath}: this model names no CATH codes, so write its labels, e.g. 1,2,5")
    return list(Folds(known).label(cath))


def _short(value: Any) -> str:
    """Text as it is; of a list its ends, and of a long list no more."""
    if isinstance(value, str) or not value:
        return str(value)
    return f"{value[0]} .. {value[-1]}" if len(value) > 3 else ", ".join(map(str, value))


def _leave_out(options: dict[str, Any], why: str) -> None:
    """UserError for an option of the other sort of model."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"this model {why}: leave {given[0]} out")
