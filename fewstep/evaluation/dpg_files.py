"""DPG-Bench on disk: the csv of questions, the prompts, a prompt's images in one picture, and the result files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = (
    "item_id",
    "text",
    "proposition_id",
    "dependency",
    "tuple",
    "question_natural_language",
)  # those that are read


@dataclass(frozen=True)
class Question:
    """number: in its item. parents: numbers of the questions that must hold first. category: "attribute - color"."""

    number: int
    text: str
    parents: tuple[int, ...]
    category: str


@dataclass(frozen=True)
class Item:
    """A prompt with its questions, in the order of the csv."""

    name: str
    prompt: str
    questions: tuple[Question, ...]


def read_items(file: str | Path, official: bool = True) -> dict[str, Item]:
    """The items of dpg_bench.csv by item_id.

    official: as the official program reads them. Its first line of questions is lost, of lines with one number the last
    one counts, and an item that comes up again after another starts anew. Else these lines are refused or joined. UserError
    names the line that cannot be read.
    """
    lines = _lines(Path(file))
    found: dict[str, dict[int, Question]] = {}
    prompts: dict[str, str] = {}
    before = None
    for number, line in list(enumerate(lines, 2))[1 if official else 0 :]:
        question, name = _question(line, f"'{file}' question line {number}"), line["item_id"]
        if name not in found or (official and name != before):
            found[name] = {}
        if not official and question.number in found[name]:
            raise UserError(f"'{file}' question line {number}: item '{name}' has a question {question.number} already")
        found[name][question.number] = question
        prompts.setdefault(name, line["text"])
        before = name
    if not found:
        raise UserError(f"'{file}' has no questions: give dpg_bench.csv")
    return {name: Item(name, prompts[name], tuple(asked.values())) for name, asked in found.items()}


def read_prompts(folder: str | Path) -> dict[str, str]:
    """The prompts <id>.txt of dpg_bench/prompts by id, sorted by it."""
    place = Path(folder)
    files = sorted(place.glob("*.txt")) if place.is_dir() else []
    if not files:
        raise UserError(f"no prompts in '{place}': give dpg_bench/prompts, which holds <id>.txt")
    return {file.stem: file.read_text(encoding="utf-8").strip() for file in files}


def check_prompts(prompts: Mapping[str, str], items: Mapping[str, Item]) -> None:
    """UserError when the prompt files and the csv do not name the same items."""
    apart = sorted(set(prompts) ^ set(items))
    if apart:
        here, there = ("prompts", "questions") if apart[0] in prompts else ("questions", "prompts")
        raise UserError(f"item '{apart[0]}' has {here} and no {there}: take both from one release of DPG-Bench")


def grid(images: Sequence[Image]) -> Image:
    """Four images of one size in one picture, two a row, as DPG-Bench is given them. Save it as <id>.png."""
    from PIL import Image as pictures

    if len(images) != 4 or len({image.size for image in images}) != 1:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
        raise UserError(f"DPG-Bench wants four images of one size a prompt, not {sizes or 'none'}")
    width, height = images[0].size
    whole = pictures.new("RGB", (2 * width, 2 * height))
    for number, image in enumerate(images):
        whole.paste(image, (number % 2 * width, number // 2 * height))
    return whole


def tiles(picture: Image, resolution: int, count: int, file: str | Path) -> list[Image]:
    """The first `count` of the four tiles, row by row. UserError when the picture is not 2 x 2 tiles of `resolution`.

    A picture of a single tile is refused unless `count` is 1: a cut outside of it would be black.
    """
    side = resolution if count == 1 and picture.size == (resolution, resolution) else 2 * resolution
    if picture.size != (side, side):
        raise UserError(
            f"'{file}' is {picture.width}x{picture.height}, not 2 x 2 images of {resolution}: give the side of one image"
        )
    corners = [(number % 2 * resolution, number // 2 * resolution) for number in range(count)]
    return [picture.crop((left, top, left + resolution, top + resolution)) for left, top in corners]


def open_grid(file: Path) -> Image:
    """The picture in RGB. UserError when it cannot be decoded."""
    from PIL import Image as pictures

    try:
        with pictures.open(file) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, pictures.DecompressionBombError):
        raise UserError(f"cannot decode '{file}': make it anew, or take it away") from None


def write_report(
    found: Mapping[str, Any], details: Sequence[str], images: Path, out: Path, when: str
) -> tuple[Path, Path]:
    """Writes dpg-bench_<when>_results.txt and ..._results_detail.txt into `out`, in the official program's form."""
    results = out / f"dpg-bench_{when}_results.txt"
    detail = results.with_name(f"{results.stem}_detail.txt")
    lines = [", ".join([row["image"], *map(str, row["tiles"]), str(row["score"])]) for row in found["rows"]]
    lines += [f"Model: {images.name}"]
    for title, kind in (("L1", "l1"), ("L2", "l2")):
        lines += [f"{title} category scores:", *(f"\t{name}: {value}" for name, value in found[kind].items())]
    lines += [f"Image path: {images}", f"Save results to: {results}", f"DPG-Bench score: {found['score']}"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        detail.write_text("".join(line + "\n" for line in details), encoding="utf-8")
        results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{results}': {error.strerror}: name another folder") from None
    return results, detail


def _lines(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            lacking = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"no questions in '{file}' ({error}): give dpg_bench.csv") from None
    if lacking:
        raise UserError(f"'{file}' has no column '{lacking[0]}': give dpg_bench.csv")
    return lines


def _question(line: Mapping[str, str], where: str) -> Question:
    try:
        parents = tuple(int(word) for word in line["dependency"].split(","))
        number, text, kind = int(line["proposition_id"]), line["question_natural_language"], line["tuple"]
        return Question(number, text, tuple(p for p in parents if p != 0), kind.split("(")[0].strip())
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where} cannot be read ({error}): take the csv anew") from None
