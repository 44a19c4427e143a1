"""`fewstep convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import answer, only_json, say
from .arguments import Json
from .export import To
from .sample import hint

Weights = Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file with the names of Proteina's code.")]
Distilled = Annotated[
    int | None, typer.Option("--steps", min=1, help="The network is distilled for so many steps; default: a teacher.")
]
Noise = Annotated[float, typer.Option("--noise-scale", min=0.0, help="Factor of the sampler's noise.")]
Prefix = Annotated[str | None, typer.Option("--prefix", help="Of its names, where a file holds several networks.")]
Order = Annotated[
    str | None, typer.Option("--order", help="Of its features, e.g. index,x_self,broken; default: as released.")
]


def convert(
    file: Weights,
    to: To,
    steps: Distilled = None,
    noise_scale: Noise = 0.45,
    prefix: Prefix = None,
    order: Order = None,
    json: Json = None,
) -> None:
    """Write released Proteina weights as a model folder."""
    from ..exporting.conversion import convert_proteina

    with only_json(json):
        features = None if order is None else order.split(",")
        folder = convert_proteina(file, to, steps, noise_scale, prefix, features)
    answer({"model": str(folder)}, json, lambda: say(model=folder, sample=hint(folder)))
