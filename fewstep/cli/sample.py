"""`fewstep sample`."""

from __future__ import annotations

from itertools import cycle
from math import ceil, sqrt
from pathlib import Path
from typing import Annotated

import typer

from .answers import answer, number, only_json, say
from .arguments import Guidance, Json, Model, Seed, Steps, Trust, numbers

Count = Annotated[int, typer.Option("--n", "-n", min=1, help="Number of images.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="Picture to write, with all images in a grid.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="What a text-to-image model draws; may be repeated."),
]
Labels = Annotated[str | None, typer.Option("--labels", metavar="0,1,2", help="Classes, repeated until there are n.")]


def sample(
    model: Model,
    n: Count = 16,
    seed: Seed = 0,
    out: Out = Path("grid.png"),
    steps: Steps = None,
    guidance: Guidance = None,
    labels: Labels = None,
    prompt: Prompts = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Draw images from a model folder into one picture."""
    from ..engine.preview import save_grid
    from ..exporting.pipeline import generate

    asked = [c for c, _ in zip(cycle(numbers(labels, "--labels")), range(n))] if labels is not None else None
    with only_json(json):
        made = generate(model, n, seed, asked, steps, guidance, trust_remote_code=trust_remote_code, prompts=prompt)
        file = save_grid(made.images, out, columns=ceil(sqrt(n)))
    counts = {"n": n, "steps": len(made.timesteps), "nfe": made.nfe, "ms_per_image": made.ms_per_image}
    shown = {name: number(count) for name, count in counts.items()}
    answer({"file": str(file), **counts}, json, lambda: say(file=file, **shown))
