"""Average-velocity methods on a tiny UNet: rows, calls, a step without a host, and runs that are cut or stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.methods.base import Update
from fewstep.methods.diffusion.any_step import AnyStepMethod
from fewstep.roles import RoleSpec, assemble
from tests.engine import toy

ROWS = 8


def made(
    method: type[AnyStepMethod],
    sizes: dict,
    moved: bool = True,
    family: str = "unet2d",
    tune: str = "full",
    **config: Any,
) -> Any:
    """The method on a new network; `moved`: with weights that make the answers depend on s."""
    built = method(method.Config(**config))  # type: ignore[call-arg]
    said = {"from": family, "build": sizes, "tune": tune, "lora": {"rank": 2, "targets": "all"}}
    handles = assemble(built.roles(), {"student": RoleSpec.model_validate(said)}, seed=0)
    torch.manual_seed(1)
    for handle in handles.values() if moved else ():
        for p in handle.trainable().values():
            p.data.add_(0.05 * torch.randn_like(p))
    built.bind(handles, {}, {})
    return built


def images(rows: int = ROWS, first: int = 0) -> Batch:
    """8x8 pictures with labels; row i is the same in every batch."""
    ids = torch.arange(first, first + rows)
    x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))[ids]
    return Batch(ids, {"cond": Cond(label=ids % 10), "x0": x0})


def draw(rows: int = ROWS, step: int = 0, first: int = 0) -> Draw:
    """The numbers of the rows `first` ... of a step."""
    return Draw(5, step, np.arange(first, first + rows))


def only(method: Any, rows: int = ROWS, first: int = 0, step: int = 0) -> Update:
    """The one update of a step."""
    (update,) = method.train_step(images(rows, first), draw(rows, step, first))
    return update


def calls(method: Any) -> list[int]:
    """Rows of every call of the student in one step."""
    seen: list[int] = []
    hook = method.student.module.register_forward_hook(lambda _m, _a, out: seen.append(len(out[0])))
    only(method)
    hook.remove()
    return seen


def halves_agree(method: Any) -> bool:
    """Whether a batch and its two halves, drawn at their own slots, give the same losses row by row."""
    losses = [only(method, rows, first).losses for rows, first in ((ROWS, 0), (ROWS // 2, 0), (ROWS // 2, ROWS // 2))]
    whole, *parts = [torch.cat([rows for rows in said.values()]) for said in losses]
    return torch.allclose(whole.sort()[0], torch.cat(parts).sort()[0], rtol=1e-4, atol=1e-6)


def step_on_meta(method: Any) -> Update:
    """A step on a device that holds no numbers: any look at one, and any shape that depends on one, raises."""
    method.student.module.to("meta")
    batch, numbers = images(), draw()
    numbers.device = torch.device("meta")
    (update,) = method.train_step(Batch(batch.ids, {k: v.to("meta") for k, v in batch.fields.items()}), numbers)
    return update


def recipe(method: str, sizes: dict, **train: Any) -> dict[str, Any]:
    """A few steps on real digits, from scratch."""
    student = {"from": "unet2d", "build": sizes, "optimizer": {"lr": 1e-3, "warmup": 2}, "ema": 0.9}
    size = {"steps": 4, "batch": 16, "log_every": 1, "save_every": 2, **train}
    return {"method": method, "student": student, "data": {"train": {"source": "digits"}}, "train": size}


def whole_and_halves(said: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """Hashes of a run, and of one that was stopped at its first checkpoint and resumed."""
    whole = toy.trained(said, folder / "whole")
    halves = toy.Trainer(toy.load_recipe(said), folder / "halves", show=False)
    save: Callable[[], None] = halves.save

    def stop_after_save() -> None:
        save()
        raise KeyboardInterrupt

    halves.save = stop_after_save  # type: ignore[method-assign]
    with suppress(KeyboardInterrupt):
        halves.run()
    return toy.hashes(whole), toy.hashes(toy.trained(said, folder / "halves", resume=True))


def cut_difference(said: dict[str, Any], folder: Path, micro: int = 4) -> float:
    """Largest difference of a parameter between one micro-batch and several."""
    cut = {**said, "train": {**said["train"], "micro_batch": micro}}
    return toy.largest_difference(toy.trained(said, folder / "one"), toy.trained(cut, folder / "many"))
