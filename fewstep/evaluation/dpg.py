"""DPG-Bench (arXiv 2403.05135): how much of a long prompt is in an image, asked question by question.

    found = score_dpg("grids", "dpg_bench.csv", vqa=mplug("mplug"), resolution=512)     # vqa(image, question) -> "yes"
    found["score"], found["l1"]                                       # or: python -m fewstep.evaluation.dpg

A prompt's four images stand in one picture <id>.png, two a row. A question counts only where those it depends on hold:
no cat, no colour of the cat.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError, nearest
from .dpg_files import Item, Question, open_grid, read_items, tiles, write_report

if TYPE_CHECKING:
    from PIL.Image import Image

Vqa = Callable[["Image", str], str]  # an image and a question -> the answer in words
Mode = Literal["official", "corrected"]
MODES: tuple[Mode, ...] = ("official", "corrected")
YES = "yes"
MPLUG = "damo/mplug_visual-question-answering_coco_large_en"


class LostQuestion(UserError):
    """A question depends on one that its item has not, or no longer."""


@dataclass(frozen=True)
class Judged:
    """One picture. answers: of each tile, by question number. scores: of each tile, 0 to 1."""

    file: Path
    item: Item
    answers: tuple[Mapping[int, str], ...]
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean over the tiles."""
        return sum(self.scores) / len(self.scores)


def score_dpg(
    folder: str | Path,
    questions: str | Path,
    vqa: Vqa,
    resolution: int,
    pictures: int = 4,
    mode: Mode = "official",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Scores the pictures <id>.png of a flat folder; questions: dpg_bench.csv; resolution: side of one of the 2 x 2 tiles.

    mode "official" gives the official program's numbers: the first line of questions is lost, an item whose questions
    depend on lost ones is left out, as is any other file, a child that stands before its parent sees the parent's own answer
    only, and the categories count the last tile alone. Published scores are these. "corrected": none of that, and every
    item must have its picture. out: a folder for `dpg-bench_<time>_results.txt` and `..._detail.txt`.

    Returns `score` (0 to 100), `l1` and `l2` (category -> 0 to 100, of the raw answers), `images` scored, `items` asked for,
    `failed` (file name -> why it was left out) and `rows` (image, tiles, score). UserError when nothing is scored.
    """
    if mode not in MODES:
        raise UserError(f"DPG-Bench has no mode '{mode}': {nearest(mode, MODES)}")
    if not 1 <= pictures <= 4:
        raise UserError(f"pictures={pictures}: a picture holds 1 to 4 tiles")
    items = read_items(questions, official=mode == "official")
    asked, failed = _asked(Path(folder), items, mode)
    judged: list[Judged] = []
    for image, file, item in asked:
        try:
            judged.append(judge(image, file, item, vqa, resolution, pictures, mode))
        except LostQuestion as error:
            failed[file.name] = str(error)
    if not judged:
        raise UserError(f"'{folder}' holds no picture of an item in '{questions}': name pictures <id>.png")
    rows = [{"image": str(one.file), "tiles": list(one.scores), "score": one.score} for one in judged]
    found: dict[str, Any] = {
        "score": 100 * sum(one.score for one in judged) / len(judged),
        **categories(judged, last_tile_only=mode == "official"),
        "images": len(judged),
        "items": len(items),
        "failed": failed,
        "mode": mode,
        "rows": rows,
    }
    if out is not None:
        found["files"] = write_report(found, _details(judged, resolution), Path(folder), Path(out), _now())
    return found


def judge(
    picture: Image, file: Path, item: Item, vqa: Vqa, resolution: int, pictures: int = 4, mode: Mode = "official"
) -> Judged:
    """Asks an item's questions of each tile of its picture. UserError when the picture is not 2 x 2 tiles."""
    parts = tiles(picture, resolution, pictures, file)
    answers = tuple({q.number: vqa(part, q.text) for q in item.questions} for part in parts)
    return Judged(file, item, answers, tuple(tile_score(item.questions, given, mode) for given in answers))


def tile_score(questions: Sequence[Question], answers: Mapping[int, str], mode: Mode = "official") -> float:
    """Share of the questions that hold: answered "yes", and all their parents hold.

    mode "official" goes through the questions once, in their order: a parent that stands later has not been zeroed yet, and
    one that is not there is only missed (LostQuestion) where the parents listed before it hold.
    """
    holds = {q.number: answers[q.number] == YES for q in questions}
    for question in questions if mode == "official" else in_order(questions):
        try:
            holds[question.number] &= all(holds[parent] for parent in question.parents)
        except KeyError as error:
            raise LostQuestion(f"question {error} is lost, and others depend on it: mend the csv") from None
    return sum(holds.values()) / len(holds)


def in_order(questions: Sequence[Question]) -> list[Question]:
    """Parents before children. UserError when questions depend on each other in a circle, or on one that is not there."""
    left, ordered = {q.number: q for q in questions}, list[Question]()
    known = set(left)
    for question in questions:
        lost = set(question.parents) - known
        if lost:
            raise UserError(f"question '{question.text}' depends on {min(lost)}, which its item lacks: mend the csv")
    while left:
        free = [q for q in left.values() if not any(parent in left for parent in q.parents)]
        if not free:
            raise UserError(f"questions {sorted(left)} depend on each other in a circle: mend the csv")
        ordered += free
        left = {number: q for number, q in left.items() if q not in free}
    return ordered


def categories(judged: Sequence[Judged], last_tile_only: bool = True) -> dict[str, dict[str, float]]:
    """`l1` and `l2`: category -> 100 times the share of raw answers "yes", parents or not, over all pictures' questions.

    l2 is what stands before the bracket in a question's tuple ("attribute - color"), l1 what stands before its dash.
    """
    broad: dict[str, list[bool]] = {}
    fine: dict[str, list[bool]] = {}
    for one in judged:
        for answers in one.answers[-1:] if last_tile_only else one.answers:
            for question in one.item.questions:
                yes = answers[question.number] == YES
                fine.setdefault(question.category, []).append(yes)
                broad.setdefault(question.category.split("-")[0].strip(), []).append(yes)
    shares = [{name: 100 * sum(yes) / len(yes) for name, yes in sorted(kind.items())} for kind in (broad, fine)]
    return {"l1": shares[0], "l2": shares[1]}


def mplug(folder: str | Path, device: str = "gpu") -> Vqa:
    """The official judge, mPLUG-large for questions (coco_large_en), from the folder that modelscope fetched.

    UserError when there is no such folder, or modelscope is not installed.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"--mplug: no folder '{folder}': fetch it (`modelscope download --model {MPLUG} --local_dir FOLDER`)"
        )
    try:
        pipeline: Any = import_module("modelscope.pipelines").pipeline
    except ImportError:
        raise UserError("--mplug needs modelscope: pip install modelscope, or name another judge by --vqa") from None
    ask = pipeline("visual-question-answering", model=str(folder), device=device)
    return lambda image, question: ask({"image": image, "question": question})["text"]


def _asked(
    folder: Path, items: Mapping[str, Item], mode: Mode
) -> tuple[Iterator[tuple[Image, Path, Item]], dict[str, str]]:
    """The pictures with their items, and why other files are left out; mode "corrected" leaves nothing out."""
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}': give one with the pictures <id>.png")
    files = sorted(file for file in folder.iterdir() if file.is_file())
    failed = {file.name: why for file in files if (why := _unfit(file, items))}
    asked = [file for file in files if file.name not in failed]
    if mode == "corrected":
        _refuse(folder, items, [_id(file) for file in asked], failed)
    return ((open_grid(file), file, items[_id(file)]) for file in asked), failed


def _refuse(folder: Path, items: Mapping[str, Item], asked: Sequence[str], failed: Mapping[str, str]) -> None:
    """UserError unless every item has one picture and there is nothing else."""
    for name, why in failed.items():
        raise UserError(f"'{folder / name}': {why}")
    for item in items.values():
        in_order(item.questions)  # before an hour of questions
    wrong = [name for name in items if asked.count(name) != 1]
    if wrong:
        count = asked.count(wrong[0])
        raise UserError(
            f"'{folder}' has {count or 'no'} pictures of item '{wrong[0]}': DPG-Bench wants one of each item"
        )


def _unfit(file: Path, items: Mapping[str, Item]) -> str | None:
    """Why the official program gives up on a file before it asks; None when it does not."""
    item = items.get(_id(file))
    if item is None:
        return "no item has that name: name pictures by item_id"
    try:
        open_grid(file)
    except UserError as error:
        return str(error)
    return None


def _id(file: Path) -> str:
    return file.name.split(".")[0]


def _details(judged: Sequence[Judged], resolution: int) -> list[str]:
    """A line an answer: picture, the tile's corners, question, answer."""
    lines = []
    for one in judged:
        for number, answers in enumerate(one.answers):
            left, top = number % 2 * resolution, number // 2 * resolution
            corners = (left, top, left + resolution, top + resolution)
            lines += [f"{one.file}, {corners}, {q.text}, {answers[q.number]}" for q in one.item.questions]
    return lines


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def _named(place: str) -> Vqa:
    module, _, name = place.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--vqa={place}: write module:function of one that can be imported ({error})") from None


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m fewstep.evaluation.dpg GRIDS --questions dpg_bench.csv --resolution 512`; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fewstep.evaluation.dpg", description="DPG-Bench of a folder of pictures."
    )
    parser.add_argument("grids", help="holds <id>.png, four images of a prompt, two a row")
    parser.add_argument("--questions", required=True, help="dpg_bench.csv")
    parser.add_argument("--resolution", required=True, type=int, help="side of one of the four images, in pixels")
    parser.add_argument("--pictures", type=int, default=4, help="how many of the four are looked at; default: 4")
    parser.add_argument("--mode", default="official", help="official (published scores), or corrected")
    parser.add_argument("--vqa", help="or module:function of another, which answers (image, question)")
    parser.add_argument("--mplug", help="folder of the official judge; needs modelscope")
    parser.add_argument("--out", help="folder of the results; default: beside GRIDS")
    asked = parser.parse_args(argv)
    try:
        if (asked.vqa is None) == (asked.mplug is None):
            raise UserError("name who answers the questions: --mplug FOLDER or --vqa module:function")
        vqa = _named(asked.vqa) if asked.vqa else mplug(asked.mplug)
        out = asked.out or Path(asked.grids).parent
        found = score_dpg(asked.grids, asked.questions, vqa, asked.resolution, asked.pictures, asked.mode, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, value in found["l1"].items():
        print(f"{name:<12} {value:.4f}")
    print(f"{'score':<12} {found['score']:.4f}  of {found['images']} of {found['items']} prompts; {found['files'][0]}")
    for name, why in found["failed"].items():
        print(f"left out: {name}: {why}")
    return 0


if __name__ == "__main__":
    from fewstep.evaluation.dpg import main as run  # under its own name, so that its classes exist once

    raise SystemExit(run())
