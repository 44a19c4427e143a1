"""Images of a protocol into a folder, so that a run that was cut off goes on where it stopped.

<out>/images/000000.png     image i is a function of (seed, i)
<out>/manifest.jsonl        a `Sample` a line, in order; while processes draw, process r appends to manifest-r.part.jsonl
<out>/run.json              model, seed, steps, guidance, prompts: what the images are made from
<out>/prompts.txt           line i is the prompt of image i

Batches are the blocks [0, batch), [batch, 2 batch) ... of numbers, whatever is there already and however many processes
take their turns, so each block meets the network in one composition: a run cut off at any batch gives equal pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from ..errors import UserError
from .latency import LatencySpec, latency
from .manifest import MANIFEST, Sample, line_of, read_manifest, samples_of, save_image, write_manifest, write_text

RUN_FILE, PROMPTS_FILE, IMAGES = "run.json", "prompts.txt", "images"
_PART = "manifest-*.part.jsonl"
_MODEL = (".json", ".safetensors", ".txt", ".py")
_BATCH, _BATCH_OF_PROMPTS = 256, 8


@dataclass(frozen=True)
class Order:
    """What is to be drawn: images 0 .. n - 1 of (seed, i). prompts [n] or None. size: side that is asked for, or None."""

    n: int
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    prompts: Sequence[str] | None = None
    size: int | None = None
    batch: int | None = None
    latency: LatencySpec | None = None


@dataclass(frozen=True)
class Crew:
    """The processes that a launcher started: this one's number, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device
    state: Any

    @classmethod
    def here(cls) -> Crew:
        """As accelerate finds them; alone without a launcher."""
        from accelerate import PartialState

        # a process that has drawn its share waits for the slowest, however long
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
        return cls(state.process_index, state.num_processes, state.device, state)

    def wait(self) -> None:
        """Returns when every process has come here."""
        self.state.wait_for_everyone()


def draw_missing(model: Path, out: Path, order: Order, crew: Crew) -> list[Sample]:
    """Draws those of the order's images that `out` lacks; all samples [n] in order.

    UserError when the folder's images were made from something else, or the model does not fit the order.
    """
    if crew.rank == 0:
        begin(model, out, order)
        _fold(out)
    crew.wait()
    known = _whole(out)
    blocks = list(_blocks(order, known))
    timed = crew.rank == 0 and order.latency is not None and "latency" not in _said(out)
    if blocks[crew.rank :: crew.world] or timed:
        pipeline = _pipeline(model, order, crew)
        _draw(pipeline, out, order, blocks[crew.rank :: crew.world], crew.rank)
        if timed:
            _time(pipeline, out, order)
    crew.wait()
    if crew.rank == 0:
        _fold(out)
    crew.wait()
    done = {sample.index: sample for sample in read_manifest(out / MANIFEST)}
    return [done[i] for i in range(order.n)]


def begin(model: Path, out: Path, order: Order) -> None:
    """Writes run.json and prompts.txt; UserError when run.json is there and says otherwise, naming the field."""
    asked: dict[str, Any] = {
        "model": folder_digest(model),
        "seed": order.seed,
        "steps": order.steps,
        "guidance": order.guidance,
        "batch": order.batch or (_BATCH if order.prompts is None else _BATCH_OF_PROMPTS),
        "size": order.size,
        "prompts": None
        if order.prompts is None
        else [hashlib.sha256(p.encode()).hexdigest()[:16] for p in order.prompts],
    }
    there = _said(out)
    if not there and (out / IMAGES).is_dir() and any((out / IMAGES).iterdir()):
        raise UserError(f"'{out}' holds images and no {RUN_FILE}: choose another --out, or score them as they are")
    for field, value in asked.items():
        if there and _other(there.get(field), value):
            was, now = ("other ones", "these") if field == "prompts" else (there.get(field), value)
            raise UserError(
                f"'{out}' holds images of another run: {field} was {was}, not {now}: choose another --out, or empty it"
            )
    lists = [asked["prompts"], there.get("prompts")]
    kept = {"name": str(model), **asked, "prompts": max(lists, key=lambda x: len(x or ()))}
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    write_text(out / RUN_FILE, json.dumps({**there, **kept}) + "\n")
    if order.prompts is not None and len(order.prompts) >= len(there.get("prompts") or ()):
        write_text(out / PROMPTS_FILE, "".join(" ".join(text.splitlines()) + "\n" for text in order.prompts))


def folder_digest(folder: Path) -> str:
    """sha256 over the names and bytes of the files that make a model: weights, configs, vocabularies, code."""
    made = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in _MODEL and p.is_file()):
        made.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            for part in iter(lambda: stream.read(2**22), b""):
                made.update(part)
    return made.hexdigest()


def picture(out: Path, index: int) -> Path:
    """The file of image `index`."""
    return out / IMAGES / f"{index:06d}.png"


def latency_of(out: Path) -> dict[str, Any] | None:
    """What was measured of the model while its images were drawn."""
    return _said(out).get("latency")


def _other(was: Any, now: Any) -> bool:
    """Lists may be continued: more prompts than before, or fewer, are the same run."""
    if isinstance(was, list) and isinstance(now, list):
        shared = min(len(was), len(now))
        return was[:shared] != now[:shared]
    return bool(was != now)


def _said(out: Path) -> dict[str, Any]:
    if not (out / RUN_FILE).is_file():
        return {}
    try:
        said: dict[str, Any] = json.loads((out / RUN_FILE).read_text())
    except ValueError:
        raise UserError(f"'{out / RUN_FILE}' is damaged: choose another --out, or empty it") from None
    return said


def _blocks(order: Order, known: Mapping[int, Sample]) -> Iterator[list[int]]:
    size = order.batch or (_BATCH if order.prompts is None else _BATCH_OF_PROMPTS)
    for start in range(0, order.n, size):
        missing = [i for i in range(start, min(start + size, order.n)) if i not in known]
        if missing:
            yield missing


def _draw(pipeline: Any, out: Path, order: Order, blocks: Sequence[list[int]], rank: int) -> None:
    from ..exporting.pipeline import generate

    if not blocks:
        return
    with (out / _PART.replace("*", str(rank))).open("a", encoding="utf-8") as lines:
        for numbers in blocks:
            options: dict[str, Any] = {"steps": order.steps, "guidance": order.guidance, "batch": len(numbers)}
            made = generate(pipeline, len(numbers), order.seed, prompts=order.prompts, numbers=numbers, **options)
            _fits(made.images, order)
            _keep(made, numbers, out, order.seed, lines)


def _keep(made: Any, numbers: Sequence[int], out: Path, seed: int, lines: TextIO) -> None:
    """First the picture, then its line: what has a line has its picture."""
    shared = {"nfe": made.nfe, "guidance": made.guidance, "scheduler": made.scheduler}
    samples = samples_of(made.images, made.labels, seed, timesteps=tuple(made.timesteps), **shared)
    texts = made.prompts or [None] * len(numbers)
    for sample, number, text, image in zip(samples, numbers, texts, made.images):
        file = picture(out, number)
        aside = file.with_suffix(".part")
        save_image(image, aside)
        os.replace(aside, file)
        lines.write(line_of(replace(sample, index=number, prompt=text)))
        lines.flush()


def _fits(images: Tensor, order: Order) -> None:
    height, width = images.shape[-2:]
    if order.size is not None and (height, width) != (order.size, order.size):
        raise UserError(
            f"the protocol's images are {order.size}x{order.size}, this model draws {width}x{height}: choose a model of that "
            "size, or set `size` in a protocol of your own"
        )


def _pipeline(model: Path, order: Order, crew: Crew) -> Any:
    from ..exporting.network import takes_prompts
    from ..exporting.pipeline import load_pipeline

    pipeline = load_pipeline(model, device=crew.device)
    if takes_prompts(pipeline) != (order.prompts is not None):
        told = "draws what prompts say, and the protocol has none: give --prompts FILE"
        mute = "takes no prompts, and the protocol has some: choose a text-to-image model, or a protocol without"
        raise UserError(f"'{model}' {told if order.prompts is None else mute}")
    return pipeline


def _time(pipeline: Any, out: Path, order: Order) -> None:
    assert order.latency is not None
    found = latency(pipeline, order.latency, order.steps, order.guidance, order.prompts)
    write_text(out / RUN_FILE, json.dumps({**_said(out), "latency": found.plain()}) + "\n")


def _whole(out: Path) -> dict[int, Sample]:
    """Samples whose picture is there, by index."""
    samples = read_manifest(out / MANIFEST) if (out / MANIFEST).is_file() else []
    return {sample.index: sample for sample in samples if picture(out, sample.index).is_file()}


def _fold(out: Path) -> None:
    """Takes the lines of all processes into the manifest, in order. A last line that was cut off is left out."""
    parts = sorted(out.glob(_PART))
    if not parts:
        return
    known = _whole(out)
    for part in parts:
        text = part.read_text(encoding="utf-8")
        write_text(part, text[: text.rfind("\n") + 1])
        known.update({sample.index: sample for sample in read_manifest(part)})
    write_manifest([known[i] for i in sorted(known)], out / MANIFEST)
    for part in parts:
        part.unlink()
