"""CLIP's cosine, PickScore's, and that of a CLIP object made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .cosine import VIT_H_14, ClipTowers, CosineReward, Towers, clip_model
from .tokens import tokenizer
from .weights import Published, WeightsSpec

# OpenAI publishes TorchScript archives, which can run code; these are the same weights as safetensors
OPENAI = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}


class Clip(CosineReward):
    """cos(image, prompt) under any CLIP in transformers' form; by default OpenCLIP's ViT-H/14 (LAION-2B).

    `from` also takes OpenAI's own names, e.g. "ViT-B/32". The value is the cosine itself, about 0.2 to 0.4, not times 100.
    """

    name = "clip"
    Config = WeightsSpec
    published = Published(
        "config.reward.clip.from",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "`hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K config.json model.safetensors tokenizer.json`",
    )

    def __init__(self, spec: WeightsSpec):
        place = self.published.find(OPENAI.get(spec.source or "", spec.source))
        model = clip_model(place, self.published, VIT_H_14, spec.dtype)
        length = model.config.text_config.max_position_embeddings
        super().__init__(ClipTowers(model, tokenizer("CLIPTokenizer", place, self.published.option, length)))


class PickScore(Clip):
    """PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 tuned on people's choices; the cosine, not times logit_scale."""

    name = "pickscore"
    published = Published(
        "config.reward.pickscore.from",
        "yuvalkirstain/PickScore_v1",
        "`hf download yuvalkirstain/PickScore_v1 config.json model.safetensors`, and the tokenizer.json of "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K beside them",
    )


class EncoderTowers(Towers):
    """The towers of an object with `encode_image`, `encode_text`, `visual` and `logit_scale`: clip-anytorch, open_clip."""

    def __init__(self, model: Any, tokenize: Callable[[Sequence[str]], Tensor]):
        side = getattr(model.visual, "input_resolution", None) or model.visual.image_size
        size = int(side[0] if isinstance(side, tuple) else side)
        super().__init__(size, float(model.logit_scale.detach().float().exp()))
        self.model, self.tokenize = model, tokenize

    def image(self, pixels: Tensor) -> Tensor:
        """[rows, d]"""
        return self.model.encode_image(pixels.to(self._like.dtype))

    def text(self, prompts: Sequence[str]) -> Tensor:
        """[rows, d]"""
        return self.model.encode_text(self.tokenize(list(prompts)).to(self._like.device))

    @property
    def _like(self) -> Tensor:
        return self.model.visual.conv1.weight


def clip_of(model: Any, tokenize: Callable[[Sequence[str]], Tensor]) -> CosineReward:
    """A reward from a CLIP object that you loaded yourself, frozen.

    With clip-anytorch: `clip_of(model, partial(clip.tokenize, truncate=True))`; with open_clip: its model and tokenizer.
    """
    return CosineReward(EncoderTowers(model, tokenize)).eval().requires_grad_(False)
