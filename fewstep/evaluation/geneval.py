"""GenEval (arXiv 2310.11513): does an image show the objects, counts, colours and positions that its prompt names?

    detector, colors = Mask2Former("mask2former"), ClipColors.at("clip")       # fewstep.evaluation.detection
    found = score_geneval("images", detector, colors)
    found["tasks"], found["overall"]                                           # or: python -m fewstep.evaluation.geneval

This file is the scoring; what is seen in an image comes from a detector and a judge of colours, which are functions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .geneval_files import TASKS, Prompt, find_pictures, read_prompts, write_results

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Instances:
    """What is found of one class. boxes: float32 [n, 5], (left, top, right, bottom, score) in pixels, y down.

    masks: bool [n, height, width], or None when a detector has none.
    """

    boxes: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: slice | Sequence[int]) -> Instances:
        """Some of them, in the order of `rows`."""
        chosen: Any = rows if isinstance(rows, slice) else list(rows)
        return Instances(self.boxes[chosen], None if self.masks is None else self.masks[chosen])


Detections = Mapping[str, Instances]  # class -> what is found of it
Detector = Callable[["Image", float], Detections]  # an RGB image, the score above which an object counts
Colors = Callable[
    ["Image", Instances, str], Sequence[str]
]  # the image, objects of one class, its name -> a colour each


@dataclass(frozen=True)
class Rules:
    """The numbers of the protocol; scores of other rules are not GenEval's.

    threshold, counting_threshold: an object counts above this score (the latter in the task `counting`). most: objects a
    class. overlap: IoU from which the weaker of two boxes is dropped; 1 keeps all. margin: the part of the two boxes' sizes
    that an offset must exceed.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    most: int = 16
    overlap: float = 1.0
    margin: float = 0.1

    def least(self, tag: str) -> float:
        """The score that an object must exceed in the task `tag`."""
        return self.counting_threshold if tag == "counting" else self.threshold


def score_geneval(
    folder: str | Path,
    detector: Detector,
    colors: Colors,
    prompts: str | Path | None = None,
    rules: Rules = Rules(),
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Scores a folder of images laid out as in `geneval_files`. out: where results.jsonl is written.

    prompts: evaluation_metadata.jsonl; the folder must hold each of its prompts. Returns what `summary` does, and the
    `rows` of results.jsonl. UserError for a folder or prompts that do not fit, and for files that are no images.
    """
    pictures = find_pictures(folder, None if prompts is None else read_prompts(prompts))
    rows = [score_image(file, prompt, detector, colors, rules) for file, prompt in pictures]
    if out is not None:
        write_results(rows, out)
    return {**summary(rows), "rows": rows}


def score_image(
    file: str | Path, prompt: Prompt, detector: Detector, colors: Colors, rules: Rules = Rules()
) -> dict[str, Any]:
    """The line of results.jsonl of one image: filename, tag, prompt, correct, reason, metadata, details."""
    return {"filename": str(file), **score_picture(_open(Path(file)), prompt, detector, colors, rules)}


def score_picture(
    image: Image, prompt: Prompt, detector: Detector, colors: Colors, rules: Rules = Rules()
) -> dict[str, Any]:
    """The same of an image in memory, without its filename."""
    least = rules.least(prompt["tag"])
    found = {name: kept(seen, least, rules) for name, seen in detector(image, least).items()}
    found = {name: objects for name, objects in found.items() if len(objects)}
    reasons = shortcomings(found, prompt, lambda objects, name: colors(image, objects, name), rules.margin)
    return {
        "tag": prompt["tag"],
        "prompt": prompt["prompt"],
        "correct": not reasons,
        "reason": "\n".join(reasons),
        "metadata": json.dumps(prompt),
        "details": json.dumps({name: objects.boxes.tolist() for name, objects in found.items()}),
    }


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of results: `overall` is the plain mean of the tasks' shares of correct images, however many images each has.

    tasks: tag -> {score, correct, images}, in the papers' order. images, prompts: how many. correct_images: their share.
    correct_prompts: share of prompts of which some image is correct.
    """
    results = list(rows)
    if not results:
        raise UserError("GenEval has no results to sum up: score some images first")
    tasks, prompts = _grouped(results, "tag"), _grouped(results, "metadata")
    order = sorted(tasks, key=lambda tag: TASKS.index(tag) if tag in TASKS else len(TASKS))
    shares = {tag: sum(tasks[tag]) / len(tasks[tag]) for tag in order}
    table = {tag: {"score": shares[tag], "correct": sum(tasks[tag]), "images": len(tasks[tag])} for tag in order}
    return {
        "overall": sum(shares.values()) / len(shares),
        "tasks": table,
        "images": len(results),
        "prompts": len(prompts),
        "correct_images": sum(row["correct"] for row in results) / len(results),
        "correct_prompts": sum(any(group) for group in prompts.values()) / len(prompts),
    }


def kept(seen: Instances, least: float, rules: Rules = Rules()) -> Instances:
    """The objects that count: score > least, the `most` best, best first, less those that overlap a better one."""
    scores = np.asarray(seen.boxes, np.float32)[:, 4]  # in float32, as detectors answer: .9 is not above .9
    best = np.argsort(scores)[::-1]
    order = best[scores[best] > np.float32(least)][: rules.most].tolist()
    chosen: list[int] = []
    while order:
        chosen.append(order.pop(0))
        order = [i for i in order if rules.overlap == 1 or iou(seen.boxes[chosen[-1]], seen.boxes[i]) < rules.overlap]
    return seen[chosen]


def shortcomings(
    found: Detections, prompt: Prompt, colors: Callable[[Instances, str], Sequence[str]], margin: float = Rules.margin
) -> list[str]:
    """What the image lacks of its prompt; nothing when it is correct. found: what `kept` leaves, best first.

    An object of the prompt is its class's `count` best boxes: enough of them, all of them of the colour, each at the place
    asked for from each box of the object referred to, which must itself be as asked. Of an excluded class there are fewer
    boxes than `count`.
    """
    reasons: list[str] = []
    matched: list[Instances | None] = []
    for clause in prompt["include"]:
        name, count = clause["class"], clause["count"]
        objects = found[name][:count] if name in found else Instances(np.zeros((0, 5), np.float32))
        lacking = _lacking(clause, objects, matched, colors, margin)
        reasons += [lacking] if lacking else []
        matched.append(None if lacking else objects)
    for clause in prompt.get("exclude", ()):
        name, count = clause["class"], clause["count"]
        if name in found and len(found[name]) >= count:
            reasons.append(f"{name}: {len(found[name])} found, fewer than {count} wanted")
    return reasons


def _lacking(
    clause: Mapping[str, Any],
    objects: Instances,
    matched: Sequence[Instances | None],
    colors: Callable[[Instances, str], Sequence[str]],
    margin: float,
) -> str | None:
    name, count = clause["class"], clause["count"]
    if len(objects) < count:
        return f"{name}: {len(objects)} found, {count} wanted"
    if "color" in clause:
        seen = list(colors(objects, name))
        if seen.count(clause["color"]) < count:
            return f"{name}: {', '.join(seen)} found, {clause['color']} wanted"
    if "position" not in clause:
        return None
    wanted, target = clause["position"][0], matched[clause["position"][1]]
    if target is None:
        return f"{name}: nothing there to be {wanted}"
    for a in objects.boxes:
        for b in target.boxes:
            seen = sorted(relations(a, b, margin))
            if wanted not in seen:
                return f"{name}: {' and '.join(seen) or 'no clear place'} found, {wanted} wanted"
    return None


def relations(a: np.ndarray, b: np.ndarray, margin: float = Rules.margin) -> set[str]:
    """Where box a is, seen from box b: of left of, right of, above, below none, one or two.

    d = centre(a) - centre(b); d' = sign(d) max(|d| - margin (size(a) + size(b)), 0), a component each. A direction holds
    where d' / |d| exceeds 1/2; where |d'| < .001 in both, none does. |d| is that of the whole offset, before the margin.
    """
    boxes = np.asarray([a[:4], b[:4]], np.float32).reshape(2, 2, 2)  # box, corner, axis
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - margin * sizes.sum(0), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in held.items() if holds}


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes whose right and bottom pixels belong to them: sides are right - left + 1."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(*np.maximum(a[:2], b[:2]), *np.minimum(a[2:4], b[2:4]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return float(shared / union) if union else 0.0


def _grouped(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[bool]]:
    groups: dict[str, list[bool]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(bool(row["correct"]))
    return groups


def _open(file: Path) -> Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UserError(f"cannot decode '{file}': make it anew") from None


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m fewstep.evaluation.geneval IMAGES --detector FOLDER --clip FOLDER`; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fewstep.evaluation.geneval", description="GenEval of a folder of images."
    )
    parser.add_argument("images", help="holds 00000/metadata.jsonl and 00000/samples/0000.png")
    parser.add_argument(
        "--detector", required=True, help="folder of a Mask2Former for COCO instances, as transformers saves it"
    )
    parser.add_argument(
        "--clip", required=True, help="folder of a CLIP, for colours; the official one is ViT-L/14 of OpenAI"
    )
    parser.add_argument("--prompts", help="evaluation_metadata.jsonl: all of its prompts must be there")
    parser.add_argument("--out", help="where the results are written; default: results.jsonl in IMAGES")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1; default: cpu")
    asked = parser.parse_args(argv)
    out = asked.out or Path(asked.images) / "results.jsonl"
    try:
        find_pictures(
            asked.images, read_prompts(asked.prompts) if asked.prompts else None
        )  # before networks are loaded
        from .detection import ClipColors, Mask2Former

        detector, colors = Mask2Former(asked.detector, asked.device), ClipColors.at(asked.clip, asked.device)
        found = score_geneval(asked.images, detector, colors, asked.prompts, out=out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for tag, row in found["tasks"].items():
        print(f"{tag:<14} {row['score']:.4f}  {row['correct']} of {row['images']}")
    print(f"{'overall':<14} {found['overall']:.5f}  of {found['images']} images of {found['prompts']} prompts; {out}")
    return 0


if __name__ == "__main__":
    from fewstep.evaluation.geneval import main as run  # under its own name, so that its classes exist once

    raise SystemExit(run())
