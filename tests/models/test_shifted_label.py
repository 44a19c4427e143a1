"""The second time of an adapter: read from a shifted label, so that stock pipelines call it unchanged (arXiv 2512.05150)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.maths.paths import FlowPath, VPPath
from fewstep.models.denoiser import Denoiser, shifted_label
from fewstep.roles import Handle, Role, RoleSpec, assemble

ROWS = 4
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def handles(tiny_unet: dict) -> dict[str, Handle]:
    """A teacher, and a student that is an adapter on it and gains two inputs."""
    roles = (Role("teacher"), Role("student", "lora", "teacher", adds=("s", "sign")))
    said = {"teacher": {"from": "unet2d", "build": tiny_unet}, "student": {"lora": {"rank": 2}}}
    return assemble(roles, {name: RoleSpec.model_validate(spec) for name, spec in said.items()}, seed=0)


def cond(s: Tensor | None = None, **fields: Tensor) -> Cond:
    more = {} if s is None else {"s": s}
    return Cond(label=torch.arange(ROWS), **more, **fields)


def labels_fed(denoiser: Denoiser, t: Tensor, said: Cond) -> Tensor:
    """The timesteps that the network is called with."""
    fed: list[Tensor] = []
    hook = denoiser.module.register_forward_pre_hook(lambda _m, _a, k: fed.append(k["timestep"]), with_kwargs=True)
    with torch.no_grad():
        denoiser.velocity(torch.zeros(ROWS, 1, 8, 8), t, said)
    hook.remove()
    return fed[0]


@pytest.mark.parametrize("path", [FlowPath(), FlowPath(shift=3.0), VPPath.from_scheduler(BETAS)])
def test_the_label_is_that_of_t_minus_half_of_s_with_the_sign(path):
    t, s = torch.tensor([0.9, 0.8, 0.5, 0.5]), torch.tensor([0.0, 0.4, 0.5, 0.1])
    expected = path.timestep(t - s / 2)
    assert torch.equal(shifted_label(path, t, cond(s)), expected)
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0])
    assert torch.equal(shifted_label(path, t, cond(s, sign=sign)), sign * expected)
    assert torch.equal(shifted_label(path, t, cond(torch.zeros(ROWS))), path.timestep(t))


def test_the_teacher_on_the_same_weights_is_called_at_its_own_label(tiny_unet):
    """An adapter's shift is no state of the base: what guides is asked about t, not t / 2."""
    found = handles(tiny_unet)
    student, teacher = (Denoiser.of(found[name]) for name in ("student", "teacher"))
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    assert student.handle.shifted and not teacher.handle.shifted and student.module is teacher.module
    assert torch.equal(labels_fed(student, t, cond(t)), 1000 * (t - t / 2))
    assert torch.equal(labels_fed(teacher, t, cond()), 1000 * t)
    assert torch.equal(labels_fed(student, t, cond(torch.zeros(ROWS))), 1000 * t)


def test_the_adapter_reaches_the_layers_that_read_the_label(tiny_unet):
    """Also where lora.targets names attention alone; a role that adds nothing keeps to its targets."""
    found = handles(tiny_unet)
    assert {"time_embedding/linear_1", "time_embedding/linear_2"} <= set(found["student"].adapter.down)
    roles = (Role("student", "lora"),)
    said = RoleSpec.model_validate({"from": "unet2d", "build": tiny_unet, "lora": {"rank": 2, "targets": ["conv1"]}})
    assert not any("time_embedding" in name for name in assemble(roles, {"student": said}, 0)["student"].adapter.down)


def test_nothing_is_added_to_the_base(tiny_unet):
    assert not hasattr(handles(tiny_unet)["student"].module, "extra_inputs")


def test_an_adapter_that_is_told_no_second_time_says_so(tiny_unet):
    student = Denoiser.of(handles(tiny_unet)["student"])
    with pytest.raises(UserError, match="reads 's'"):
        student.velocity(torch.zeros(ROWS, 1, 8, 8), torch.full((ROWS,), 0.5), cond())


def test_other_inputs_are_still_refused_for_adapters(tiny_unet):
    roles = (Role("student", "lora", adds=("s", "guidance")),)
    said = RoleSpec.model_validate({"from": "unet2d", "build": tiny_unet})
    with pytest.raises(UserError, match="gains an input"):
        assemble(roles, {"student": said}, 0)
