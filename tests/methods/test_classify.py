"""Plain training of a classifier."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fewstep.data.batch import Batch, Cond
from fewstep.data.crops import random_crops, replay
from fewstep.draws import Draw
from fewstep.methods.vision.classify import Classify, ClassifyConfig
from fewstep.roles import RoleSpec, assemble


def make(**config) -> tuple[Classify, Batch]:
    method = Classify(ClassifyConfig(**config))
    build = {"from": "cnn", "build": {"width": 4, "classes": 10, "batch_norm": False}}
    method.bind(assemble(method.roles(), {"student": RoleSpec.model_validate(build)}, seed=0), {}, {})
    x, y = torch.randn(32, 1, 12, 12), torch.randint(0, 10, (32,))
    return method, Batch(torch.arange(32), {"x0": x, "cond": Cond(label=y)})


def step(method: Classify, batch: Batch) -> torch.Tensor:
    (update,) = method.train_step(batch, Draw(0, 0, range(len(batch))))
    assert update.role_names == ("student",)
    return update.losses["hard"]


def test_the_loss_is_cross_entropy_of_the_whole_image():
    method, batch = make(smoothing=0.1)
    logits = method.student(batch.x0)
    expected = F.cross_entropy(logits, batch.cond["label"], reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(step(method, batch), expected)


def test_with_crops_each_row_is_cut_by_its_own_draw():
    method, batch = make(crop={"scale": (0.3, 0.5)})
    crops = random_crops(Draw(0, 0, range(32)), (12, 12), method.config.crop)
    logits = method.student(replay(batch.x0, *crops))
    torch.testing.assert_close(step(method, batch), F.cross_entropy(logits, batch.cond["label"], reduction="none"))


def test_validation_counts_right_answers():
    method, batch = make()
    rows = method.validation(batch)
    right = method.student(batch.x0).argmax(-1) == batch.cond["label"]
    assert torch.equal(rows["accuracy"], right.float()) and rows["cross_entropy"].shape == (32,)
