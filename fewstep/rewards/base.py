"""The contract of a reward: images and what was asked of them -> one number an image.

    class Brightness(Reward):
        name = "brightness"

        def score(self, images, asked):
            return images.mean((1, 2, 3))

The rest (checks, float32, no graph where there is none) is done by `Reward.forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import UserError

if TYPE_CHECKING:
    from ..data.batch import Batch

R = TypeVar("R", bound="Reward")


class RewardSpec(BaseModel):
    """What a recipe may say about every reward; each adds its own options."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
    weight: float = Field(default=1.0, description="factor in a sum of rewards")


@dataclass(frozen=True)
class Asked:
    """What the rows of a batch were asked to show: prompts, labels [rows], both or nothing."""

    prompts: Sequence[str] | None = None
    labels: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> Asked:
        """`batch.prompt` and `batch.cond["label"]`, as far as the batch has them."""
        cond = batch.fields.get("cond") or {}
        return cls(batch.fields.get("prompt"), cond.get("label"))

    def repeated(self, k: int) -> Asked:
        """The same rows k times, in the order of `torch.cat([images] * k)`."""
        return Asked(
            None if self.prompts is None else list(self.prompts) * k,
            None if self.labels is None else torch.cat([self.labels] * k),
        )

    def __getitem__(self, rows: slice | Tensor) -> Asked:
        """Some rows, by a slice or by numbers [n]; both fields stay paired."""
        labels = self.labels
        if isinstance(rows, slice):
            return Asked(self.prompts and list(self.prompts)[rows], labels if labels is None else labels[rows])
        chosen = self.prompts and [self.prompts[i] for i in rows.tolist()]
        return Asked(chosen, labels if labels is None else labels[rows.to(labels.device)])


class Reward(nn.Module):
    """A frozen judge of images.

    needs: what it reads of `Asked` ("prompt", "label" or nothing). differentiable: whether gradients reach the images.
    logit_scale: this times the reward is a logit, so that softmax over images of one prompt is a preference; of a sum, the
    largest of its parts.
    """

    name: ClassVar[str]
    Config: ClassVar[type[RewardSpec]] = RewardSpec
    needs: Literal["prompt", "label"] | None = None
    differentiable: bool = True
    logit_scale: float = 1.0

    def forward(self, images: Tensor, asked: Asked = Asked()) -> Tensor:
        """Rewards [rows] in float32 of images [rows, C, H, W] in [-1, 1]. UserError when what it needs was not asked."""
        self._check(images, asked)
        if self.differentiable:
            return self.score(images, asked).float()
        with torch.no_grad():
            return self.score(images, asked).float()

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        """[rows]; what a reward defines. `asked` holds what `needs` says."""
        raise NotImplementedError(f"{type(self).__name__} defines no score")

    def train(self: R, mode: bool = True) -> R:
        """Stays in eval mode: dropout inside a judge would be noise on the reward."""
        return super().train(False)

    def _check(self, images: Tensor, asked: Asked) -> None:
        given = {"prompt": asked.prompts, "label": asked.labels, None: images}[self.needs]
        if given is None:
            raise UserError(
                f"reward '{self.name}' scores images by their {self.needs}, which these batches lack: choose data with "
                f"{self.needs}s, or another reward"
            )
        if len(given) != len(images):
            raise UserError(
                f"reward '{self.name}' got {len(images)} images and {len(given)} {self.needs}s: one each, see Asked.repeated"
            )


class Weighted(Reward):
    """sum_k w_k R_k. Differentiable when every part is."""

    name = "weighted"

    def __init__(self, parts: Mapping[str, Reward], weights: Mapping[str, float]):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.weights = {name: float(weights[name]) for name in parts}
        self.differentiable = all(part.differentiable for part in parts.values())
        self.logit_scale = max(part.logit_scale for part in parts.values())
        needs: list[Any] = [part.needs for part in parts.values() if part.needs]
        self.needs = needs[0] if needs else None

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        """The weighted sum [rows]."""
        return torch.stack([weight * self.parts[name](images, asked) for name, weight in self.weights.items()]).sum(0)
