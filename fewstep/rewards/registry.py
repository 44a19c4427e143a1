"""The table of rewards. A new one is a line here, or an entry point in the group `fewstep.rewards`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from ..models.build import parse
from ..registry import Registry

if TYPE_CHECKING:
    from .base import Reward

REWARDS = Registry(
    "reward",
    "fewstep.rewards",
    {
        "classifier": "fewstep.rewards.classifier:Classifier",
        "linear": "fewstep.rewards.linear:Linear",
        "clip": "fewstep.rewards.clip:Clip",
        "pickscore": "fewstep.rewards.clip:PickScore",
        "hpsv2": "fewstep.rewards.hpsv2:HPSv2",
        "image_reward": "fewstep.rewards.image_reward:ImageReward",
        "aesthetic": "fewstep.rewards.aesthetic:Aesthetic",
    },
)


def make_reward(said: str | Mapping[str, Any]) -> Reward:
    """The frozen reward that a recipe describes: a name, or `{name: options}`; several names are a weighted sum.

    Options may be left out (`{classifier: null}`); a text is short for `{from: TEXT}`. A part of weight 0 is checked but
    not built. UserError names an unknown reward, option or value, or the weights that are missing.
    """
    from .base import Weighted

    parts = {said: None} if isinstance(said, str) else dict(said)
    if not parts:
        raise UserError(f"config.reward names no reward: {nearest('', REWARDS.names())}")
    specs = {name: _spec(str(name), options) for name, options in parts.items()}
    weights = {name: spec.weight for name, spec in specs.items() if spec.weight}
    if not weights:
        raise UserError(f"config.reward: every weight is 0 ({', '.join(specs)}): give one of them another weight")
    made = {name: REWARDS.get(name)(specs[name]) for name in weights}
    alone = len(made) == 1 and set(weights.values()) == {1.0}
    reward: Reward = next(iter(made.values())) if alone else Weighted(made, weights)
    return reward.eval().requires_grad_(False)


def _spec(name: str, options: Any) -> Any:
    model, where = REWARDS.get(name).Config, f"config.reward.{name}"
    if isinstance(options, str) and "source" in model.model_fields:
        options = {"from": options}
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"{where}={options!r} is no mapping of options: {nearest('', _keys(model))}")
    return parse(model, options or {}, where)


def _keys(model: Any) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]
