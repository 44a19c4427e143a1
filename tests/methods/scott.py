"""SCott set up for tests: on a tiny UNet, or on small networks of points; and draws that remember their names."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.methods.base import Update
from fewstep.methods.diffusion.scott import SCott
from fewstep.models.build import parse
from fewstep.models.oracle import MLP
from fewstep.roles import RoleSpec, assemble
from tests.oracles.harness import backward, seat

ROWS = 6
VP = {"kind": "vp", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CALM = {"eta_range": (0.0, 0.98), "guidance_scale": 3.0}  # on flow paths: no noise from t = 1


def assembled(sizes: dict, method=SCott, tune: str = "full", student: dict | None = None, **config):
    """The method on a tiny UNet, its student and critics moved away from the teacher."""
    method = method(parse(method.Config, config, "config"))
    lora = {"rank": 2, "targets": "all"}
    specs = {
        "teacher": RoleSpec(**{"from": "unet2d", "build": sizes}),
        "student": RoleSpec(**{"tune": tune, "lora": lora, **(student or {})}),
        "discriminator": RoleSpec(lora=lora),
    }
    (stage,) = method.stages()
    handles = assemble([r for r in method.roles() if stage.uses is None or r.name in stage.uses], specs, seed=0)
    torch.manual_seed(1)
    for handle in handles.values():
        for p in handle.trainable().values():
            p.data.add_(0.02 * torch.randn_like(p))
    method.bind(handles, {}, {})
    return method


def points(path=None, **config) -> SCott:
    """The method without D on two small MLPs of points in the plane."""
    torch.manual_seed(0)
    method = SCott(parse(SCott.Config, {"adversarial": None, **CALM, **config}, "config"))
    return seat(method, {name: MLP.build(classes=10).module for name in ("teacher", "student")}, path)


def widen(method) -> None:
    """Networks and averages in float64: the distance's slope 1/c = 1000 makes float32 rounding of targets show."""
    for role in (method.teacher, method.student):
        role.module.double()
        for p in (role.ema or {}).values():
            p.data = p.data.double()


def images(rows: int = ROWS, double: bool = False) -> Batch:
    """Random pictures with labels."""
    ids = torch.arange(rows)
    x0 = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = x0.double() if double else x0
    return Batch(ids, {"cond": Cond(label=ids % 10), "x0": x0})


class Recorded(Draw):
    """Remembers what was drawn, by full name."""

    seen: dict[str, Tensor]

    def normal(self, name: str, *row_shape: int, per="row") -> Tensor:
        self.seen[self._full(name)] = super().normal(name, *row_shape, per=per)
        return self.seen[self._full(name)]


def draw(step: int = 0, rows: int = ROWS) -> Recorded:
    """The numbers of one step."""
    made = Recorded(5, step, np.arange(rows))
    made.seen = {}
    return made


def said(method, step: int = 0, batch: Batch | None = None) -> list[Update]:
    """The updates of a step whose roles are not stepped."""
    return list(method.train_step(batch if batch is not None else images(), draw(step)))


def gradients(method, update: Update, role: str = "student") -> list[Tensor]:
    """Of the weighted losses, by the role's parameters."""
    backward(method, update)
    return [p.grad.clone() for p in getattr(method, role).trainable().values()]


def values(*parts) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for part in parts for p in part.parameters()]
