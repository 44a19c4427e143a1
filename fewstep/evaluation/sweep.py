"""Quality against network evaluations: a student at several step counts, and its teacher beside it.

<out>/steps-K, <out>/teacher-steps-K   each run, as `evaluate` writes it
<out>/sweep.json, sweep.png            the table and its picture
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .latency import USUAL, latency
from .manifest import write_text
from .samples import is_pipeline

SWEEP_FILE, PLOT_FILE = "sweep.json", "sweep.png"
COLOURS = {"student": "#1f6f8b", "teacher": "#b3541e"}
Run = Callable[[Path, int, Path | None], Mapping[str, Any]]


def sweep(
    model: str | Path, steps: Sequence[int], run: Run, teacher: str | Path | None = None, out: str | Path | None = None
) -> dict[str, Any]:
    """`{model, teacher, n, rows}` of run(folder, steps, out) for each step count; out gains a folder each.

    A row: `who` (student or teacher), `steps`, `nfe`, `ms` (median latency of one call, after a warm-up), and all values;
    `intervals` of those that have one. UserError when a folder is no model.
    """
    models = {"student": Path(model), **({"teacher": Path(teacher)} if teacher is not None else {})}
    for folder in models.values():
        if not is_pipeline(folder):
            raise UserError(f"'{folder}' is no model: a sweep over steps draws images anew")
    if len(set(steps)) < len(steps):
        raise UserError(f"--steps={','.join(map(str, steps))}: write each number once")
    rows, n = [], None
    for who, folder in models.items():
        for count in steps:
            place = None if out is None else Path(out) / f"{'' if who == 'student' else 'teacher-'}steps-{count}"
            found = run(folder, count, place)
            if found:
                rows.append(_row(who, _timed(folder, count, found)))
                n = found["n"]
    answer = {"model": str(model), "teacher": None if teacher is None else str(teacher), "n": n, "rows": rows}
    if out is not None and rows:
        write_text(Path(out) / SWEEP_FILE, json.dumps(answer, indent=1) + "\n")
        plot(rows, Path(out) / PLOT_FILE)
    return answer


def _timed(folder: Path, steps: int, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the latency of that many steps, where the run has not measured it."""
    if "latency" in found:
        return found
    from ..exporting.network import takes_prompts
    from ..exporting.pipeline import load_pipeline

    pipeline = load_pipeline(folder)
    prompts = ["a photo of a cat"] if takes_prompts(pipeline) else None  # the time does not depend on the words
    return {**found, "latency": latency(pipeline, USUAL, steps, found.get("guidance"), prompts).plain()}


def _row(who: str, found: Mapping[str, Any]) -> dict[str, Any]:
    intervals = {s["metric"]: s["interval"] for s in found["scores"] if "interval" in s}
    told = {
        "who": who,
        "steps": found["steps"],
        "nfe": found["nfe"],
        "ms": found["latency"]["median_ms"],
        **found["values"],
    }
    return {**told, **({"intervals": intervals} if intervals else {})}


def metrics_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The values that rows have, without those of groups."""
    known = {"who", "steps", "nfe", "ms", "intervals"}
    return [key for key in rows[0] if key not in known and not (key.count(".") and key.split(".")[0] in rows[0])]


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """A panel a metric: its value, with its interval where it has one, over NFE on a logarithmic axis; a line a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = metrics_of(rows)
    columns = min(3, len(names))
    figure = Figure(figsize=(3.6 * columns, 2.9 * math.ceil(len(names) / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(math.ceil(len(names) / columns), columns, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names):
        for who in dict.fromkeys(row["who"] for row in rows):
            _line(axes, [row for row in rows if row["who"] == who], name, who)
        nfe = sorted({row["nfe"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(nfe, [f"{x:g}" for x in nfe])
        axes.minorticks_off()
        axes.set(title=name, xlabel="network evaluations an image")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if len({row["who"] for row in rows}) > 1:
        panels[0].legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)
    return file


def _line(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, who: str) -> None:
    rows = sorted(rows, key=lambda row: row["nfe"])
    x, y = [row["nfe"] for row in rows], [row[name] for row in rows]
    ends = [row.get("intervals", {}).get(name) for row in rows]
    axes.plot(x, y, "o-", color=COLOURS[who], label=who, markersize=4)
    if all(ends):
        axes.fill_between(x, [low for low, _ in ends], [high for _, high in ends], color=COLOURS[who], alpha=0.15, lw=0)
