"""GenEval on disk (arXiv 2310.11513): the prompt file, the folders of images, and the result file.

evaluation_metadata.jsonl       a prompt a line: {"tag", "include": [{"class", "count", "color"?, "position"?}],
                                "exclude"?: [{"class", "count"}], "prompt"}; a position is [relation, number of the object]
<folder>/00000/metadata.jsonl   the prompt's line; the folder's name is the line's number
<folder>/00000/samples/0000.png ... 0003.png
results.jsonl                   a line an image
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest

Prompt = Mapping[str, Any]  # one line of evaluation_metadata.jsonl
Picture = tuple[Path, Prompt]

TASKS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
# the 80 classes of COCO in its order; GenEval renames the mouse, the remote and the keyboard
CLASSES: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
METADATA, SAMPLES = "metadata.jsonl", "samples"
_IMAGE = re.compile(r"\d+\.png")


def read_prompts(file: str | Path) -> list[Prompt]:
    """The prompts of evaluation_metadata.jsonl, in its order. UserError names the line that is none, and what is wrong."""
    place = Path(file)
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no GenEval prompts in '{place}' ({error}): give evaluation_metadata.jsonl") from None
    prompts = [_prompt(line, f"'{place}' line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"no GenEval prompts in '{place}': it is empty")
    return prompts


def arrange(files: Sequence[Path], prompts: Sequence[Prompt], folder: str | Path, per_prompt: int = 4) -> None:
    """Lays images out as GenEval wants them: file i is sample i mod per_prompt of prompt i div per_prompt.

    Files are linked where the disk can, else copied. UserError for another number of files than of prompts times samples,
    and for a folder that is not empty.
    """
    place = Path(folder)
    if len(files) != per_prompt * len(prompts):
        raise UserError(f"{len(files)} images for {len(prompts)} prompts: GenEval wants {per_prompt} a prompt")
    if place.exists() and any(place.iterdir()):
        raise UserError(f"'{place}' is not empty: name a new folder")
    for i, file in enumerate(files):
        number, sample = divmod(i, per_prompt)
        _link(file, prompt_folder(place, number, prompts[number]) / f"{sample:04d}.png")


def prompt_folder(folder: str | Path, number: int, prompt: Prompt) -> Path:
    """Makes <folder>/00000 with its metadata.jsonl and gives the place for its samples."""
    home = Path(folder) / f"{number:05d}"
    (home / SAMPLES).mkdir(parents=True, exist_ok=True)
    (home / METADATA).write_text(json.dumps(prompt) + "\n", encoding="utf-8")
    return home / SAMPLES


def find_pictures(folder: str | Path, prompts: Sequence[Prompt] | None = None) -> list[Picture]:
    """All images with their prompts, by the folders' and the images' numbers.

    prompts: what the folders must hold, line i in folder i, none missing. UserError for a folder that is not laid out as
    above, for images by other names, and for prompts with more images than others, which would weigh more.
    """
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"no folder '{place}': give one with 00000/{METADATA} and 00000/{SAMPLES}/0000.png")
    homes = sorted((home for home in place.iterdir() if _is_prompt(home)), key=lambda home: int(home.name))
    if not homes:
        raise UserError(
            f"'{place}' has no folder 00000: lay images out as 00000/{METADATA} and 00000/{SAMPLES}/0000.png"
        )
    said = [_metadata(home) for home in homes]
    if prompts is not None:
        _match(homes, said, prompts)
    samples = [_samples(home) for home in homes]
    for home, found in zip(homes, samples):
        if len(found) != len(samples[0]):
            raise UserError(
                f"'{home}' has {len(found)} images, '{homes[0]}' {len(samples[0])}: make as many of each prompt"
            )
    return [(file, prompt) for found, prompt in zip(samples, said) for file in found]


def write_results(rows: Iterable[Mapping[str, Any]], file: str | Path) -> Path:
    """Writes results.jsonl, a row a line, in one move."""
    place = Path(file)
    aside = place.with_name(place.name + ".part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(aside, place)
    except OSError as error:
        raise UserError(f"cannot write '{place}': {error.strerror}: name another file") from None
    return place


def read_results(file: str | Path) -> list[dict[str, Any]]:
    """The rows of results.jsonl, ours or the official program's."""
    try:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
        return [
            {**row, "correct": bool(row["correct"]), "tag": str(row["tag"]), "metadata": row["metadata"]}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' holds no results of GenEval: {type(error).__name__}: {error}") from None


def _prompt(line: str, where: str) -> Prompt:
    try:
        prompt = json.loads(line)
        names = _names(prompt)
        fits = all(clause["count"] > 0 for clause in _clauses(prompt)) and all(
            0 <= clause["position"][1] < i for i, clause in enumerate(prompt["include"]) if "position" in clause
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{where} is no GenEval prompt: {type(error).__name__}: {error}") from None
    for name, known in names:
        if name not in known:
            raise UserError(f"{where}: GenEval has no '{name}': {nearest(str(name), known)}")
    if not fits:
        raise UserError(f"{where}: counts start at 1, and a position refers to an object before its own")
    return prompt


def _clauses(prompt: Prompt) -> list[Mapping[str, Any]]:
    return [*prompt["include"], *prompt.get("exclude", ())]


def _names(prompt: Prompt) -> list[tuple[str, tuple[str, ...]]]:
    """Every name in a prompt, with those that are allowed in its place. KeyError for a field that is not there."""
    if not isinstance(prompt["prompt"], str):
        raise TypeError("prompt is no text")
    names = [(prompt["tag"], TASKS), *((clause["class"], CLASSES) for clause in _clauses(prompt))]
    names += [(clause["color"], COLORS) for clause in prompt["include"] if "color" in clause]
    return names + [(clause["position"][0], RELATIONS) for clause in prompt["include"] if "position" in clause]


def _is_prompt(home: Path) -> bool:
    if home.is_dir() and not home.name.isdigit() and (home / METADATA).exists():
        raise UserError(f"'{home}' is not named by its prompt's number: rename it, e.g. 00000")
    return home.is_dir() and home.name.isdigit()


def _metadata(home: Path) -> Prompt:
    try:
        text = (home / METADATA).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"'{home}' has no readable {METADATA}: write its prompt's line there") from None
    return _prompt(text, f"'{home / METADATA}'")


def _match(homes: Sequence[Path], said: Sequence[Prompt], prompts: Sequence[Prompt]) -> None:
    """Folder i holds prompt i, for all i."""
    for home, prompt in zip(homes, said):
        number = int(home.name)
        if number >= len(prompts) or prompt != prompts[number]:
            asked = f"'{prompts[number]['prompt']}'" if number < len(prompts) else "nothing"
            raise UserError(
                f"'{home}' shows '{prompt['prompt']}', the prompt file asks for {asked}: use the file they were made from"
            )
    missing = set(range(len(prompts))) - {int(home.name) for home in homes}
    if missing or len(homes) != len(prompts):
        first = f"{min(missing):05d} is missing" if missing else "a number occurs twice"
        raise UserError(
            f"'{homes[0].parent}' has {len(homes)} of {len(prompts)} prompts, {first}: make the others first"
        )


def _samples(home: Path) -> list[Path]:
    place = home / SAMPLES
    files = sorted(place.iterdir()) if place.is_dir() else []
    if not files:
        raise UserError(f"no images in '{place}': put 0000.png ... there")
    for file in files:
        if not _IMAGE.fullmatch(file.name):
            raise UserError(f"'{file}' is not named by digits: GenEval scores 0000.png ... only")
    return sorted(files, key=lambda file: (int(file.stem), file.name))


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except FileNotFoundError:
        raise UserError(f"no image '{file}': make it first") from None
    except OSError:  # another disk, or one without links
        shutil.copyfile(file, place)
