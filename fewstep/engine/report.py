"""One HTML file that tells a run: scores, samples, curves, recipe. It holds all it shows.

It runs no script of its own; pages among the previews run theirs in frames that see nothing else.
"""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..methods.base import Paper
from ..methods.registry import METHODS
from ..models.folder import card
from .checkpoint import steps
from .curves import Line, curves, score_curve, stage_starts
from .tracking import read_metrics

MOST_PREVIEWS = 8
WIDEST = 1400  # pixels; larger pictures are shown smaller, so that the file stays one that can be mailed
PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "accelerate")
COLUMNS = {
    "who": "",
    "steps": "steps",
    "nfe": "NFE",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "ms_per_image": "ms / image",
    "n": "n",
    "features": "features",
}
COUNTS = {"steps", "nfe", "n"}


@dataclass(frozen=True)
class Picture:
    """A caption and the picture itself as a data URI."""

    caption: str
    uri: str


@dataclass(frozen=True)
class Scores:
    """A table in words; `curve` is an SVG or None."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    curve: str | None


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes `folder/report.html` (or the file `out`) of a run folder and returns its path; `fewstep report RUN`.

    Shown is what there is: recipe.yaml, metrics.jsonl, previews/, *.png, scores.json (`{"rows": [...]}`) and model/.
    Raises UserError when `folder` is no run folder.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"'{folder}' is no run folder: it has no recipe.yaml")
    target = Path(out) if out is not None else folder / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.part")
    aside.write_text(_render(_page(folder)), encoding="utf-8")
    os.replace(aside, target)
    return target


def _render(page: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    rooms = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return rooms.get_template("report.html.jinja").render(page)


def _page(folder: Path) -> dict[str, Any]:
    recipe = (folder / "recipe.yaml").read_text()
    method = str((yaml.safe_load(recipe) or {}).get("method", "unknown"))
    lines = read_metrics(folder / "metrics.jsonl")
    return {
        "title": folder.resolve().name,
        "method": method,
        "paper": _paper(method),
        "facts": _facts(folder, lines),
        "scores": _scores(folder / "scores.json"),
        "grids": [_picture(file, file.stem.replace("_", " ")) for file in sorted(folder.glob("*.png"))],
        "previews": _previews(folder / "previews"),
        "view": _view(folder / "previews"),
        "curves": curves(lines),
        "warnings": [(line["step"], line["warning"]) for line in lines if "warning" in line],
        "usage": usage(folder / "model"),
        "recipe": recipe,
        "environment": environment(folder / "model"),
    }


def _paper(method: str) -> tuple[Paper, str] | None:
    """The paper and its address."""
    paper = METHODS.get(method).paper if method in METHODS else None
    if paper is None:
        return None
    number = re.sub(r"(?i)^(arxiv|doi)[: ]*", "", paper.id)
    return paper, f"https://doi.org/{number}" if number.startswith("10.") else f"https://arxiv.org/abs/{number}"


def _facts(folder: Path, lines: Sequence[Line]) -> dict[str, str]:
    facts = {}
    if lines:
        facts["steps"] = f"{lines[-1]['step']:,}"
        facts["stages"] = ", ".join(name for _, name in stage_starts(lines))
        facts["training time"] = _duration(seconds(lines))
    saved = steps(folder / "checkpoints")
    if saved:
        facts["checkpoints"] = ", ".join(f"step {step:,}" for step in saved)
    return {name: fact for name, fact in facts.items() if fact}


def seconds(lines: Sequence[Line]) -> float:
    """Training time of all lines; each resumed run starts its own clock at 0."""
    times = [line["time"] for line in lines if "time" in line]
    ends = [now for now, after in pairwise(times) if after < now]
    return sum(ends) + (times[-1] if times else 0.0)


def _duration(span: float) -> str:
    hours, minutes = int(span // 3600), int(span % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {span % 60:.0f} s" if minutes else f"{span:.1f} s"


def spread(files: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of the files, evenly spaced, the first and the last among them."""
    if len(files) <= most:
        return list(files)
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]


def _previews(folder: Path) -> dict[str, list[Picture]]:
    """heading -> pictures over training: the samples, and what each folder of further pictures holds."""
    further = {f.name.replace("-", " "): f for f in sorted(folder.glob("*")) if f.is_dir()}
    shown = {heading: sorted(f.glob("*.png")) for heading, f in {"Previews while training": folder, **further}.items()}
    return {
        heading: [_picture(file, _step(file)) for file in spread(files, MOST_PREVIEWS)]
        for heading, files in shown.items()
        if files
    }


def _view(folder: Path) -> tuple[str, str] | None:
    """The last page among the previews, with its caption."""
    pages = sorted(folder.glob("*.html"))
    return (_step(pages[-1]), pages[-1].read_text(encoding="utf-8")) if pages else None


def _step(file: Path) -> str:
    digits = re.search(r"\d+", file.stem)
    return f"step {int(digits.group()):,}" if digits else file.stem


def _picture(file: Path, caption: str) -> Picture:
    from PIL import Image

    data = file.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        if image.width > WIDEST:
            smaller, written = image.resize((WIDEST, round(image.height * WIDEST / image.width))), io.BytesIO()
            smaller.save(written, format="PNG")
            data = written.getvalue()
    return Picture(caption, "data:image/png;base64," + base64.b64encode(data).decode())


def _scores(file: Path) -> Scores | None:
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    if not rows:
        return None
    spaces = {row.get("features") for row in rows}
    # a distance is named with its feature space; a column of its own is needed only where rows differ in it
    fid = f"fid[{spaces.pop()}]" if len(spaces) == 1 else "fid"
    hidden = {"features"} if fid != "fid" else set()
    shown = [key for key in COLUMNS if key not in hidden and any(row.get(key) is not None for row in rows)]
    words = [[_word(key, row.get(key)) for key in shown] for row in rows]
    return Scores([{**COLUMNS, "fid": fid}[key] for key in shown], words, score_curve(rows, "fid", fid))


def _word(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:,g}" if key in COUNTS else f"{value:#.3g}".rstrip(".")


def usage(model: Path) -> str | None:
    """The lines that load the exported folder: those of its own model card, else fewstep's; None without a model."""
    if not model.is_dir():
        return None
    readme = model / "README.md"
    code = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL) if readme.is_file() else None
    if code is not None:
        return code.group(1).strip().replace('"FOLDER"', f'"{model}"')
    return f'from fewstep.models.folder import open_model\n\nnetwork = open_model("{model}").module'


def environment(model: Path) -> dict[str, str]:
    """What the model was written with, as its fewstep.json says, and what is installed here."""
    said = card(model)
    installed = {name: found for name in PACKAGES if (found := _version(name)) is not None}
    made = {"model written": str(said["created"])} if "created" in said else {}
    return {
        **made,
        **installed,
        **said.get("versions", {}),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
