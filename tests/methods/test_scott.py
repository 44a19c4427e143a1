"""SCott (arXiv 2403.01505) on real network classes: what it has in common with LCM, who is called, who is trained."""

from __future__ import annotations

import pytest
import torch

from fewstep.methods.diffusion.lcm import LCM
from fewstep.methods.diffusion.scott import SCott
from fewstep.roles import RoleSpec, assemble
from tests.methods.scott import (
    CALM,
    ROWS,
    VP,
    assembled,
    draw,
    gradients,
    images,
    said,
    values,
    widen,
)
from tests.oracles.harness import backward

# LCM is a special case


@pytest.mark.parametrize("guidance", [1.0, 3.0, (2.0, 6.0)])
@pytest.mark.parametrize("path", [{"kind": "flow"}, {"kind": "flow", "shift": 3.0}, VP])
@pytest.mark.parametrize("solver", ["er_sde", "ddim_eta", "euler_maruyama", "sde_dpm_2"])
def test_one_step_without_noise_and_without_discriminator_is_lcm(tiny_unet, path, guidance, solver):
    """Property 7: eta = 0, h = 1, lambda = 0 on one grid and the same draws: losses and gradients of LCM to 1e-6."""
    common = {"guidance_scale": guidance, "embed_guidance": False, "levels": 20, "student": {"ema": 0.9}}
    sizes = {**tiny_unet, "path": path}
    mine = assembled(sizes, solver=solver, eta=0, substeps=1, skip=None, weights={"adversarial": 0}, **common)
    theirs = assembled(sizes, LCM, **common)
    for method in (mine, theirs):
        widen(method)
    (scott,), (lcm,) = said(mine, batch=images(double=True)), said(theirs, batch=images(double=True))
    torch.testing.assert_close(scott.losses["consistency"], lcm.losses["consistency"], rtol=0, atol=1e-6)
    assert lcm.losses["consistency"].min() > 1e-4
    for a, b in zip(gradients(mine, scott), gradients(theirs, lcm), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# who is trained


@pytest.mark.parametrize(
    "config, used",
    [
        ({"adversarial": None}, False),
        ({"weights": {"adversarial": 0}}, False),
        ({}, True),
        ({"weights": {"adversarial": {"linear": [0, 0.4], "over": 10}}}, True),
    ],
)
def test_without_a_weight_the_discriminator_is_neither_loaded_nor_trained(config, used):
    """A recipe may still speak of its roles, so that one override switches D off."""
    method = SCott(SCott.Config(**config))
    (stage,) = method.stages()
    critics = ("discriminator", "heads") if used else ()
    assert stage.uses == ("teacher", "student", *critics) and stage.trains == ("student", *critics)
    assert [r.name for r in method.roles()] == ["teacher", "student", "discriminator", "heads"]


def test_the_papers_values_are_the_defaults():
    """eta 1, h 3, k 24 of 1000, lambda .4, EMA .95, lr 8e-6 and 2e-5, rank 64; AdamW, clip 1."""
    method = SCott()
    c, roles = method.config, {r.name: r for r in method.roles()}
    assert (c.eta, c.substeps, c.skip, c.weights["adversarial"], c.huber_c) == (1, 3, 0.024, 0.4, 1e-3)
    assert roles["student"].defaults == {"ema": 0.95, "optimizer": {"lr": 8e-6}}
    assert roles["discriminator"].defaults == {"optimizer": {"lr": 2e-5}, "lora": {"rank": 64}}
    assert roles["heads"].defaults == {"optimizer": {"lr": 2e-5}}


def test_turns_of_student_and_discriminator(tiny_unet):
    """Every step has both, the student first, with terms and monitors of rows that carry no graph."""
    student, critic = said(assembled(tiny_unet, **CALM))
    assert student.role_names == ("student",) and critic.role_names == ("discriminator", "heads")
    assert set(student.losses) == {"consistency", "adversarial"} and set(critic.losses) == {"discriminator"}
    metrics = {**student.metrics, **critic.metrics}
    assert set(metrics) == {"x0_std", "logits_real", "logits_fake"}
    assert all(m.shape == (ROWS,) and not m.requires_grad for m in metrics.values())


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_discriminator_step_changes_adapter_and_heads_only(tiny_unet, tune):
    """Property 7 and pitfall 6: the teacher answers bit for bit as before, although D computes with its weights."""
    method = assembled(tiny_unet, tune=tune, **CALM)
    x, t, cond = torch.randn(ROWS, 1, 8, 8), torch.rand(ROWS), images().cond
    assert method.discriminator.module is method.teacher.module
    before = method.teacher.velocity(x, t, cond)
    critics = (method.discriminator.adapter, method.heads.module)
    others = (method.teacher.module, method.student.adapter or method.student.module)
    kept, old = values(*others), values(*critics)
    _, critic = said(method)
    backward(method, critic)
    torch.optim.SGD([p for part in critics for p in part.parameters()], lr=0.1).step()
    assert torch.equal(method.teacher.velocity(x, t, cond), before)
    assert all(torch.equal(a, b) for a, b in zip(kept, values(*others), strict=True))
    assert all(p.grad is None for part in others for p in part.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(old, values(*critics), strict=True)]
    assert changed[-2] and sum(changed) > 20  # the head, and the adapter up to the layer that is read


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_student_step_leaves_all_others_without_gradient(tiny_unet, tune):
    """The adversarial term flows through D's weights and the frozen teacher's and stays with the student."""
    method = assembled(tiny_unet, tune=tune, weights={"consistency": 0}, student={"ema": 0.5}, **CALM)
    student, _ = said(method)
    grads = gradients(method, student)
    assert all(torch.isfinite(g).all() for g in grads) and sum(g.abs().sum() for g in grads) > 0
    for part in (method.discriminator.adapter, method.heads.module):
        assert all(p.grad is None for p in part.parameters())
    if tune == "full":
        assert all(p.grad is None for p in method.teacher.module.parameters())
    assert all(p.grad is None for p in method.student.ema.values())


def test_three_adapters_share_one_base(tiny_unet):
    """A LoRA student: teacher, student and D are views of one network, and at step 0 the student is the teacher."""
    method = SCott(SCott.Config(**CALM))
    spec = RoleSpec(tune="lora", lora={"rank": 2, "targets": "all"})
    specs = {"teacher": RoleSpec(**{"from": "unet2d", "build": tiny_unet}), "student": spec, "discriminator": spec}
    method.bind(assemble(method.roles(), specs, seed=0), {}, {})
    assert method.teacher.module is method.student.module is method.discriminator.module
    x, t, cond = torch.randn(ROWS, 1, 8, 8), torch.rand(ROWS), images().cond
    assert torch.equal(method.student.velocity(x, t, cond), method.teacher.velocity(x, t, cond))


def test_with_the_adversarial_weight_at_zero_the_gradient_is_that_of_plain_consistency(tiny_unet):
    """Property 7: the same draws with and without D."""
    off = {"linear": [0.0, 0.4], "over": 10}  # 0 at this step, and D is there
    with_d = assembled(tiny_unet, weights={"adversarial": off}, **CALM)
    without = assembled(tiny_unet, adversarial=None, **CALM)
    for a, b in zip(gradients(with_d, said(with_d)[0]), gradients(without, said(without)[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_solver_and_target_have_no_graph(tiny_unet):
    """Property 7: teacher and EMA run without gradient, and the solver's output has none even if its input has."""
    method = assembled(tiny_unet, adversarial=None, student={"ema": 0.5}, **CALM)
    batch, numbers = images(), draw()
    at, x = method.interval(numbers), batch.x0.clone().requires_grad_()
    walked = method.walked(x, at, batch.cond, 3.0, numbers)
    assert not walked.requires_grad and not method.target(walked, at.u_next, batch.cond).requires_grad
    graphs = []
    hook = method.teacher.module.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    said(method)
    hook.remove()
    assert graphs == [False] * 3


@pytest.mark.parametrize("config, parts", [({}, 2), ({"guidance_scale": 1.0}, 1), ({"substeps": 5}, 2)])
def test_calls_of_a_step(tiny_unet, config, parts):
    """h calls of the teacher, two rows a sample when guided; the student once at u and once as the EMA at u_next."""
    method = assembled(tiny_unet, adversarial=None, **{**CALM, **config})
    seen: dict[str, list[int]] = {"teacher": [], "student": []}
    for role, rows in seen.items():
        network = getattr(method, role).module
        network.register_forward_hook(lambda _m, _a, out, rows=rows: rows.append(len(out[0])))
    said(method)
    assert seen == {"teacher": [parts * ROWS] * config.get("substeps", 3), "student": [ROWS, ROWS]}
