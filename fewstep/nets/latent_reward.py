"""A latent proxy reward model: a small CLIP on latents that learns, while a student trains, to prefer what an expert prefers.

    proxy = LatentReward.reading(student_handle, ProxySpec(width=64, depth=2, patch=2))
    cosines, scale = proxy(torch.cat([a, b, c]), cond)           # [3, rows]: three latents a condition
    loss = preference_rows(scale * cosines, expert_logits)

A student may then follow the proxy's gradient: no decoder in its backward pass, and no derivative of the expert
(RG-LCD, arXiv 2403.11027). The paper's condition tower is a text transformer of CLIP's; here it is an attention
pool and an MLP on the states of the pipeline's own frozen text encoder, or an embedding of class labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from ..maths.divergences import forward_kl
from ..maths.losses import cross_entropy_rows
from ..resources import locate

if TYPE_CHECKING:
    from ..roles import Handle

TRUTH = 2  # place among (student's prediction, consistency target, ground truth, the neighbour's)
WEIGHTS = "proxy.role.safetensors"  # as checkpoints of a run with the role `proxy` hold it
HIGHEST_SCALE = 100.0
HEAD = 64  # width of an attention head


class ProxySpec(BaseModel):
    """Sizes of a `LatentReward` (the paper's by default), and what it learns from the expert."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    width: int = Field(default=512, gt=0, description="of a token; above 64 a multiple of it")
    depth: int = Field(default=12, gt=0, description="transformer blocks on the latents")
    patch: int = Field(default=4, gt=0, description="side of a token; divides the latent's sides")
    embed: int = Field(default=1024, gt=0, description="where latents and conditions meet")
    loss: Literal["kl", "cross_entropy"] = "kl"
    smooth_gt_label: bool = Field(
        default=False, description="a made latent that the expert ranks above the true one counts as its equal"
    )
    contrast: bool = Field(
        default=True, description="a fourth latent, the true one of the neighbouring row; else the paper's three"
    )
    expert_scale: float | None = Field(
        default=None, gt=0, description="this times the reward is the expert's logit; null: the reward's own scale"
    )
    source: str | None = Field(
        default=None, alias="from", description="checkpoint folder of a run whose proxy to start with; null: random"
    )


class LatentReward(nn.Module):
    """cos(image(latents), condition(cond)), and a learnt scale that makes logits of it, as in CLIP (at most 100)."""

    def __init__(self, image: nn.Module, condition: nn.Module):
        super().__init__()
        self.image, self.condition = image, condition
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def reading(cls, student: Handle, spec: ProxySpec) -> LatentReward:
        """A proxy for what `student` makes, with the conditions it is given; weights from `spec.source` when that is set."""
        from ..models.registry import FAMILIES

        shape = FAMILIES.get(str(student.family)).row_shape(student.module)
        proxy = cls(ImageTower(shape, spec), _condition(student, spec))
        if spec.source is not None and not proxy.log_scale.is_meta:
            proxy.load(spec.source)
        return proxy

    def forward(self, latents: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Cosines [k, rows] of k latents a row of `cond`, given as `torch.cat` of k times [rows, C, H, W]; and the scale."""
        images, words = _unit(self.image(latents)), _unit(self.condition(cond))
        # A sum of products and no matmul: autocast would take one to bfloat16, whose steps near .3 are .001.
        cosines = (images.unflatten(0, (-1, len(words))) * words).sum(-1)
        return cosines, self.log_scale.exp().clamp(max=HIGHEST_SCALE)

    def load(self, folder: str | Path) -> None:
        """Weights from a checkpoint folder. UserError when there are none, or of other sizes."""
        from safetensors.torch import load_file

        file = locate(folder) / WEIGHTS
        if not file.is_file():
            raise UserError(f"config.proxy.from: no '{file}': give the folder of a checkpoint of a run in proxy mode")
        try:
            self.load_state_dict(load_file(file))
        except RuntimeError as error:
            raise UserError(
                f"config.proxy.from: '{file}' has other sizes: {str(error).splitlines()[-1].strip()}"
            ) from None


class ImageTower(nn.Module):
    """A vision transformer on latents [rows, C, H, W] -> [rows, embed]: patches, learnt places, mean over tokens."""

    def __init__(self, shape: tuple[int, ...], spec: ProxySpec):
        super().__init__()
        if len(shape) != 3 or any(side % spec.patch for side in shape[1:]):
            raise UserError(
                f"config.proxy.patch={spec.patch} does not divide the latents' {'x'.join(map(str, shape[1:]))}: choose a divisor"
            )
        self.shape = tuple(shape)
        tokens = shape[1] * shape[2] // spec.patch**2
        self.patches = nn.Conv2d(shape[0], spec.width, spec.patch, stride=spec.patch)
        self.places = nn.Parameter(torch.randn(tokens, spec.width) * 0.02)
        self.blocks = nn.Sequential(*(_block(spec.width) for _ in range(spec.depth)))
        self.leave = nn.Sequential(nn.LayerNorm(spec.width), nn.Linear(spec.width, spec.embed, bias=False))

    def forward(self, latents: Tensor) -> Tensor:
        """[rows, embed]. UserError for latents of another size than the network's own."""
        if latents.shape[1:] != self.shape:
            raise UserError(
                f"the proxy reads latents of {self.shape} and got {tuple(latents.shape[1:])}: "
                "set data.train.size to the size of the teacher's own pictures"
            )
        tokens = self.patches(latents).flatten(2).transpose(1, 2) + self.places
        return self.leave(self.blocks(tokens).mean(1))


class LabelTower(nn.Module):
    """An embedding a class: `cond["label"]` [rows] -> [rows, embed]."""

    def __init__(self, classes: int, embed: int):
        super().__init__()
        self.table = nn.Embedding(classes, embed)

    def forward(self, cond: Cond) -> Tensor:
        """[rows, embed]."""
        return self.table(cond["label"])


class PromptTower(nn.Module):
    """`cond["prompt_embeds"]` [rows, tokens, states] -> [rows, embed]: one learnt query attends, then an MLP."""

    def __init__(self, states: int, width: int, embed: int):
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(states), nn.Linear(states, width))
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.pool = nn.MultiheadAttention(width, _heads(width), batch_first=True)
        self.leave = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, embed)
        )

    def forward(self, cond: Cond) -> Tensor:
        """[rows, embed]."""
        words = self.enter(cond["prompt_embeds"])
        query = self.query.expand(len(words), 1, -1)
        return self.leave(self.pool(query, words, words, need_weights=False)[0][:, 0])


def neighbours(rows: Tensor) -> Tensor:
    """Rows 2j and 2j + 1 changed about; the last of an odd number stays. Within a pair, so micro-batches do not matter."""
    order = torch.arange(len(rows), device=rows.device) ^ 1
    return rows[order.clamp(max=len(rows) - 1)]


def preference_rows(proxy: Tensor, expert: Tensor, loss: str = "kl", smooth_gt_label: bool = False) -> Tensor:
    """sum over the pairs (i, j) of D( softmax(E_i, E_j) || softmax(P_i, P_j) ), [rows], from logits [k, rows].

    The k latents, all judged for the row's own condition, are the student's prediction, its target, the ground truth and
    perhaps a neighbour's: pairs never mix conditions. Only differences of logits matter; the gradient in P sums to zero
    over the k. D: KL ("kl"), or the cross entropy to the one that the expert prefers, halves for a tie
    ("cross_entropy"). smooth_gt_label: where the expert prefers a made latent to the ground truth, its distribution over
    that pair becomes (1/2, 1/2).
    """
    divergence = DIVERGENCES[loss]
    rows = []
    for i, j in combinations(range(len(proxy)), 2):
        theirs = torch.stack((expert[i], expert[j]), -1)
        if smooth_gt_label and j == TRUTH:
            theirs = theirs.masked_fill((expert[i] > expert[j])[:, None], 0.0)
        rows.append(divergence(torch.stack((proxy[i], proxy[j]), -1), theirs))
    return torch.stack(rows).sum(0)


def _to_preferred(proxy: Tensor, expert: Tensor) -> Tensor:
    """Cross entropy [rows] of pairs of logits [rows, 2] to the larger of the expert's."""
    best = (expert == expert.amax(-1, keepdim=True)).float()
    return cross_entropy_rows(proxy, best / best.sum(-1, keepdim=True))


DIVERGENCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": forward_kl, "cross_entropy": _to_preferred}


def _condition(student: Handle, spec: ProxySpec) -> nn.Module:
    """The tower for text states where the network reads them, else for labels. UserError for neither."""
    from ..models.registry import FAMILIES

    family = FAMILIES.get(str(student.family))
    blank = family.blank(student.module)
    if "prompt_embeds" in blank:
        return PromptTower(blank["prompt_embeds"].shape[-1], spec.width, spec.embed)
    try:
        null = family.null(student.module, Cond(label=torch.zeros(1, dtype=torch.long, device="cpu")))
    except UserError:
        raise UserError(
            "config.mode: proxy ranks images for a label or a prompt, and this network takes neither: write mode: direct"
        ) from None
    return LabelTower(int(null["label"]) + 1, spec.embed)


def _block(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        width, _heads(width), 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def _heads(width: int) -> int:
    if width > HEAD and width % HEAD:
        raise UserError(f"config.proxy.width={width}: above {HEAD} choose a multiple of it")
    return max(1, width // HEAD)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
