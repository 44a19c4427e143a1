"""One HTML file with chains to turn by hand. It holds all it shows and asks nothing of the network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..manifest import Score
from .files import Made
from .geometry import Coords
from .pictures import STRUCTURE, angle_plane, colours, principal, structure_letters
from .scores import spread

MOST_SHOWN = 24  # chains of a page


def view(chains: Sequence[Coords], names: Sequence[str]) -> str:
    """A page of chains [residues, 3] in Angstrom that turn when one is dragged; those that are not finite left out."""
    return _render("chains", chains, names, (), ())


def write_page(file: Path, made: Made, scores: Sequence[Score], reference: Sequence[Coords] | None = None) -> Path:
    """Writes scores, the plane of CA angles (the reference as contours) and at most 24 of the chains."""
    shown = spread(
        list(zip(made.chains, (f"{n} · {len(x)} residues" for n, x in zip(made.names, made.chains)))), MOST_SHOWN
    )
    caption = "contours: half and nine tenths of the reference" if reference is not None else "all chains"
    pictures = [(caption, data_uri(angle_plane(made.chains, reference)))]
    numbers = [(s.protocol.metric.replace("_", " "), _word(s.value)) for s in scores]
    title = f"{len(made.chains)} chains of {made.lengths} residues"
    file.write_text(_render(title, [x for x, _ in shown], [n for _, n in shown], numbers, pictures), encoding="utf-8")
    return file


def data_uri(picture: Image.Image) -> str:
    """A picture as the text of a PNG file."""
    written = io.BytesIO()
    picture.save(written, format="PNG")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def _render(title: str, chains: Sequence[Coords], names: Sequence[str], scores: Any, pictures: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    finite = [(x, name) for x, name in zip(chains, names) if np.isfinite(x).all() and len(x) > 1]
    said = {
        "title": title,
        "chains": [_drawn(x, name) for x, name in finite],
        "scores": scores,
        "pictures": pictures,
        "colours": STRUCTURE,
        "structured": any(structure_letters(x) for x, _ in finite),
    }
    rooms = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return rooms.get_template("view.html.jinja").render(said)


def _drawn(x: Coords, name: str) -> Mapping[str, Any]:
    """What the script reads: places in tenths of an Angstrom, a colour a residue."""
    return {"name": name, "x": np.round(principal(x), 1).tolist(), "colours": colours(x)}


def _word(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
