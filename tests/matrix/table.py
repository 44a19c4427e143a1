"""Which recipe runs on which family. The tests hold the code to it, and configs/MATRIX.md shows it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .families import FAMILIES, Family

FILE = Path(__file__).parents[2] / "configs" / "MATRIX.md"
BASE = "BASE"  # in a recipe: the family's pipeline folder
Sort = Literal["stock", "carried"]


@dataclass(frozen=True)
class Row:
    """A recipe, less data and length.

    said: what it says, BASE for the pipeline. student: in words. data_free: it needs prompts alone.
    refused: reason -> families; the reason is what the error says, {name} and {stock} being the family's.
    carried: families of which the folder brings a pipeline of its own.
    """

    method: str
    student: str
    said: Mapping[str, Any]
    data_free: bool = False
    refused: Mapping[str, Collection[str]] = field(default_factory=dict)
    carried: Collection[str] = ()

    @property
    def title(self) -> str:
        """The row's name."""
        return f"{self.method}, {self.student}"

    def reason(self, family: str) -> str | None:
        """Why the recipe is refused; None where it runs."""
        return next((reason for reason, families in self.refused.items() if family in families), None)

    def sort(self, family: str) -> Sort:
        """Whose pipeline the exported folder is sampled by, where the recipe runs."""
        return "carried" if family in self.carried else "stock"

    def cell(self, family: str) -> str:
        """What the table shows: a sort, or the number of a reason."""
        reason = self.reason(family)
        return self.sort(family) if reason is None else f"({REASONS.index(reason) + 1})"


def error(reason: str, family: Family) -> str:
    """The reason as the error of this family says it."""
    return reason.format(name=family.name, stock=family.stock)


SECOND_TIME = "no pipeline tells a {name} student its second time"
NORM = "{stock} does not keep the norm of what it guides"
NO_FEW = "student.tune is lora: such a student is sampled with config.sampler: few"
NO_LAYER = "student.tune is lora, but the network gains an input"
REASONS = (SECOND_TIME, NORM, NO_FEW, NO_LAYER)

TOLD = ("sd3", "sana", "qwen_image")  # families that have a pipeline which tells a second time, for folders to carry
UNTOLD = tuple(name for name in FAMILIES if name not in TOLD)
BY_COUNT = ("sd3", "sana")  # whose stock pipelines hand their scheduler N alone
FULL: dict[str, Any] = {"tune": "full"}
LORA: dict[str, Any] = {"tune": "lora", "lora": {"rank": 2}}
SCOTT = {"steps": [4], "eta_range": [0, 0.98]}  # at t = 1 of a flow path a noisy step would forget its state
RG_LCD = {"steps": [4], "reward": {"linear": {}}}

ROWS = (
    Row(
        "twinflow",
        "all weights, any number of steps",
        {"student": BASE, "config": {"guidance_scale": 2, "steps": 2}},
        refused={SECOND_TIME: UNTOLD},
        carried=TOLD,
    ),
    Row(
        "twinflow",
        "all weights, `sampler: multi`",
        {"student": BASE, "config": {"guidance_scale": 2, "sampler": "multi", "steps": 2}},
        carried=BY_COUNT,
    ),
    Row(
        "twinflow",
        "adapter, `sampler: few`",
        {
            "teacher": BASE,
            "student": LORA,
            "config": {"guidance_scale": 2, "sampler": "few", "steps": 2, "order": 1, "guide": "base"},
        },
    ),
    Row("scott", "all weights, told its guidance", {"teacher": BASE, "config": SCOTT}, carried=BY_COUNT),
    Row(
        "scott",
        "adapter",
        {"teacher": BASE, "student": LORA, "config": {**SCOTT, "embed_guidance": False}},
        carried=BY_COUNT,
    ),
    Row(
        "self_e",
        "all weights, any number of steps, guided",
        {"student": BASE, "config": {"full_from": 0, "steps": 2}},
        refused={SECOND_TIME: UNTOLD},
        carried=TOLD,
    ),
    Row(
        "self_e",
        "all weights, `sampler: multi`, guided",
        {"student": BASE, "config": {"sampler": "multi", "steps": 2}},
        refused={NORM: UNTOLD},
        carried=TOLD,
    ),
    Row(
        "self_e",
        "all weights, `sampler: multi`, unguided",
        {"student": BASE, "config": {"sampler": "multi", "guidance_scale": 1, "steps": 2}},
        carried=BY_COUNT,
    ),
    Row(
        "self_e",
        "adapter",
        {"teacher": BASE, "student": LORA, "config": {"evaluator": "teacher"}},
        refused={NO_FEW: tuple(FAMILIES)},
    ),
    Row("rg_lcd", "all weights, told its guidance", {"teacher": BASE, "config": RG_LCD}, carried=BY_COUNT),
    Row(
        "rg_lcd",
        "adapter",
        {"teacher": BASE, "student": LORA, "config": {**RG_LCD, "guidance_scale": 3}},
        carried=BY_COUNT,
    ),
    Row(
        "decoupled_dmd",
        "all weights",
        {"teacher": BASE, "student": FULL, "fake_score": FULL, "config": {"fake_updates": 1}},
        data_free=True,
    ),
    Row(
        "decoupled_dmd",
        "adapter",
        {"teacher": BASE, "student": LORA, "fake_score": LORA, "config": {"fake_updates": 1}},
        data_free=True,
    ),
    Row("freeflow", "all weights", {"teacher": BASE}, data_free=True),
    Row(
        "freeflow",
        "adapter",
        {"teacher": BASE, "student": LORA},
        data_free=True,
        refused={NO_LAYER: tuple(FAMILIES)},
    ),
    Row(
        "sid",
        "all weights",
        {"teacher": BASE, "student": FULL, "fake_score": FULL, "config": {"guidance_scale": 2}},
        data_free=True,
    ),
    Row(
        "sid", "adapter", {"teacher": BASE, "student": LORA, "fake_score": LORA, "config": {"steps": 2}}, data_free=True
    ),
)

HEAD = """# What runs on what

Written by `python -m tests.matrix` from the table that `make test-slow` runs cell by cell, on tiny random networks of each family's
stock classes with two captioned pictures (SiD, FreeFlow and Decoupled DMD take two prompts where the network says its size). A cell
trains one step, saves, resumes for a second one, exports the folder, loads it with diffusers, and holds two images to the trainer's
own within 1e-3. Nothing here says how good a student is.

- **stock**: plain `DiffusionPipeline.from_pretrained(FOLDER)` runs it.
- **carried**: the folder brings its pipeline, which takes `trust_remote_code=True`, or `fewstep_pipelines` installed.
- **(n)**: refused before training, for the reason below.

"""
MENDS = {
    SECOND_TIME: "Write `student: {tune: lora}` with `config.sampler: few`, or `sampler: multi`.",
    NORM: "Sample without guidance: `config.guidance_scale: 1`.",
    NO_FEW: "An adapter reads its second time from the label, which is right for s = 0 alone, and Self-E has no such sampler: "
    "write `tune: full`.",
    NO_LAYER: "An adapter holds no new layer, and FreeFlow's student reads how far it goes: write `tune: full`.",
}


def page() -> str:
    """configs/MATRIX.md."""
    titles = ["method", "student", *(family.title for family in FAMILIES.values())]
    rows = [[f"`{row.method}`", row.student, *map(row.cell, FAMILIES)] for row in ROWS]
    lines = [titles, ["---"] * len(titles), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    shown = {reason: reason.format(name="FAMILY", stock="PIPELINE") for reason in REASONS}
    reasons = "\n".join(f'{i}. "{shown[reason]}". {MENDS[reason]}' for i, reason in enumerate(REASONS, 1))
    return f"{HEAD}{table}\n\n{reasons}\n"
