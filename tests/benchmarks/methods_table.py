"""Methods side by side on the shipped digits teacher, each by its own recipe, scored alike.

    python tests/benchmarks/methods_table.py consistency [--steps 600] [--seeds 1] [--only scott] [--out runs/consistency]
    python tests/benchmarks/methods_table.py one_step        # few_steps: one student for 1, 2 and 4
    python tests/benchmarks/methods_table.py mismatch        # students on data that the teacher was not trained on
    python tests/benchmarks/methods_table.py any_step        # one checkpoint for 1 to 50 steps

Each row trains in a process of its own, exports, and is scored at 1, 2, 4, 8 and 50 steps as far as it offers them: fid,
precision, recall, diversity (mean feature distance within a class), reward (log-probability of the asked class) and
high_frequency (1 = as in real images), ms an image, with the seconds of training a thousand steps and the process's peak memory.
Rows are appended to OUT/table.jsonl, so a stopped run goes on where it was; `--show` prints what is there. Speeds mean
something on a quiet machine only: `--steps 60` is enough for them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewstep.data.images import to_uint8
from fewstep.data.registry import make_source
from fewstep.engine.trainer import train
from fewstep.evaluation.evaluate import evaluate
from fewstep.models.folder import card
from fewstep.recipe import load_recipe
from fewstep.resources import asset, config

METRICS = ("fid", "prdc", "diversity", "reward", "high_frequency")
COLUMNS = ("fid", "precision", "recall", "diversity", "reward", "high_frequency")
STEPS = (1, 2, 4, 8, 50)
TIMES = "beta x "  # in a row's name: its reward weighs so many times what the recipe says
PLAIN = ("config.adversarial=null",)
FROM_TEACHER = ("student.build={}", "student.from=shipped:teachers/digits")
RCGM = ("config.weights={adversarial: 0, rectification: 0}",)  # TwinFlow without its twin
Rows = dict[str, tuple[str, tuple[str, ...]]]
TABLES: dict[str, Rows] = {
    "consistency": {
        "LCM": ("lcm/digits", ()),
        "CM": ("consistency/digits", ()),
        "PCM, 4 phases": ("pcm/digits", ()),
        "SCott eta 0": ("scott/digits", ("config.eta=0", *PLAIN)),
        "SCott eta 0.3": ("scott/digits", ("config.eta=0.3", *PLAIN)),
        "SCott eta 1": ("scott/digits", ("config.eta=1", *PLAIN)),
        "SCott eta 0, adversarial": ("scott/digits", ("config.eta=0",)),
        "SCott eta 0.3, adversarial": ("scott/digits", ("config.eta=0.3",)),
        "SCott eta 1, adversarial": ("scott/digits", ("config.eta=1",)),
        "RG-LCD beta 0": ("rg_lcd/digits", ("config.weights.reward=0",)),
        "RG-LCD direct": ("rg_lcd/digits", ()),
        "RG-LCD direct, beta x 20": ("rg_lcd/digits", ()),
        "RG-LCD direct, reward-free target, beta x 20": ("rg_lcd/digits", ("config.clean_target=true",)),
        "RG-LCD proxy": ("rg_lcd/digits_proxy", ()),
        "RG-LCD proxy, beta x 20": ("rg_lcd/digits_proxy", ()),
    },
    "one_step": {
        "Decoupled DMD": ("decoupled_dmd/digits", ("config.steps=1", "config.fake_per_level=false")),
        "DMD2": ("dmd2/digits", ()),
        "SiD": ("sid/digits", ()),
        "SiDA": ("sid/digits", ("config.adversarial=true", "data.train={source: digits}")),
        "FreeFlow": ("freeflow/digits", ()),
        "FreeFlow, 400 updates": ("freeflow/digits", ("train.steps=400",)),
        # as long as Decoupled DMD and DMD2 take, 290 s of one thread where this was written
        "SiD, equal time": ("sid/digits", ("train.steps=1030",)),
        "FreeFlow, equal time": ("freeflow/digits", ("train.steps=1290",)),
    },
    "few_steps": {
        "Decoupled DMD": ("decoupled_dmd/digits", ()),
        "DMD2": ("dmd2/digits", ("config.steps=[1,2,4]",)),
        "SiD": ("sid/digits", ("config.steps=[1,2,4]",)),
    },
    "any_step": {
        # the common measure of cost: the same network, data and number of rows
        "Flow matching": ("flow_matching/digits", (*FROM_TEACHER, "train.batch=64", "train.steps=600")),
        "MeanFlow": ("meanflow/digits", ()),
        "MeanFlow, jvp": ("meanflow/digits", ("config.derivative=jvp",)),
        "Shortcut": ("shortcut/digits", ()),
        "sCM": ("scm/digits", ()),
        "RCGM": ("twinflow/digits", RCGM),
        "TwinFlow": ("twinflow/digits", ()),
        "RCGM, LoRA": ("twinflow/digits_lora", RCGM),
        "TwinFlow, LoRA": ("twinflow/digits_lora", ()),
        "Self-E": ("self_e/digits", ()),
        "Self-E, classifier direction alone": ("self_e/digits", ("config.full_from=1000000",)),
        "Self-E, from scratch": ("self_e/digits_scratch", ()),
    },
    "mismatch": {
        "LCM, the teacher's data": ("lcm/digits", ()),
        "LCM, data rolled by 1 pixel": (
            "lcm/digits",
            ("data.train={source: image_folder, path: ROLLED1, size: 8, channels: 1}",),
        ),
        "LCM, data rolled by 3 pixels": (
            "lcm/digits",
            ("data.train={source: image_folder, path: ROLLED3, size: 8, channels: 1}",),
        ),
        "FreeFlow, no data": ("freeflow/digits", ()),
    },
}


def rolled(out: Path, pixels: int) -> Path:
    """A folder of class folders with the real digits moved to the right, what leaves coming in again on the left."""
    folder = out / f"rolled-{pixels}"
    digits = make_source({"source": "digits"})
    rows = digits.fetch(torch.arange(len(digits)), None)
    for i, (image, label) in enumerate(
        zip(to_uint8(rows["x0"].roll(pixels, -1))[:, 0], rows["cond"]["label"].tolist())
    ):
        file = folder / str(label) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(file)
    return folder


def overrides_of(table: str, name: str, out: Path) -> tuple[Path, tuple[str, ...]]:
    """The recipe file of a row, and its overrides."""
    recipe, overrides = TABLES[table][name]
    file = config(f"{recipe}.yaml")
    for pixels in (1, 3):
        if any(f"ROLLED{pixels}" in said for said in overrides):
            overrides = tuple(said.replace(f"ROLLED{pixels}", str(rolled(out, pixels))) for said in overrides)
    if TIMES in name:
        beta = load_recipe(file).build_method().config.weights["reward"]
        overrides = (*overrides, f"config.weights.reward={float(name.split(TIMES)[1]) * beta}")
    return file, overrides


def scored(model: Path, steps: int) -> dict[str, float]:
    """The columns of a model folder at so many steps."""
    scores = evaluate(model, METRICS, features="digits-cnn", reference="digits", reward="classifier", steps=steps)
    return {
        "steps": steps,
        "nfe": scores["nfe"],
        "ms": scores["ms_per_image"],
        **{key: scores["values"][key] for key in COLUMNS},
    }


def rows_of(table: str, name: str, steps: int | None, seed: int, out: Path) -> Iterator[dict[str, Any]]:
    """Trains one row and scores it at each number of steps that it offers."""
    if name == "teacher":
        yield from ({"row": name, "seed": 0, **scored(asset("teachers/digits"), n)} for n in reversed(STEPS))
        return
    file, overrides = overrides_of(table, name, out)
    folder = out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    settings = (f"train.seed={seed}", "preview=null", "train.check_export=false")
    length = () if steps is None else (f"train.steps={steps}",)
    began = time.monotonic()
    run = train(file, folder, (*overrides, *settings, *length), show=False)
    seconds, speed = time.monotonic() - began, per_1000(folder / "metrics.jsonl")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    facts = {"seconds": seconds, "per_1000": speed, "updates": run.steps, "peak_mb": memory}
    offered = [n for n in STEPS if n in card(run.model)["steps"]]
    yield from ({"row": name, "seed": seed, **facts, **scored(run.model, n)} for n in offered)


def per_1000(metrics: Path) -> float:
    """Seconds a thousand steps, between the first and the last logged step: nothing of the start and of the export."""
    logged = [line for line in read(metrics) if "time" in line and "step" in line]
    first, last = logged[0], logged[-1]
    return 1000 * (last["time"] - first["time"]) / (last["step"] - first["step"])


def read(file: Path) -> list[dict[str, Any]]:
    """What is measured so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def shown(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line a row and number of steps, means over seeds."""
    columns = (*COLUMNS, "ms", "per_1000", "peak_mb")
    lines = [f"| method | NFE | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for name, steps in dict.fromkeys((r["row"], r["steps"]) for r in rows):
        group = [r for r in rows if (r["row"], r["steps"]) == (name, steps)]
        means = [sum(r[c] for r in group) / len(group) if c in group[0] else None for c in columns]
        numbers = ["" if m is None else f"{m:.4f}" if abs(m) < 10 else f"{m:.0f}" for m in means]
        lines.append(f"| {name} | {group[0]['nfe']:g} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, a process a row, and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--steps", type=int, help="in place of each recipe's own length")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a row's name")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--row", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    said = parser.parse_args()
    out = said.out or Path("runs") / said.table
    out.mkdir(parents=True, exist_ok=True)
    file = out / "table.jsonl"
    if said.row:
        new = list(rows_of(said.table, said.row[0], said.steps, int(said.row[1]), out))
        with file.open("a") as log:
            log.writelines(json.dumps(row) + "\n" for row in new)
        return
    names = [name for name in ("teacher", *TABLES[said.table]) if said.only.lower() in name.lower()]
    for name, seed in [(n, s) for n in names for s in range(1 if n == "teacher" else said.seeds)]:
        if said.show or any((r["row"], r["seed"]) == (name, seed) for r in read(file)):
            continue
        length = [] if said.steps is None else ["--steps", str(said.steps)]
        here = [sys.executable, __file__, said.table, "--out", str(out), *length]
        subprocess.run([*here, "--row", name, str(seed)], check=True)
        print(shown([r for r in read(file) if (r["row"], r["seed"]) == (name, seed)]), flush=True)
    print(shown(read(file)))


if __name__ == "__main__":
    main()
