"""Writing a checkpoint folder: network, scheduler, pipeline, and how it must be sampled, all or nothing.

A two-time network is written as a stock one, the plain flow model that it is at s = t, and its extra inputs beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UserError
from ..maths.paths import Path as NoisePath
from ..maths.solvers import Schedule
from ..models.family import Family, Surroundings
from ..models.folder import CARD
from ..models.times import TIMES, times_of, write_times
from ..nets.extra_inputs import folded, reads, weights_aside
from ..nets.lora import Adapter
from .atomic import written_aside
from .card import provenance, readme, sampling
from .lora import check_layout, write_lora
from .network import class_count, network_of, takes_lengths, takes_prompts
from .targets import exported, offered_steps, target_for

if TYPE_CHECKING:
    from fewstep_pipelines import FewStepTimes

README = "README.md"
SAMPLED = ("schedule", "path", "scheduler", "guidance_scale", "steps", "nfe")  # what a LoRA file says of its sampling


def export(
    module: nn.Module,
    family: Family,
    path: NoisePath | None,
    schedule: Schedule | None,
    out: str | Path,
    *,
    steps_offered: Sequence[int] = (),
    card: Mapping[str, Any],
    adapter: Adapter | None = None,
    around: Surroundings | None = None,
    lora_layout: str = "diffusers",
) -> Path:
    """Writes `module` into the folder `out` and returns its path; an earlier export there is replaced in one rename.

    path, schedule: how it is sampled; None for networks that do not generate, which are saved as their family does.
    steps_offered: step counts worth sampling at; default: those whose levels are all in `schedule`.
    card: what else fewstep.json says: method, paper, base, evaluation, scores (rows of a table), licence, ...
    adapter: also written as a LoRA file of `lora_layout`; `module` itself is the merged network.
    around: the rest of a latent network's pipeline, which is saved beside it.
    Raises UserError when `out` holds something else, no scheduler makes the schedule or the layout cannot name a layer,
    RunFailed when the disk fails.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / CARD).exists() or not any(out.iterdir()))):
        raise UserError(f"'{out}' holds something that is no export of fewstep: choose another folder")
    check_layout(lora_layout, adapter, module, family)
    with written_aside(out) as aside:
        said = {"family": family.name, **card}
        if path is None or schedule is None:
            _save(module, family, aside)
        else:
            said |= _sampled(module, family, path, schedule, steps_offered, aside, around)
        if adapter is not None:
            sampled = {key: said[key] for key in SAMPLED if key in said}
            said["lora"] = write_lora(adapter, module, family, aside, sampled, lora_layout)
        said |= provenance(aside)
        (aside / CARD).write_text(json.dumps(said, indent=2) + "\n")
        (aside / README).write_text(readme(out.name, said))
    return out


def _sampled(
    module: nn.Module,
    family: Any,
    path: NoisePath,
    schedule: Schedule,
    steps: Sequence[int],
    aside: Path,
    around: Surroundings | None,
) -> dict[str, Any]:
    """Writes a network that generates, with the pipeline around it where there is one, and says what was written."""
    parts = {} if around is None else dict(around.parts())
    if not family.facts.pipeline or (around is not None and parts.get("vae") is None):
        _save(module, family, aside)
        return sampling(path, schedule, steps or [schedule.steps])
    told, schedule = schedule, exported(family, schedule)
    inside = {"guidance": told.guidance} if told.embedded and not schedule.embedded else {}
    network = folded(module, inside) if inside else module
    classes = class_count(network)
    sort: dict[str, Any] = {"labels": classes is not None, "latent": around is not None, "reads": reads(network)}
    target = target_for(family, path, schedule, **sort, steps=steps)
    guidance = target.guidance(schedule)
    network = family.sealed(network) if guidance == "baked" else network
    times = _save(network, family, aside)
    parts |= {family.facts.component: network, "scheduler": target.scheduler_for(path, schedule)}
    if times is not None and target.times:
        parts[TIMES] = times
    pipeline = target.pipeline_class()(**parts, **target.defaults(path, schedule))
    for name, part in parts.items():
        if name != family.facts.component and hasattr(part, "save_pretrained"):  # `times` with its code
            part.save_pretrained(aside / name)
    pipeline.save_config(aside)
    return {
        **sampling(path, schedule, steps or offered_steps(target, path, schedule)),
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "remote_code": sorted(file.relative_to(aside).as_posix() for file in aside.rglob("*.py")),
        "times": list(parts[TIMES].embeddings) if TIMES in parts else None,
        "classes": classes,
        "prompts": takes_prompts(pipeline),
        "guidance_scale": guidance,
        "folded": inside,
        **_of_chains(pipeline),
    }


def _of_chains(pipeline: Any) -> dict[str, Any]:
    """The shortest and longest chain that a protein model makes (None: any), and that nothing guides one without folds."""
    if not takes_lengths(pipeline):
        return {}
    config: Any = network_of(pipeline).config
    unguided = {} if config.get("cath_classes") else {"guidance_scale": "none"}
    return {"lengths": [config.get("shortest"), config.get("longest")], **unguided}


def _save(module: nn.Module, family: Any, folder: Path) -> FewStepTimes | None:
    """Writes the network, which is a stock one, and its extra inputs into a folder of their own; answers those."""
    with weights_aside(module):
        family.save(module, folder)
    if not reads(module):
        return None
    times = times_of(module, family.facts.time_embedding)
    write_times(times, folder / TIMES)
    return times
