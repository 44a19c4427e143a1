"""GenEval as a metric of images, for protocols: 1 for an image that is right, 0 for one that is not.

    prompts: {path: geneval/evaluation_metadata.jsonl}
    per_prompt: 4
    metrics: {geneval: {prompts: geneval/evaluation_metadata.jsonl, detector: MASK2FORMER, clip: CLIP}}

`geneval.TASK` is a task's share of right images, `geneval.overall` the plain mean of the tasks, which papers report; `geneval`
itself is the mean over prompts, with its interval. Result files in the official form: `python -m fewstep.evaluation.geneval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..data.source import digest
from ..errors import UserError, nearest
from ..exporting.atomic import sha256
from ..models.hub import find_model
from .evaluate import Instrument
from .geneval import Colors, Detector, score_picture
from .geneval_files import Prompt, read_prompts
from .image_metrics import ImageMetric, default_device
from .protocols import data_folder

NEEDS = ("prompts", "detector", "clip")


def geneval(options: Mapping[str, Any]) -> ImageMetric:
    """options: prompts (evaluation_metadata.jsonl), detector and clip (folders of Mask2Former and CLIP).

    UserError for another key, one that is missing, and networks or prompts that are not there.
    """
    from .detection import ClipColors, Mask2Former

    for key in options:
        if key not in NEEDS:
            raise UserError(f"metrics.geneval: unknown key '{key}': {nearest(key, NEEDS)}")
    missing = [key for key in NEEDS if key not in options]
    if missing:
        raise UserError(
            f"metrics.geneval: '{missing[0]}' is missing: write {{{', '.join(f'{n}: ...' for n in NEEDS)}}}"
        )
    beside = data_folder() / options["prompts"]
    prompts = {said["prompt"]: said for said in read_prompts(beside if beside.exists() else options["prompts"])}
    detector = Mask2Former(options["detector"], default_device())
    colors = ClipColors.at(options["clip"], default_device())
    files = [f for name in ("detector", "clip") for f in sorted(find_model(options[name]).rglob("*.safetensors"))]
    weights = digest(*map(sha256, files))
    tool = Instrument("mask2former + clip", "transformers", version("transformers"), weights, "short side 800")
    return ImageMetric("geneval", tool, lambda *given: _right(prompts, detector, colors, *given), overall=True)


def _right(
    prompts: Mapping[str, Prompt],
    detector: Detector,
    colors: Colors,
    images: Tensor,
    texts: Sequence[str] | None,
    _labels: Tensor | None,
) -> Tensor:
    from PIL import Image

    if texts is None or any(text not in prompts for text in texts):
        raise UserError(
            "metrics.geneval scores images of its own prompts: give the same evaluation_metadata.jsonl as --prompts"
        )
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()).convert("RGB") for x in images]
    found = [score_picture(p, prompts[text], detector, colors)["correct"] for p, text in zip(pictures, texts)]
    return torch.tensor(found, dtype=torch.float64)
