"""Writing a checkpoint folder: network, scheduler, pipeline, and how it must be sampled, all or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from ..maths.paths import Path as NoisePath
from ..maths.solvers import Schedule
from ..models.family import Family
from ..models.folder import CARD
from ..nets.lora import Adapter
from .atomic import written_aside
from .card import provenance, readme, sampling
from .lora import LORA_FILE, save_lora
from .network import class_count
from .targets import OWN, Target, offered_steps, target_for

README = "README.md"


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
    vae: nn.Module | None = None,
) -> Path:
    """Writes `module` into the folder `out` and returns its path; an earlier export there is replaced in one rename.

    path, schedule: how it is sampled; None for networks that do not generate, which are saved as their family does.
    steps_offered: step counts worth sampling at; default: those whose levels are all in `schedule`.
    card: what else fewstep.json says: method, paper, base, evaluation, scores (rows of a table), licence, ...
    adapter: also written as a LoRA file; `module` itself is the merged network. vae: decodes a latent network's output.
    Raises UserError when `out` holds something else or no scheduler makes the schedule, RunFailed when the disk fails.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / CARD).exists() or not any(out.iterdir()))):
        raise UserError(f"'{out}' holds something that is no export of fewstep: choose another folder")
    with written_aside(out) as aside:
        family.save(module, aside)
        said = {"family": family.name, **card, **_pipeline(module, family, path, schedule, steps_offered, aside, vae)}
        if adapter is not None:
            said["lora"] = LORA_FILE
            sampled: dict[str, Any] = {key: said[key] for key in ("schedule", "path") if key in said}
            save_lora(adapter, _prefix(family), aside / LORA_FILE, sampled)
        said |= provenance(aside)
        (aside / CARD).write_text(json.dumps(said, indent=2) + "\n")
        (aside / README).write_text(readme(out.name, said))
    return out


def _pipeline(
    module: nn.Module,
    family: Any,
    path: NoisePath | None,
    schedule: Schedule | None,
    steps: Sequence[int],
    aside: Path,
    vae: nn.Module | None,
) -> dict[str, Any]:
    """Writes scheduler and model_index.json, and says what was written."""
    if path is None or schedule is None:
        return {}
    if not family.facts.pipeline:
        return sampling(path, schedule, steps or [schedule.steps])
    classes = class_count(module)
    target = target_for(family, path, schedule, labels=classes is not None, latent=vae is not None)
    pipeline = _assemble(target, module, family.facts.component, path, schedule, vae)
    pipeline.scheduler.save_pretrained(aside / "scheduler")
    if vae is not None:
        vae.save_pretrained(aside / "vae")  # type: ignore[operator]
    pipeline.save_config(aside)
    return {
        **sampling(path, schedule, steps or offered_steps(target, path, schedule)),
        "pipeline": type(pipeline).__name__,
        "scheduler": type(pipeline.scheduler).__name__,
        "remote_code": next((file.name for file in aside.glob("*.py")), None),
        "classes": classes,
    }


def _assemble(
    target: Target, module: nn.Module, component: str, path: NoisePath, schedule: Schedule, vae: nn.Module | None
) -> Any:
    parts: dict[str, Any] = {"scheduler": target.scheduler_for(path, schedule.steps), component: module}
    if target.pipeline == OWN:
        parts |= {"vae": vae, "default_steps": schedule.steps, "default_guidance_scale": schedule.guidance}
    return target.pipeline_class()(**parts)


def _prefix(family: Any) -> str:
    return family.facts.lora_prefix or family.facts.component if hasattr(family, "facts") else "base_model.model"
