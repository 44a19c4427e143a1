"""Metrics that give a number to each image, by name; set metrics, such as FID, stand in `registry.METRICS`.

A new one is a line here, or an entry point in the group `fewstep.image_metrics`: a function of options that gives an
`ImageMetric`. Because they have a value an image, their means come with intervals and can be compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..registry import Registry
from ..rewards.base import Asked, Reward
from .evaluate import Instrument, judge_for

IMAGE_METRICS = Registry(
    "metric of images",
    "fewstep.image_metrics",
    {
        "clip_score": "fewstep.evaluation.clip_score:clip_score",
        "hpsv2": "fewstep.evaluation.image_metrics:hpsv2",
        "image_reward": "fewstep.evaluation.image_metrics:image_reward",
        "pickscore": "fewstep.evaluation.image_metrics:pickscore",
        "aesthetic": "fewstep.evaluation.image_metrics:aesthetic",
        "geneval": "fewstep.evaluation.geneval_metric:geneval",
        "reward": "fewstep.evaluation.image_metrics:reward",
    },
)
Values = Callable[[Tensor, Sequence[str] | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class ImageMetric:
    """values(images uint8 [n, C, H, W], prompts or None, labels [n] or None) -> [n].

    name: in metrics.json. tool: what the values are read with. chunk: of a group's values, `name.GROUP.std` is the
    standard deviation of means over so many; None: there is no such number. overall: whether `name.overall` is the plain
    mean of the groups' means.
    """

    name: str
    tool: Instrument
    values: Values
    chunk: int | None = None
    overall: bool = False


def hpsv2(options: Mapping[str, Any]) -> ImageMetric:
    """100 times HPSv2's cosine; of each style also the mean, and the spread of its means over 80 images."""
    return _rewarded("hpsv2", {"hpsv2": dict(options)}, scale=100.0, chunk=80)


def image_reward(options: Mapping[str, Any]) -> ImageMetric:
    """The score r of ImageReward itself, without the cap that training puts on it."""
    return _rewarded("image_reward", {"image_reward": {**options, "cap": None}})


def pickscore(options: Mapping[str, Any]) -> ImageMetric:
    """PickScore's cosine, not times its logit scale."""
    return _rewarded("pickscore", {"pickscore": dict(options)})


def aesthetic(options: Mapping[str, Any]) -> ImageMetric:
    """The aesthetic score, about 1 to 10."""
    return _rewarded("aesthetic", {"aesthetic": dict(options)})


def reward(options: Mapping[str, Any]) -> ImageMetric:
    """Any reward of `rewards.registry`, or a weighted sum: `reward: {classifier: null}`."""
    return _rewarded("reward", dict(options))


def default_device() -> str:
    """Where judges compute."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _rewarded(name: str, said: Mapping[str, Any], scale: float = 1.0, chunk: int | None = None) -> ImageMetric:
    try:
        judge, tool = judge_for(("reward",), said)
    except UserError as error:  # rewards speak of recipes; a protocol says the same options under `metrics`
        raise UserError(str(error).replace("config.reward.", "metrics.")) from None
    assert judge is not None and tool is not None  # the reward was named
    return ImageMetric(name, tool, lambda *given: scale * _judged(judge, *given), chunk)


@torch.no_grad()
def _judged(judge: Reward, images: Tensor, prompts: Sequence[str] | None, labels: Tensor | None) -> Tensor:
    device = next((p.device for p in judge.parameters()), torch.device("cpu"))
    return judge(images.to(device).float() / 127.5 - 1, Asked(prompts, labels)).cpu()
