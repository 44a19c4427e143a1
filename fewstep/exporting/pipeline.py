"""Loading an exported folder and sampling it: images that depend on the seed and their own index, not on the batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from ..draws import Draw
from ..errors import UserError
from ..evaluation.nfe import count_calls
from ..models.folder import card, refuse_pickles
from .fresh import given_noise, images_of
from .guidance_number import guidance_number
from .index import pipeline_class
from .inference import set_attention, set_offload
from .network import class_count, makes_videos, network_of, takes_prompts


@dataclass(frozen=True)
class Generated:
    """What `generate` gives back.

    images [n, channels, height, width] uint8, rounded as PIL output is, or videos [n, channels, frames, height, width];
    labels [n] int64, or None; prompts [n], or None.
    nfe: network evaluations an image, counted. timesteps: labels that the scheduler had the network fed.
    guidance: the scale asked of the pipeline, None where it takes none.
    """

    images: Tensor
    labels: Tensor | None
    prompts: list[str] | None
    nfe: float
    ms_per_image: float
    timesteps: tuple[float, ...]
    scheduler: str
    guidance: float | None


def load_pipeline(
    folder: str | Path,
    trust_remote_code: bool = False,
    device: torch.device | str | None = None,
    attention: str | None = None,
    offload: str | None = None,
) -> Any:
    """The diffusers pipeline in a local folder, on `device` (default: the GPU if there is one).

    attention, offload: see `inference`; an offloaded pipeline waits on the CPU and computes on `device`.
    Code of the folder runs only with `trust_remote_code`; folders that carry a pipeline of `fewstep_pipelines` need it
    not, because the installed class is used. Raises UserError for a missing or broken folder, a pickle, or such code.
    """
    folder = Path(folder)
    refuse_pickles(folder)
    found = pipeline_class(folder, trust_remote_code)
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        with _quiet():
            pipeline = found.from_pretrained(folder, use_safetensors=True, **trust)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"cannot load '{folder}': {str(error).strip().splitlines()[0]}") from error
    if attention is not None:
        with _quiet():
            set_attention(pipeline, attention, trust_remote_code)
    if offload is not None:
        set_offload(pipeline, offload, device)
        return pipeline
    return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def generate(
    source: str | Path | Any,
    n: int,
    seed: int = 0,
    labels: Sequence[int] | Tensor | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
    prompts: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
) -> Generated:
    """n images or videos of a folder or a loaded pipeline. Image i starts from noise (seed, i), whatever `batch` is.

    labels [n]: default i % classes. prompts: of a text-to-image model, which needs some; image i has number i modulo
    their count. steps, guidance: default what the folder says. batch: default 256, 8 with prompts, 1 of videos.
    numbers [n]: which images i are made, default 0 .. n - 1; so a set may be made in pieces.
    progress(done, n) after each batch.
    Raises UserError for a broken folder, labels or prompts that do not fit, or guidance where the pipeline has none.
    """
    if n < 1 or (batch is not None and batch < 1):
        raise UserError(f"n and batch must be at least 1, not {n} and {batch}")
    pipeline = load_pipeline(source, trust_remote_code) if isinstance(source, str | Path) else source
    steps, guidance = _defaults(pipeline, steps, guidance)
    which = np.arange(n) if numbers is None else np.asarray(numbers)
    chosen, texts = _labels(pipeline, which, labels), _prompts(pipeline, which, prompts)
    batch = batch or (1 if makes_videos(pipeline) else 256 if texts is None else 8)
    images, seconds = [], 0.0
    with count_calls(network_of(pipeline)) as calls:
        for start in range(0, n, batch):
            rows = which[start : start + batch]
            part = None if chosen is None else chosen[start : start + batch].tolist()
            said = None if texts is None else texts[start : start + batch]
            began = time.perf_counter()
            pixels = _pixels(pipeline, Draw.for_images(seed, rows), part, steps, guidance, said)
            seconds += time.perf_counter() - began
            images.append(torch.from_numpy((pixels * 255).round().astype("uint8")).movedim(-1, 1))
            if progress is not None:
                progress(start + len(rows), n)
    return Generated(
        images=torch.cat(images).contiguous(),
        labels=chosen,
        prompts=texts,
        nfe=calls.per_image(n),
        ms_per_image=1000 * seconds / n,
        timesteps=tuple(torch.as_tensor(pipeline.scheduler.timesteps).tolist()),
        scheduler=type(pipeline.scheduler).__name__,
        guidance=guidance,
    )


def sample(model: str | Path | Any, n: int, seed: int = 0, **options: Any) -> Tensor:
    """Images, or videos, [n, channels, ..., height, width] uint8 of a folder or pipeline; options as for `generate`."""
    return generate(model, n, seed, **options).images


def addresses(draw: Draw) -> Callable[[int, tuple[int, ...]], Tensor]:
    """The addresses that `maths.solvers.rollout` draws from, so that a pipeline makes the images of training."""
    return lambda i, shape: draw.normal("rollout.start" if i == 0 else f"rollout.{i - 1}", *shape[1:])


def _pixels(
    pipeline: Any,
    draw: Draw,
    labels: list[int] | None,
    steps: int | None,
    guidance: float | None,
    prompts: list[str] | None,
) -> Any:
    number = None if guidance is None else guidance_number(type(pipeline).__name__, guidance)
    try:
        with given_noise(pipeline, addresses(draw)):
            return images_of(pipeline, draw.rows, labels, steps, number, prompts, _card(pipeline).get("size"))
    except ValueError as error:  # a number of steps or a guidance that the scheduler or pipeline cannot do
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{type(pipeline).__name__} refuses steps={steps}, guidance={guidance}: {reason}") from error


def _defaults(pipeline: Any, steps: int | None, guidance: float | None) -> tuple[int | None, float | None]:
    whole = _card(pipeline)
    said = whole.get("schedule", {})
    steps = steps or (len(said["u"]) if said else None)
    if whole.get("guidance_scale") == "baked" and guidance not in (None, 1):
        raise UserError("guidance is baked into this model, which ignores the number: leave it out")
    takes = "guidance_scale" in inspect.signature(pipeline.__call__).parameters
    if takes and whole.get("guidance_scale") != "none":
        return steps, said.get("guidance") if guidance is None else guidance
    if guidance not in (None, 1):
        raise UserError(f"{type(pipeline).__name__} has no guidance: leave it out (1 is off)")
    return steps, None


def _card(pipeline: Any) -> dict[str, Any]:
    """fewstep.json of the folder that the pipeline was loaded from; empty without one."""
    origin = pipeline.config.get("_name_or_path")
    return card(Path(origin)) if origin else {}


def _labels(pipeline: Any, which: NDArray[np.int64], labels: Sequence[int] | Tensor | None) -> Tensor | None:
    classes = class_count(network_of(pipeline))
    if classes is None:
        if labels is not None:
            raise UserError("this model has no classes: leave the labels out")
        return None
    n = len(which)
    chosen = torch.from_numpy(which) % classes if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    if chosen.shape != (n,) or (n and not 0 <= int(chosen.min()) <= int(chosen.max()) < classes):
        raise UserError(f"labels must be {n} numbers in 0..{classes - 1}")
    return chosen


def _prompts(pipeline: Any, which: NDArray[np.int64], prompts: Sequence[str] | None) -> list[str] | None:
    """[n], the given ones round and round; None for a model that takes none."""
    if not takes_prompts(pipeline):
        if prompts:
            raise UserError("this model takes no prompts: leave --prompt out")
        return None
    if not prompts:
        raise UserError('this model draws what a prompt says: give one or more, e.g. --prompt "a photo of a cat"')
    return [prompts[i % len(prompts)] for i in which.tolist()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' loading bar and its remark that a stock pipeline was written for another scheduler."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
