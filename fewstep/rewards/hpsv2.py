"""Human Preference Score v2.1 (Wu et al. 2023, arXiv 2306.09341)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ..errors import UserError
from .cosine import VIT_H_14, ClipTowers, CosineReward, clip_model
from .open_clip import sizes_of, to_transformers
from .tokens import tokenizer, tokenizer_for
from .weights import Published, WeightsSpec, filled

HEADS = 16  # of both towers of ViT-H/14: the only size that shapes do not tell

WEIGHTS = Published(
    "config.reward.hpsv2.from",
    "xswu/HPSv2",
    "`hf download xswu/HPSv2 HPS_v2.1_compressed.pt`, converted to safetensors",
)
TOKENIZER = Published(
    "config.reward.hpsv2.tokenizer",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "`hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K tokenizer.json`, or put that file beside the weights",
)


class HPSv2Spec(WeightsSpec):
    """Options of `hpsv2`."""

    tokenizer: str | None = Field(
        default=None, description="folder or hub id of a CLIP tokenizer; default: beside the weights"
    )


class HPSv2(CosineReward):
    """cos(image, prompt) under a ViT-H/14 tuned on people's choices, about 0.2 to 0.35; papers print it times 100.

    `from`: a safetensors file of the published weights (open_clip's names), a folder with one, or a transformers folder.
    v2.0 and v2.1 are different weights with the same shapes: their values do not compare.
    """

    name = "hpsv2"
    Config = HPSv2Spec

    def __init__(self, spec: HPSv2Spec):
        place = WEIGHTS.find(spec.source)
        model = _model(place, spec.dtype)
        length = model.config.text_config.max_position_embeddings
        folder = tokenizer_for(place, TOKENIZER, spec.tokenizer)
        super().__init__(ClipTowers(model, tokenizer("CLIPTokenizer", folder, TOKENIZER.option, length)))


def _model(place: Path | None, dtype: torch.dtype) -> Any:
    from transformers import CLIPConfig, CLIPModel

    if place is None or (place / "config.json").is_file():
        return clip_model(place, WEIGHTS, VIT_H_14, dtype)
    state = WEIGHTS.read(place)
    try:
        sizes = sizes_of(state, HEADS)
    except KeyError as error:
        raise UserError(
            f"{WEIGHTS.option}: '{place}' holds no ViT under open_clip's names: {error} is missing"
        ) from None
    return filled(lambda: CLIPModel(CLIPConfig.from_dict(sizes)), to_transformers(state), dtype, WEIGHTS.option)
