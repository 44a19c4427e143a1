"""Curves of a metrics.jsonl as small SVG pictures. Their ink is the page's, so that they suit light and dark."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from .levels import KEY, Points, by_level

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = Mapping[str, Any]

NOT_CURVES = {"step", "time", "stage", "warning", "validation_seconds"}
TOGETHER = {"loss": "Losses", "grad_norm": "Gradient norms"}  # one plot for the group; other numbers get one each
INK = "#0b0c0d"  # stands for the page's own text colour, see `_svg`
COLOURS = ("#3b82c4", "#e07b39", "#3f9d63", "#c2527e", "#8a6fd1", "#b59a2a", "#4aa6a6", "#8d8d8d")
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
STYLE: Any = {  # newer matplotlib types its keys
    **dict.fromkeys(INKED, INK),
    "font.size": 8,
    "legend.fontsize": 7.5,
    "axes.grid": True,
    "grid.alpha": 0.12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "fewstep",  # equal numbers, equal file
}
WIDE_RANGE = 20  # positive values over a wider range go on a logarithmic axis
MOST_POINTS = 300


@dataclass(frozen=True)
class Curve:
    """A picture with its title; `svg` is markup to put into a page."""

    title: str
    svg: str


def curves(lines: Sequence[Line]) -> list[Curve]:
    """One plot for all losses, one for all gradient norms, one for each other number; stage boundaries are marked.

    Losses by noise level come after the losses, one plot for each name.
    """
    marks = stage_starts(lines)
    plots = [Curve(_title(group, numbers), _plot(numbers, marks)) for group, numbers in grouped(series(lines)).items()]
    levels = [Curve(f"Loss by noise level: {name}", _level_plot(parts)) for name, parts in by_level(lines).items()]
    return plots[:1] + levels + plots[1:]


def _title(group: str, numbers: Mapping[str, Points]) -> str:
    """A lone series of a group has no legend, so the title names it."""
    return f"{group}: {next(iter(numbers))}" if group in TOGETHER.values() and len(numbers) == 1 else group


def series(lines: Iterable[Line]) -> dict[str, Points]:
    """name -> [(step, value)] of every logged number; infinite values, NaN and single noise levels are left out."""
    found: dict[str, Points] = {}
    for line in lines:
        for name, value in line.items():
            if name in NOT_CURVES or KEY.fullmatch(name) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                found.setdefault(name, []).append((line["step"], value))
    return found


def grouped(found: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """title -> series of one plot: losses, gradient norms, then validation and the other numbers."""
    groups: dict[str, dict[str, Points]] = {title: {} for title in TOGETHER.values()}
    for name, points in sorted(found.items(), key=lambda item: not item[0].startswith("validation.")):
        head, _, rest = name.partition(".")
        groups.setdefault(TOGETHER.get(head, name.replace(".", ": ", 1)), {})[rest or name] = points
    return {title: numbers for title, numbers in groups.items() if numbers}


def stage_starts(lines: Iterable[Line]) -> list[tuple[float, str]]:
    """[(step, stage)]: where each stage begins, which is the last logged step of the one before."""
    marks: list[tuple[float, str]] = []
    before = 0
    for line in lines:
        if "stage" in line and (not marks or marks[-1][1] != line["stage"]):
            marks.append((before, str(line["stage"])))
        before = line["step"]
    return marks


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: means over neighbours, so that a long run's file stays small."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in buckets]


def score_curve(rows: Sequence[Line], value: str = "fid", label: str = "fid") -> str | None:
    """`value` against network evaluations, a line for each `who`; None when fewer than two rows have both."""
    known = [r for r in rows if _positive(r.get(value)) and _positive(r.get("nfe"))]
    if len(known) < 2:
        return None
    lines = {
        who: sorted((r["nfe"], r[value]) for r in known if r.get("who") == who) for who in (r.get("who") for r in known)
    }

    def draw(axes: Axes) -> None:
        for (who, points), colour in zip(lines.items(), cycle(COLOURS)):
            axes.plot(*zip(*points), marker="o", markersize=4, color=colour, label=str(who))
        axes.set(xscale="log", yscale="log", xlabel="network evaluations an image", ylabel=label)
        ticks = sorted({r["nfe"] for r in known})
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.tick_params(axis="x", which="minor", length=0, labelbottom=False)
        axes.legend(frameon=False)

    return _svg(draw, width=9.2)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _plot(numbers: Mapping[str, Points], marks: Sequence[tuple[float, str]]) -> str:
    def draw(axes: Axes) -> None:
        for (name, points), colour in zip(numbers.items(), cycle(COLOURS)):
            style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) < 15 else {}
            axes.plot(*zip(*thinned(points)), color=colour, label=name, linewidth=1.3, **style)
        _scale(axes, numbers)
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        _mark(axes, marks)
        if len(numbers) > 1:
            axes.legend(frameon=False, ncols=2 if len(numbers) > 3 else 1)

    return _svg(draw)


def _level_plot(parts: Mapping[str, Points]) -> str:
    """A line for each part of training; the latest is the strongest."""

    def draw(axes: Axes) -> None:
        for i, (part, points) in enumerate(parts.items()):
            strength = (i + 1) / len(parts)
            axes.plot(*zip(*points), marker="o", markersize=3, color=COLOURS[0], alpha=strength, label=part)
        _scale(axes, parts)
        axes.set(xlabel="flow time t (1 is noise)", xlim=(0, 1))
        axes.legend(frameon=False)

    return _svg(draw)


def _scale(axes: Axes, numbers: Mapping[str, Points]) -> None:
    """A logarithmic axis for positive values over a wide range."""
    values = [y for points in numbers.values() for _, y in points]
    if min(values) > 0 and max(values) > WIDE_RANGE * min(values):
        axes.set_yscale("log")


def _mark(axes: Axes, marks: Sequence[tuple[float, str]]) -> None:
    """A dashed line and a name where a stage begins; a run of one stage needs none."""
    for step, name in marks if len(marks) > 1 else ():
        if step > 0:
            axes.axvline(step, color=INK, alpha=0.4, linewidth=0.8, linestyle=(0, (4, 3)))
        above = axes.get_xaxis_transform()
        axes.annotate(name, (step, 1.02), xycoords=above, fontsize=7, alpha=0.75, annotation_clip=False)


def _svg(draw: Callable[[Axes], None], width: float = 4.7) -> str:
    """The markup of one picture, 2.5 inches high."""
    import matplotlib
    from matplotlib.figure import Figure

    written = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 2.5), layout="constrained")
        draw(figure.subplots())
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    markup = written.getvalue()
    return markup[markup.index("<svg") :].replace(INK, "currentColor")
