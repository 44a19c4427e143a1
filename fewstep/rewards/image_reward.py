"""ImageReward-v1.0 (Xu et al. 2023, arXiv 2304.05977), in the form that trains generators."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from .base import Asked, Reward
from .blip import BlipScore, Sizes, to_transformers
from .pixels import Pixels
from .tokens import tokenizer, tokenizer_for
from .weights import Published, WeightsSpec, filled, planning

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the paper's data
TOKENS = 35

WEIGHTS = Published(
    "config.reward.image_reward.from",
    "THUDM/ImageReward",
    "`hf download THUDM/ImageReward ImageReward.pt`, converted to safetensors",
)
TOKENIZER = Published(
    "config.reward.image_reward.tokenizer",
    "google-bert/bert-base-uncased",
    "`hf download google-bert/bert-base-uncased vocab.txt tokenizer_config.json`, or put vocab.txt beside the weights",
)


class ImageRewardSpec(WeightsSpec):
    """Options of `image_reward`. Without `cap` the value is the score r itself."""

    tokenizer: str | None = Field(
        default=None, description="folder or hub id of BERT's uncased tokenizer; default: beside the weights"
    )
    cap: float | None = Field(default=2.0, description="score from which on nothing is gained; null = none")


class ImageReward(Reward):
    """R(x, c) = -relu(cap - r) with r the standardised score, about N(0, 1) over its data; so R <= 0.

    The image has no gradient where r >= cap: a good image is not driven on.
    """

    name = "image_reward"
    Config = ImageRewardSpec
    needs = "prompt"

    def __init__(self, spec: ImageRewardSpec):
        super().__init__()
        self.cap, place = spec.cap, WEIGHTS.find(spec.source)
        self.network, sizes = _network(place, spec)
        self.pixels = Pixels(sizes.image)
        folder = tokenizer_for(place, TOKENIZER, spec.tokenizer)
        self.tokenize = tokenizer("BertTokenizer", folder, TOKENIZER.option, TOKENS)

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        """-relu(cap - r), [rows]."""
        return capped(self.standing(images, asked), self.cap)

    def standing(self, images: Tensor, asked: Asked) -> Tensor:
        """The score r [rows] as evaluation reports it."""
        assert self.tokenize is not None
        tokens = self.tokenize(list(asked.prompts or []))
        ids, mask = (tokens[name].to(images.device) for name in ("input_ids", "attention_mask"))
        return (self.network(self.pixels(images), ids, mask) - MEAN) / STD


def capped(r: Tensor, cap: float | None) -> Tensor:
    """-relu(cap - r), or r when there is no cap."""
    return r if cap is None else -F.relu(cap - r)


def _network(place: Path | None, spec: ImageRewardSpec) -> tuple[BlipScore, Sizes]:
    if place is None or planning():
        return filled(lambda: BlipScore(Sizes()), None, spec.dtype, WEIGHTS.option), Sizes()
    state = WEIGHTS.read(place)
    try:
        sizes = Sizes.of(state)
    except KeyError as error:
        raise UserError(f"{WEIGHTS.option}: '{place}' holds no ImageReward: {error} is missing") from None
    return filled(lambda: BlipScore(sizes), to_transformers(state), spec.dtype, WEIGHTS.option, "head."), sizes
