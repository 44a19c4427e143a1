"""What a folder says about itself: fewstep.json for machines, README.md for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from fewstep_kernels import noise

from .. import __version__
from ..maths.paths import Path as NoisePath
from ..maths.solvers import Schedule
from .atomic import sha256
from .path_config import path_config

FORMAT = 1
HASHED = ("*.safetensors", "*.py")


def sampling(path: NoisePath, schedule: Schedule, steps: Sequence[int]) -> dict[str, Any]:
    """How the network must be sampled; `nfe` are network evaluations an image at the schedule's own number of steps."""
    said = {"kind": schedule.kind, "u": list(schedule.u), "guidance": schedule.guidance, "noise": schedule.noise}
    nfe = schedule.steps * (1 if schedule.guidance == 1 else 2)
    return {"path": path_config(path), "schedule": said, "steps": list(steps), "nfe": nfe}


def schedule_from(said: Mapping[str, Any]) -> Schedule:
    """The schedule that `sampling` wrote down."""
    return Schedule(said["kind"], tuple(said["u"]), said["guidance"], said["noise"])


def provenance(folder: Path) -> dict[str, Any]:
    """Format, versions, date, and the hashes of the weights and code in `folder`."""
    files = sorted(file for pattern in HASHED for file in folder.rglob(pattern))
    return {
        "format": FORMAT,
        "noise": noise.FORMAT,
        "versions": {"fewstep": __version__, **{name: version(name) for name in ("diffusers", "torch")}},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sha256": {file.relative_to(folder).as_posix(): sha256(file) for file in files},
    }


def readme(name: str, said: Mapping[str, Any]) -> str:
    """The model card of a folder called `name` whose fewstep.json says `said`."""
    parts = [_head(said), f"# {name}\n", _origin(said)]
    if said.get("pipeline"):
        parts += [_usage(said), _schedule(said)]
    if said.get("scores"):
        parts.append("## Scores\n\n" + _table(said["scores"]))
    return "\n".join(parts)


def _head(said: Mapping[str, Any]) -> str:
    tags = ["fewstep", "distillation", said.get("method"), said["family"]]
    head: dict[str, Any] = {"tags": [tag for tag in tags if tag]}
    if said.get("pipeline"):
        head = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation", **head}
    head["license"] = said.get("licence", "other")
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _origin(said: Mapping[str, Any]) -> str:
    paper = said.get("paper")
    how = f"Made by fewstep with `{said.get('method', 'no method')}`"
    if paper:
        how += f" ({paper['title']}, {paper['id']})"
    base = f", from `{said['base']}`" if said.get("base") else ""
    licence = said.get("licence", "that of the weights it was made from")
    return f"{how}{base}. Family: `{said['family']}`. Licence: {licence}.\n"


def _usage(said: Mapping[str, Any]) -> str:
    trust = ", trust_remote_code=True" if said["remote_code"] else ""
    label = "class_labels=[0], " if said["classes"] else ""
    lines = [
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("FOLDER"{trust})',
        f"image = pipe({label}num_inference_steps={len(said['schedule']['u'])}).images[0]",
    ]
    code = "```python\n" + "\n".join(lines) + "\n```\n"
    if not said["remote_code"]:
        return code
    file = said["remote_code"]
    return (
        code
        + f"\nThis runs `{file}` of this folder: read it first. With `fewstep_pipelines` installed nothing is run.\n"
    )


def _schedule(said: Mapping[str, Any]) -> str:
    schedule = said["schedule"]
    levels = ", ".join(f"{u:.4g}" for u in schedule["u"])
    rows = {
        "sampler": f"`{schedule['kind']}`, as `{said['scheduler']}`",
        "levels (clock, 1 = noise)": levels,
        "steps": ", ".join(map(str, said["steps"])),
        "network evaluations": said["nfe"],
        "guidance scale (1 = off)": schedule["guidance"],
        "path": f"`{said['path']['kind']}`",
    }
    return "## How it must be sampled\n\n" + _table([{"what": k, "value": v} for k, v in rows.items()])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
