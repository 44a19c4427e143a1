"""FerKD: soft labels of stored crops, adapted by how sure the teacher was (Shen; ICCV 2023, arXiv 2312.17473).

The teacher runs once over random crops of each image; its compressed answers are stored with the crops' geometry, as in
FKD (Shen, Xing; ECCV 2022, arXiv 2112.01528). Training replays exactly these crops and never loads the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...data.batch import Batch
from ...data.crops import Crops, CropSpec, random_crops, replay
from ...draws import Draw
from ...errors import UserError
from ...maths.losses import cross_entropy_rows
from ...maths.mixing import beta_quantile, cutmix_map, partners_within
from ...maths.soft_labels import FORMAT, LabelFormat, smooth_one_hot
from ...roles import Handle, Role
from ..base import Event, MethodConfig, Paper, Selection, Stage, Total, Update
from .base import ClassifierMethod

STORE = "crops"
READS = ("crop", "label", "half")  # config fields that decide what the label stage stores


class FerKDConfig(MethodConfig):
    """Knobs of FerKD. low = 0, middle = 0, high = 1 is FKD."""

    crop: CropSpec = CropSpec()
    label: str = Field(
        default="marginal_smoothing_k5", pattern=f"^({FORMAT})$", description="how soft labels are stored"
    )
    half: bool = Field(default=False, description="store probabilities as float16")
    confidence: Literal["max", "label"] = Field(
        default="max", description="c: the largest probability, or the true class's"
    )
    thresholds: Literal["quantile", "absolute"] = Field(
        default="quantile", description="of c over all crops, or values of c"
    )
    low: float = Field(default=0.05, description="T_L: crops below are discarded")
    middle: float = Field(default=0.2, description="T_M: crops below get the smoothed label in place of the teacher's")
    high: float = Field(default=1.0, description="T_T: crops above are discarded")
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="eps of the smoothed label")
    num_crops: int = Field(default=4, gt=0, description="crops of each image in a batch")
    single_crop_steps: int = Field(default=0, ge=0, description="steps at the end with one crop of each image")
    single_crop_lr: float = Field(default=0.05, gt=0, description="factor on the learning rate of these steps")
    selfmix: bool = Field(default=True, description="mix crops of one image")
    mixup_share: float = Field(default=0.5, ge=0, le=1, description="of the rows; the others are mixed by CutMix")
    temperature: float = Field(default=1.0, gt=0, description="of the student's logits")

    @model_validator(mode="after")
    def _ordered(self) -> FerKDConfig:
        if self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}, so every crop would be discarded")
        return self


@dataclass(frozen=True)
class Thresholds:
    """T_L, T_M, T_T, and the three regions that they cut the crops into."""

    low: float
    middle: float
    high: float

    @classmethod
    def at_quantiles(cls, confidence: Tensor, low: float, middle: float, high: float) -> Thresholds:
        """The thresholds below which these shares of the crops lie; 0 and 1 discard nothing."""
        ascending = confidence.flatten().sort().values
        ranks = (int(min(max(q, 0.0), 1.0) * (len(ascending) - 1)) for q in (low, middle, high))
        return cls(*(float(ascending[rank]) for rank in ranks))

    def regions(self, confidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masks (uninformative, hard, important): c < T_L or c > T_T, T_L <= c < T_M, T_M <= c <= T_T."""
        uninformative = (confidence < self.low) | (confidence > self.high)
        hard = ~uninformative & (confidence < self.middle)
        return uninformative, hard, ~uninformative & ~hard


def pick(confidence: Tensor, kept: Tensor, key: Tensor, count: int) -> Tensor:
    """Columns of `count` kept crops of each image [images, count] in the order of `key`; repeats where fewer are kept.

    An image that keeps none is served by its surest crop. confidence, kept (bool), key (0..1): [images, crops].
    """
    surest = torch.zeros_like(kept).scatter(1, confidence.argmax(1, keepdim=True), True)
    kept = torch.where(kept.any(1, keepdim=True), kept, surest)
    first = (key + 2 * ~kept).argsort(1)
    return first.gather(1, torch.arange(count) % kept.sum(1, keepdim=True))


class FerKD(ClassifierMethod):
    """L = -sum_k t_k log softmax(z / T)_k on replayed crops, term `soft`; no hard-label term and no factor T^2.

    t is the teacher's stored label in the important region (T_M <= c <= T_T). In the hard region (T_L <= c < T_M) it is
    1 - eps on the true class, eps / (C - 1) elsewhere. Other crops are discarded. SelfMix then mixes crops of one image.

    Stages: `label` (offline, writes the store "crops"), `train`, and `single_crop` when it has steps. `data.train` is a
    source of `crops`, whose ids are those of the store.
    """

    name = "ferkd"
    paper = Paper("FerKD: Surgical Label Adaptation for Efficient Distillation", "arXiv 2312.17473")
    proven = "reconstruction"
    Config = FerKDConfig
    teacher: Handle

    def roles(self) -> tuple[Role, ...]:
        """A frozen teacher, used by `label` alone, and the student with the optimiser that FKD gives a ResNet-50."""
        sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "decay": "cosine", "clip": None}
        return (Role("teacher"), Role("student", tune="full", train_mode=True, defaults={"optimizer": sgd}))

    def store_names(self) -> tuple[str, ...]:
        """One store: a row a crop."""
        return (STORE,)

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
        """As in `Method`; UserError when `data.train` is no source of crops."""
        train = sources.get("train")
        if not isinstance(train, Crops):
            raise UserError("ferkd replays crops: in data, write `train: {source: crops, of: {...}, per_image: 8}`")
        if train.classes is None:
            raise UserError("ferkd needs labels: `data.train.of` serves images without classes")
        super().bind(handles, sources, stores)

    def stages(self) -> Sequence[Stage]:
        """Labelling without a student, training without a teacher."""
        label = Stage("label", self.label_step, uses=("teacher",), reads=READS, offline=True, writes=(STORE,))
        train = Stage("train", self.train_step, uses=("student",), trains=("student",))
        c = self.config
        if c.single_crop_steps == 0:
            return (label, train)
        single = {"steps": c.single_crop_steps, "lr": c.single_crop_lr}
        return (label, train, Stage("single_crop", self.train_step, uses=("student",), trains=("student",), **single))

    def label_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """One random crop for each row: geometry, packed soft label, and how sure the teacher was."""
        with torch.no_grad():
            coords, flip = random_crops(draw, batch.x0.shape[-2:], self.config.crop)
            p = self.teacher(replay(batch.x0, coords, flip)).float().softmax(-1)
        label = batch.cond["label"]
        sure = {"p_max": p.amax(-1), "p_label": p.gather(-1, label[:, None])[:, 0]}
        rows = {"coords": coords, "flip": flip, **self._format.pack(p), **sure}
        keep = {f"{STORE}.{column}": values for column, values in rows.items()}
        yield Update((), {}, keep=keep, metrics={"teacher_accuracy": (p.argmax(-1) == label).float()})

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """Soft cross entropy on stored crops."""
        rows = {k: v.to(batch.x0.device) for k, v in self.stores[STORE].read(batch.ids).items()}
        x = replay(batch.x0, rows["coords"], rows["flip"])
        targets = self.targets(rows, batch.cond["label"])
        if self.config.selfmix:
            x, targets = self.mixed(x, targets, batch.image, draw)
        loss = cross_entropy_rows(self.student(x) / self.config.temperature, targets)
        yield Update("student", {"soft": loss}, metrics=self.region_shares)

    def targets(self, rows: Mapping[str, Tensor], label: Tensor) -> Tensor:
        """The teacher's labels [rows, C], replaced by the smoothed true label in the hard region."""
        classes = self.sources["train"].classes
        soft = self._format.recover(rows, classes)
        _, hard, _ = self.calibration.regions(rows[f"p_{self.config.confidence}"])
        return torch.where(hard[:, None], smooth_one_hot(label, classes, self.config.smoothing), soft)

    def mixed(self, x: Tensor, targets: Tensor, image: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """SelfMix: each row with another crop of its image, by mixup (lambda ~ Beta(0.8, 0.8)) or CutMix (Beta(1, 1)).

        lambda, the share that the row keeps, is the mean of the map of weights, so it is right for clipped boxes too.
        """
        draw = draw.within("selfmix")
        partner = partners_within(image, draw.uniform("partner"))
        u, centre = draw.uniform("lambda"), draw.uniform("centre", 2)
        box = cutmix_map(u, centre, *x.shape[-2:])
        even = beta_quantile(u, 0.8)[:, None, None, None].expand_as(box)
        keep = torch.where(draw.choice("mixup", self.config.mixup_share)[:, None, None, None], even, box)
        share = keep.mean((1, 2, 3))[:, None]
        return torch.lerp(x[partner], x, keep), torch.lerp(targets[partner], targets, share)

    def select(self, source: str, event: Event) -> Selection | None:
        """Crops that survive calibration: `num_crops` of each image as neighbours, others in every epoch."""
        if source != "train" or event.stage == "label":
            return None
        count = 1 if event.stage == "single_crop" else self.config.num_crops
        per_image, ids = self.sources["train"].per_image, []
        for images in torch.arange(len(self.confidence)).split(4096):  # bounds the memory of the keys
            key = Draw(event.seed, event.epoch, images, scope=event.stage).uniform("crops", per_image)
            sure = self.confidence[images]
            column = pick(sure, ~self.calibration.regions(sure)[0], key, count)
            ids.append(images[:, None] * per_image + column)
        return Selection(torch.cat(ids).flatten(), group=count)

    @cached_property
    def confidence(self) -> Tensor:
        """c of every stored crop [images, crops]."""
        source = self.sources["train"]
        stored = self.stores[STORE].read(torch.arange(len(source)))
        return stored[f"p_{self.config.confidence}"].view(-1, source.per_image)

    @cached_property
    def calibration(self) -> Thresholds:
        """The thresholds as values of c."""
        c = self.config
        if c.thresholds == "absolute":
            return Thresholds(c.low, c.middle, c.high)
        return Thresholds.at_quantiles(self.confidence, c.low, c.middle, c.high)

    @cached_property
    def region_shares(self) -> dict[str, Tensor]:
        """Which share of all crops lies in each region, for the log."""
        masks = self.calibration.regions(self.confidence)
        return {f"region.{n}": m.float().mean() for n, m in zip(("uninformative", "hard", "important"), masks)}

    @cached_property
    def _format(self) -> LabelFormat:
        return LabelFormat.named(self.config.label, self.config.half)
