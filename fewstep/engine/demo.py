"""`fewstep demo`: a teacher on real digits, a few-step student of it, a reload by plain diffusers, and the table."""

from __future__ import annotations

import json as json_format
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..evaluation.evaluate import Reference, load_reference, score
from ..exporting.pipeline import generate, load_pipeline
from ..resources import config
from .preview import grid
from .progress import bar
from .report import report
from .trainer import train

FEATURES = "digits-cnn"
PLAN = (("teacher", (50, 8, 4, 2, 1)), ("student", (4, 2, 1)))
METRICS = ("fid", "prdc", "accuracy")


def demo(
    out: str | Path = "runs/demo",
    json: str | Path | None = None,
    tune: str | None = None,
    overrides: Sequence[str] = (),
    show: bool = True,
) -> dict[str, Any]:
    """Runs the whole path once and returns `{"rows": [...], "seconds", "model"}`; a row for each model and step count.

    out: run folder of the student, with the teacher's run in `out/teacher`. json: file that gets the returned table.
    tune: "full" trains whole copies in place of two adapters on one base. overrides: more `a.b=c` for the student.
    """
    folder, started = Path(out), time.monotonic()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty: remove it, or choose another --out")
    if json is not None:
        Path(json).parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=not show)
    console.print("[bold]1/4[/bold] a flow teacher on 1,797 real digits")
    teacher = _trained("flow_matching/digits.yaml", folder / "teacher", (), show)
    console.print("[bold]2/4[/bold] one student for 1, 2 and 4 steps, by Decoupled DMD on one copy of the weights")
    said = [
        f"teacher.from={teacher}",
        *([f"student.tune={tune}", f"fake_score.tune={tune}"] if tune else []),
        *overrides,
    ]
    student = _trained("decoupled_dmd/digits.yaml", folder, said, show)
    console.print("[bold]3/4[/bold] teacher and student scored, network calls counted")
    reference = load_reference("digits")
    assert reference is not None
    rows = _rows({"teacher": teacher, "student": student}, reference, show)
    console.print("[bold]4/4[/bold] grid and report")
    _side_by_side(teacher, student, folder / "grid.png")
    result = {"rows": rows, "seconds": round(time.monotonic() - started, 1), "model": str(student)}
    (folder / "scores.json").write_text(json_format.dumps(result, indent=1) + "\n")
    if json is not None:
        Path(json).write_text(json_format.dumps(result, indent=1) + "\n")
    report(folder)
    if show:
        Console().print(table(rows))
        console.print(
            f"{result['seconds']:.0f} s. Open {folder / 'report.html'}; sample with: fewstep sample {student} -n 16 --out grid.png"
        )
    return result


def _trained(recipe: str, folder: Path, overrides: Sequence[str], show: bool) -> Path:
    """Trains and exports; the export is proved in a fresh process that has only diffusers."""
    run = train(config(recipe), folder, overrides, show=show)
    assert run.model is not None
    return run.model


def _rows(models: dict[str, Path], reference: Reference, show: bool) -> list[dict[str, Any]]:
    n = reference.count
    rows = []
    with bar("score", sum(len(steps) for _, steps in PLAN), show=show) as progress:
        for who, counts in PLAN:
            pipeline = load_pipeline(models[who])
            for steps in counts:
                made = generate(pipeline, n, seed=1, steps=steps)
                values = score(made.images, made.labels, reference.images, FEATURES, METRICS)
                rows.append(
                    {
                        "who": who,
                        "steps": steps,
                        "nfe": made.nfe,
                        **{name: values[name] for name in ("fid", "precision", "recall", "accuracy")},
                        "features": FEATURES,
                        "n": n,
                        "ms_per_image": made.ms_per_image,
                    }
                )
                progress(1, f"{who} {steps}")
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a table; distances carry the feature network's name and n."""
    first = rows[0]
    shown = Table(title=f"n = {first['n']}, real digits, features {first['features']}")
    for name in ("model", "steps", "NFE", f"fid[{first['features']}]", "precision", "recall", "accuracy", "ms/image"):
        shown.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        shown.add_row(
            row["who"],
            str(row["steps"]),
            f"{row['nfe']:g}",
            f"{row['fid']:.4f}",
            *(f"{row[name]:.3f}" for name in ("precision", "recall", "accuracy")),
            f"{row['ms_per_image']:.2f}",
            end_section=row is not rows[-1] and rows[rows.index(row) + 1]["who"] != row["who"],
        )
    return shown


def _side_by_side(teacher: Path, student: Path, file: Path, columns: int = 10) -> None:
    """Rows from the same noise: teacher at 50, 4, 2, 1 steps, student at 4, 2, 1."""
    from PIL import Image, ImageDraw

    strips = []
    for model, who, counts in ((teacher, "teacher", (50, 4, 2, 1)), (student, "student", (4, 2, 1))):
        pipeline = load_pipeline(model)
        strips += [(f"{who} {n}", grid(generate(pipeline, columns, seed=2, steps=n).images, columns)) for n in counts]
    width, height, margin = strips[0][1].width, strips[0][1].height, 80
    canvas = Image.new("L", (width + margin, (height + 4) * len(strips)), 255)
    pen = ImageDraw.Draw(canvas)
    for i, (label, strip) in enumerate(strips):
        pen.text((4, i * (height + 4) + height // 2 - 6), label, fill=0)
        canvas.paste(strip, (margin, i * (height + 4)))
    canvas.save(file)
