"""Teacher and student of protein backbones side by side: validity, geometry, diversity, seconds.

    python tests/benchmarks/protein_table.py TEACHER STUDENT [--n 200] [--length 40,48,56,64]

TEACHER, STUDENT: exported folders. Prints the table of configs/sid_protein/README.md. Seconds are the sampler's own, a
hundred chains, in the order in which the rows are printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.data.chains import shipped
from fewstep.evaluation.protein.scores import score_chains
from fewstep.exporting.chains import generate_chains
from fewstep.exporting.pipeline import load_pipeline

SHOWN = ("valid", "bonded", "bond_error", "clashes", "helix", "strand", "left_handed", "diversity", "folds", "novelty")
TEACHER_STEPS, STUDENT_STEPS, SCALES = (400, 100, 16), (16, 8, 4, 1), (1.0, 0.45)


def main(
    teacher: Path,
    student: Path,
    n: Annotated[int, typer.Option(help="Chains a row.")] = 200,
    length: Annotated[str, typer.Option(help="Lengths, in turn.")] = "40,48,56,64",
    sweep: Annotated[bool, typer.Option(help="Noise scales of the student instead.")] = False,
) -> None:
    """Prints one Markdown row a setting."""
    lengths = [int(part) for part in length.split(",")]
    real = [chain.x for chain in shipped() if lengths[0] <= len(chain.x) <= lengths[-1]]
    print("| model | steps | noise scale |", " | ".join(SHOWN), "| s / 100 |")
    print("|" + " --- |" * (len(SHOWN) + 4))
    _row("real chains", "", "", score_chains(real[:n]), float("nan"))
    scales = (1.0, 0.8, 0.6, 0.45, 0.3, 0.0)
    runs = [(student, 16, scale) for scale in scales]
    if not sweep:
        runs = [(teacher, steps, scale) for steps in TEACHER_STEPS for scale in SCALES]
        runs += [(student, steps, scale) for steps in STUDENT_STEPS for scale in SCALES]
    pipelines = {folder: load_pipeline(folder, device="cpu") for folder in (teacher, student)}
    for folder, steps, scale in runs:
        made = generate_chains(pipelines[folder], n, lengths=lengths, steps=steps, noise_scale=scale)
        name = "teacher" if folder == teacher else "student"
        _row(name, steps, scale, score_chains(made.chains, real), made.ms_per_chain / 10)


def _row(name: str, steps: object, scale: object, values: dict[str, float], seconds: float) -> None:
    values = {**values, "bond_error": abs(values["bond"] - 3.8)}
    numbers = " | ".join(f"{values[key]:.3f}" if key in values else "" for key in SHOWN)
    print(f"| {name} | {steps} | {scale} | {numbers} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
