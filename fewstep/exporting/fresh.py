"""Running a diffusers pipeline on given noise: inside fewstep, and as a script in a process that has no fewstep.

    python fresh.py FOLDER REQUEST.safetensors ANSWER.safetensors

The script imports diffusers, torch, numpy and safetensors only, and bars the way to fewstep. REQUEST holds `noise.0`
(start), `noise.1` ... (what the scheduler draws) and maybe `labels` or `lengths`; its metadata says guidance, trust, and,
as a JSON list or null, prompts, size, and numbers of steps, for each of which the samples are made.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def given_noise(pipeline: Any, noise: Callable[[int, tuple[int, ...]], Any]) -> Iterator[None]:
    """Within the block `randn_tensor` of the pipeline's and its scheduler's module answers noise(i, shape) to call i.

    Stock pipelines take no noise for the scheduler, some take none at all, and ConsistencyModelPipeline refuses latents
    of other than three channels; but all draw through this one function, the start first. Where the pipeline packs its
    latents, its scheduler draws for packed ones: `noise` is asked for latents always.
    """
    bases = [*type(pipeline).__mro__, type(pipeline.scheduler)]  # a pipeline may inherit what draws its start
    modules: set[Any] = {sys.modules[base.__module__] for base in bases}
    kept = {module: module.randn_tensor for module in modules if hasattr(module, "randn_tensor")}
    asked: list[tuple[int, ...]] = []
    pack = getattr(pipeline, "_pack_latents", None)

    def answer(shape: Any, *_generator: Any, device: Any = None, dtype: Any = None, **_other: Any) -> Any:
        asked.append(tuple(shape))
        if pack is None or len(asked) == 1:
            return noise(len(asked) - 1, asked[-1]).to(device=device, dtype=dtype)
        rows, *_, channels, height, width = asked[0]
        latents = noise(len(asked) - 1, asked[0]).to(device=device, dtype=dtype)
        return pack(latents, rows, channels, height, width)

    try:
        for module in kept:
            module.randn_tensor = answer
        yield
    finally:
        for module, function in kept.items():
            module.randn_tensor = function


def images_of(
    pipeline: Any,
    rows: int,
    labels: Sequence[int] | None,
    steps: int | None,
    guidance: float | None,
    prompts: Sequence[str] | None = None,
    size: Sequence[int] | None = None,
) -> Any:
    """Images [rows, height, width, channels] in 0..1, or videos [rows, frames, height, width, channels].

    What is None, or no argument of the pipeline's, is not passed. guidance: in the pipeline's own number. size: (height,
    width) in pixels, of videos (frames, height, width), for pipelines whose network does not say it.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    said = {
        "batch_size": rows,
        "class_labels": labels,
        "prompt": None if prompts is None else list(prompts),  # Z-Image's pipeline writes into the list
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    if size is not None:
        *frames, height, width = size
        # SANA's would draw at the nearest size of its own table, and resize.
        said |= {"height": height, "width": width, "use_resolution_binning": False}
        said["num_frames"] = frames[0] if frames else None
    said = {k: v for k, v in said.items() if v is not None and k in takes}
    if "intermediate_timesteps" in takes and steps not in (None, 2):
        said["intermediate_timesteps"] = None  # SANA-Sprint's: the default is the second level of two steps alone
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(output_type="np", **said)
    return made.frames if "frames" in made else made.images


def chains_of(pipeline: Any, lengths: Sequence[int], steps: int | None, **options: Any) -> Any:
    """Protein backbones [rows, residues, 3] in nanometres, 0 after the end of each. What is None is not passed."""
    pipeline.set_progress_bar_config(disable=True)
    said = {"num_inference_steps": steps, **options}
    return pipeline(lengths=list(lengths), **{k: v for k, v in said.items() if v is not None}).coords_nm


def main(folder: str, request: str, answer: str) -> None:
    """Loads the pipeline in `folder`, samples it, and writes `samples`.

    Images are [rows, channels, height, width] in 0..1, videos [rows, channels, frames, height, width], chains [rows,
    residues, 3] in nanometres.
    """
    for name in ("fewstep", "fewstep_pipelines", "fewstep_kernels"):
        sys.modules[name] = None  # type: ignore[assignment]  # from here on, importing it fails
    import torch
    from diffusers import DiffusionPipeline
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(request, "pt") as file:
        said, given = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    trust = {"trust_remote_code": True} if said["trust"] == "yes" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **trust)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None  # of SDXL, where the package for it is installed: no work of the network
    labels = given["labels"].tolist() if "labels" in given else None
    asked = (float(said["guidance"]), json.loads(said["prompts"]), json.loads(said["size"]))

    def noise(i: int, shape: tuple[int, ...]) -> Any:
        return given.get(f"noise.{i}", torch.zeros(shape))  # a last step to t = 0 multiplies its noise by 0

    def samples(steps: int) -> Any:
        if "lengths" in given:
            return chains_of(pipeline, given["lengths"].tolist(), steps)
        pixels = images_of(pipeline, len(given["noise.0"]), labels, steps, *asked)
        return torch.from_numpy(pixels).movedim(-1, 1)

    made = []
    for steps in json.loads(said["steps"]):
        with given_noise(pipeline, noise):
            made.append(samples(steps))
    found = torch.cat(made).contiguous().float()
    save_file({"samples": found}, answer, {"pipeline": type(pipeline).__name__})


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this script, which is a part of fewstep
    main(*sys.argv[1:])
