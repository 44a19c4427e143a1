"""What a folder says about itself: fewstep.json for machines, README.md for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from fewstep_kernels import noise

from .. import __version__
from ..maths.paths import Path as NoisePath
from ..maths.solvers import Schedule
from ..models.folder import path_from
from ..models.hub import is_hub_id
from ..models.registry import FAMILIES
from .atomic import sha256
from .guidance_number import guidance_number
from .lora import LORA_FILES
from .path_config import path_config

FORMAT = 1
BIOLOGY = ("biology", "protein")
# Drawn at the nearest size of a table, and resized, unless they are told not to.
BINNING = ("PixArtSigmaPipeline", "SanaPipeline", "SanaSprintPipeline", "FewStepSanaPipeline")
MANY_LEVELS = 20  # of which a table shows the ends
LICENCE = ("license", "license_name", "license_link")  # of a card's head, as the hub spells them
LOADED = {LORA_FILES["diffusers"]: ""}  # what `load_lora_weights` has to be told of a file
ELSEWHERE = {
    LORA_FILES["peft"]: ', which `peft.PeftModel.from_pretrained(network, "FOLDER/lora_peft")` loads',
    LORA_FILES["kohya"]: ", in the keys of kohya's trainers",
    LORA_FILES["comfyui"]: ", in the keys of ComfyUI: put it into `models/loras`",
}
HASHED = ("*.safetensors", "*.py")


def sampling(path: NoisePath, schedule: Schedule, steps: Sequence[int]) -> dict[str, Any]:
    """How the network must be sampled; `nfe` are network evaluations an image at the schedule's own number of steps."""
    nfe = schedule.steps * (1 if schedule.guidance == 1 or schedule.embedded else 2)
    return {"path": path_config(path), "schedule": asdict(schedule), "steps": list(steps), "nfe": nfe}


def schedule_from(said: Mapping[str, Any]) -> Schedule:
    """The schedule that `sampling` wrote down."""
    return Schedule(**said)


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


def licence_of(folder: Path) -> dict[str, str]:
    """What the model card in a folder says of its licence: `licence`, and `licence_name` and `licence_link` of others.

    Empty where it says nothing.
    """
    file = folder / "README.md"
    head = re.match(r"---\n(.*?)\n---", file.read_text(errors="replace"), re.DOTALL) if file.is_file() else None
    try:
        said = yaml.safe_load(head[1]) if head is not None else None
    except yaml.YAMLError:
        said = None
    if not isinstance(said, dict) or said.get("license_name", said.get("license", "other")) == "other":
        return {}
    return {key.replace("license", "licence"): str(said[key]) for key in LICENCE if said.get(key)}


def readme(name: str, said: Mapping[str, Any]) -> str:
    """The model card of a folder called `name` whose fewstep.json says `said`."""
    parts = [_head(said), f"# {name}\n", _origin(said)]
    if said.get("pipeline"):
        parts += [_usage(said), _adapter(said), _schedule(said)]
    if said.get("scores"):
        parts.append("## Scores\n\n" + _table(said["scores"]))
    return "\n".join(parts)


def _head(said: Mapping[str, Any]) -> str:
    sorts = (*(BIOLOGY if "lengths" in said else ()), *(("lora",) if said.get("lora") else ()))
    tags = ["fewstep", "distillation", said.get("method"), said["family"], *sorts]
    head: dict[str, Any] = {"tags": [tag for tag in tags if tag]}
    if is_hub_id(said.get("base")) and not Path(said["base"]).exists():
        head["base_model"] = said["base"]
    if "lengths" in said:  # the hub has no task for proteins
        head = {"library_name": "diffusers", **head}
    elif said.get("pipeline"):
        task = f"text-to-{_sort(said)}" if said["prompts"] else "unconditional-image-generation"
        head = {"library_name": "diffusers", "pipeline_tag": task, **head}
    head["license"] = said.get("licence", "other")
    head |= {f"license_{key}": said[f"licence_{key}"] for key in ("name", "link") if f"licence_{key}" in said}
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def _origin(said: Mapping[str, Any]) -> str:
    paper = said.get("paper")
    how = f"Made by fewstep with `{said.get('method', 'no method')}`"
    if paper:
        how += f" ({paper['title']}, {paper['id']})"
    base = f", from `{said['base']}`" if said.get("base") else ""
    licence = said.get("licence_name") or said.get("licence", "that of the weights it was made from")
    return f"{how}{base}. Family: `{said['family']}`. Licence: {licence}.\n"


def _usage(said: Mapping[str, Any]) -> str:
    trust = ", trust_remote_code=True" if said["remote_code"] else ""
    lines = [
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("FOLDER"{trust})',
        *(_chain_call(said) if "lengths" in said else [_made(said, _call(said))]),
    ]
    code = "```python\n" + "\n".join(lines) + "\n```\n" + _any_steps(said)
    if not said["remote_code"]:
        return code
    *others, last = (f"`{file}`" for file in said["remote_code"])
    files = f"{', '.join(others)} and {last}" if others else last
    return (
        code
        + f"\nThis runs {files} of this folder: read it first. With `fewstep_pipelines` installed nothing is run.\n"
    )


def _any_steps(said: Mapping[str, Any]) -> str:
    """What is special about a student that is told a second time."""
    if not said["schedule"].get("target"):
        return ""
    which = "every N that divides the scheduler's table" if said["path"]["kind"] == "vp" else "every N"
    text = f"\nOne model for any number of steps: `num_inference_steps=N`, {which}.\n"
    if said.get("times"):
        text += (
            "The network in its folder is a stock one, the plain model; `times/` holds what tells it a second time.\n"
        )
    return text


def _chain_call(said: Mapping[str, Any]) -> list[str]:
    """How protein chains are made, and where they go."""
    low, high = said["lengths"]
    two = f"{low or 100}, {high or (low or 100) + 20}"
    fold = ", cath=torch.tensor([[1, 0, 0]] * 2)" if said["guidance_scale"] != "none" else ""
    return [
        f"made = pipe(lengths=[{two}], num_inference_steps={len(said['schedule']['u'])}{fold})",
        'made.save("designs")  # designs/000000.pdb and 000001.pdb; file_format="cif" for mmCIF',
        "made.chains()         # CA atoms [residues, 3] in Angstrom; made.coords_nm, made.mask are padded",
    ]


def _call(said: Mapping[str, Any]) -> str:
    """What the pipeline is called with."""
    label = "class_labels=[0], " if said["classes"] else ""
    prompt = 'prompt="a photo of a cat", ' if said["prompts"] else ""
    # The class pipeline knows its own scale; a stock one would fall back to 7.5 or 5.
    asked = said["prompts"] and said["guidance_scale"] in ("embedded", "cfg")
    scale = f", guidance_scale={_number(said):g}" if asked else ""
    return f"{label}{prompt}num_inference_steps={len(said['schedule']['u'])}{scale}{_second_level(said)}{_size(said)}"


def _second_level(said: Mapping[str, Any]) -> str:
    """SANA-Sprint's pipeline has one for two steps, which for any other number has to be taken away."""
    alone = said["scheduler"] == "SCMScheduler" and len(said["schedule"]["u"]) != 2
    return ", intermediate_timesteps=None" if alone else ""


def _size(said: Mapping[str, Any]) -> str:
    """Where the network does not say it."""
    *frames, height, width = said.get("size") or (None, None)
    number = f", num_frames={frames[0]}" if frames else ""
    exactly = ", use_resolution_binning=False" if said["pipeline"] in BINNING else ""
    return f"{number}, height={height}, width={width}{exactly}" if height else ""


def _sort(said: Mapping[str, Any]) -> str:
    """What is made: the size of a video has the number of frames in front."""
    return "video" if len(said.get("size") or ()) == 3 else "image"


def _made(said: Mapping[str, Any], call: str) -> str:
    """The line of code that makes one."""
    sort = _sort(said)
    return f"{sort} = pipe({call}).{'frames' if sort == 'video' else 'images'}[0]"


def _adapter(said: Mapping[str, Any]) -> str:
    """How the LoRA file is used instead, where the stock pipeline reads one."""
    if not (said.get("lora") and said["prompts"]):
        return ""
    named = f"The same student as an adapter of its base: `{said['lora']}`"
    if said["lora"] not in LOADED:
        return f"{named}{ELSEWHERE[said['lora']]}.\n"
    if said["family"] in FAMILIES and FAMILIES.get(said["family"]).facts.lora_mixin is None:
        return f"{named}, which no loader of {said['pipeline']} reads; export it with `--lora-layout peft` for peft.\n"
    steps = len(said["schedule"]["u"])
    told = f", guidance_scale={_number(said):g}" if said["guidance_scale"] != "none" else ""
    if said["remote_code"]:  # which hands its scheduler the levels, where the stock pipeline would not
        told += f", sigmas={said['schedule']['u']}"
    return (
        f"{named}.\n\n```python\n"
        f"from diffusers import DiffusionPipeline, {said['scheduler']}\n"
        'pipe = DiffusionPipeline.from_pretrained("BASE")\n'
        f'pipe.scheduler = {said["scheduler"]}.from_pretrained("FOLDER", subfolder="scheduler")\n'
        f'pipe.load_lora_weights("FOLDER"{LOADED[said["lora"]]})\n'
        + _made(said, f'"a photo of a cat", num_inference_steps={steps}{told}{_second_level(said)}{_size(said)}')
        + "\n```\n"
    )


def _schedule(said: Mapping[str, Any]) -> str:
    schedule = said["schedule"]
    rows = {
        "sampler": f"`{schedule['kind']}`, as `{said['scheduler']}`",
        **_levels(said),
        "steps": ", ".join(map(str, said["steps"])),
        "network evaluations": said["nfe"],
        "guidance scale (1 = off)": schedule["guidance"],
        "the pipeline's `guidance_scale`": _guidance(said),
        "path": f"`{said['path']['kind']}`",
        **_noise_scale(schedule),
        **_second_time(schedule),
    }
    return "## How it must be sampled\n\n" + _table([{"what": k, "value": v} for k, v in rows.items()])


def _levels(said: Mapping[str, Any]) -> dict[str, str]:
    """Clock values, or noise levels on a clock of their logarithm."""
    name, levels = "levels (clock, 1 = noise)", said["schedule"]["u"]
    if said["path"]["kind"] == "log_flow":
        path = path_from(said["path"])
        name, levels = "levels (t, 1 = noise)", [path.time(u) for u in levels]
    shown = [f"{level:.4g}" for level in levels]
    if len(shown) > MANY_LEVELS:
        shown = [*shown[:3], "...", shown[-1]]
    return {name: ", ".join(shown)}


def _noise_scale(schedule: Mapping[str, Any]) -> dict[str, str]:
    """What becomes of the noise that the sampler adds."""
    scale, renewal = schedule.get("noise_scale", 1.0), schedule.get("renewal")
    of = {"renoise": "standard deviation, the first state's too", "sde": "variance"}.get(schedule["kind"])
    return {
        **({} if scale == 1 or of is None else {"`noise_scale`": f"{scale:g} of the noise's {of}"}),
        **({} if renewal is None else {"`renewal`": f"a step replaces at most {renewal:g} of the noise"}),
    }


def _second_time(schedule: Mapping[str, Any]) -> dict[str, str]:
    """What the network is told beside t, and what becomes of guidance."""
    last = f"; in the last one {schedule['last']:g} t" if schedule.get("last") else ""
    told = {
        "next": f"the level that the step goes to{last}",
        "zero": "0",
        "same": "t itself, for the instantaneous velocity",
    }.get(schedule.get("target") or "")
    rescaled = schedule.get("rescale") and schedule["guidance"] != 1
    return {
        **({"second time told": told} if told else {}),
        **({"guided clean images": "have the norm of the conditional ones"} if rescaled else {}),
    }


def _number(said: Mapping[str, Any]) -> float:
    """The schedule's guidance as the pipeline is told it."""
    return guidance_number(said["pipeline"], said["schedule"]["guidance"])


def _guidance(said: Mapping[str, Any]) -> str:
    """What the number does to the images."""
    low_high = said.get("guidance_range")
    trained = f"; trained on {low_high[0]:g}..{low_high[1]:g}" if low_high else ""
    return {
        "embedded": f"fed to the network{trained}",
        "baked": "baked in: guidance_scale is ignored",
        "cfg": f"classifier-free guidance, a second pass unless it is {guidance_number(said['pipeline'], 1):g}",
        "none": "there is none",
    }[said["guidance_scale"]] + "".join(f"; {value:g} is in the weights" for value in said["folded"].values())


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
