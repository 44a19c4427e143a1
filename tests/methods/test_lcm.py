"""LCM's equations against a computation by hand in Stable Diffusion's convention, and who is trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.maths.paths import FlowPath, VPPath
from fewstep.methods.diffusion.lcm import LCM
from tests.methods.trajectories import (
    ROWS,
    assembled,
    draw,
    halves_agree,
    images,
    only,
    points,
    seated,
    table,
    touched,
)

F64 = torch.float64


def predictions(net, x: Tensor, k: Tensor, alpha: Tensor, sigma: Tensor, kind: str, *inputs: Tensor):
    """(x0, eps) of a network of the DDPM world at native states."""
    out = net(x, k, *inputs)
    if kind == "epsilon":
        return (x - sigma * out) / alpha, out
    return alpha * x - sigma * out, alpha * out + sigma * x


def by_hand(method: LCM, path: VPPath, kind: str, embedded: bool) -> Tensor:
    """The loss of a step [rows], from alphas_cumprod, w = guidance - 1, and nothing of the toolkit's path algebra."""
    batch, numbers = points(), draw()
    i, eps = numbers.integers("level", 50), numbers.normal("eps", 3).double()
    w = (numbers.uniform("guidance", low=3.0, high=15.0).double() - 1)[:, None]
    abar, label = torch.tensor(path.alphas_cumprod, dtype=F64), batch.cond["label"]
    k = torch.tensor(range(999, 0, -20))[i]
    m = (k - 20).clamp(min=0)
    (a, s), (a2, s2) = [(abar[j].sqrt()[:, None], (1 - abar[j]).sqrt()[:, None]) for j in (k, m)]
    told = (w[:, 0] + 1,) if embedded else ()
    x = a * batch.x0 + s * eps

    def f(z, j, alpha, sigma):
        q = 10 * j.double()[:, None]
        x0, _ = predictions(method.student.module, z, j.double(), alpha, sigma, kind, label, *told)
        return 0.25 / (q**2 + 0.25) * z + q / (q**2 + 0.25).sqrt() * x0

    with torch.no_grad():
        null = torch.full_like(label, 10)
        x0c, ec = predictions(method.teacher.module, x, k.double(), a, s, kind, label)
        x0u, eu = predictions(method.teacher.module, x, k.double(), a, s, kind, null)
        lower = a2 * (x0c + w * (x0c - x0u)) + s2 * (ec + w * (ec - eu))
        target = f(lower, m, a2, s2)
    error = f(x, k, a, s) - target
    return ((error**2 + 1e-6).sqrt() - 1e-3).mean(1)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_is_latent_consistency_distillation(kind, embedded):
    """Noise, guided DDIM, boundary, Huber: equal to the hand's to 1e-6, for eps- and v-prediction."""
    path = table(kind)
    method = seated(LCM(LCM.Config(embed_guidance=embedded)), path)
    update = only(method)
    assert update.role_names == ("student",) and set(update.losses) == {"consistency"}
    torch.testing.assert_close(
        update.losses["consistency"], by_hand(method, path, kind, embedded), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_guided_teacher_step_alone(kind):
    """Combining x0 and eps separately (as the public code does) or the velocity is the same, to 1e-6."""
    path = table(kind)
    method = seated(LCM(LCM.Config(embed_guidance=False)), path)
    batch, abar = points(), torch.tensor(path.alphas_cumprod, dtype=F64)
    at, g = method.interval(draw()), torch.linspace(1, 9, ROWS, dtype=F64)
    (a, s), (a2, s2) = [
        (abar[j].sqrt()[:, None], (1 - abar[j]).sqrt()[:, None]) for j in ((u * 1000).round().long() for u in at)
    ]
    x, label = batch.x0, batch.cond["label"]
    k, w = (at.u * 1000).round(), (g - 1)[:, None]
    x0c, ec = predictions(method.teacher.module, x, k, a, s, kind, label)
    x0u, eu = predictions(method.teacher.module, x, k, a, s, kind, torch.full_like(label, 10))
    expected = a2 * (x0c + w * (x0c - x0u)) + s2 * (ec + w * (ec - eu))
    got = method.walked(x / (a + s), at, batch.cond, g, draw()) * (a2 + s2)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_the_student_is_told_the_guidance_that_the_teacher_was_given():
    """Both calls of the student, online and target, see the row's own number."""
    method = seated(LCM(LCM.Config(guidance_scale=(2.0, 4.0))), FlowPath())
    only(method)
    drawn = draw().uniform("guidance", low=2.0, high=4.0)
    assert len(method.student.module.told) == 2 and all(torch.equal(t, drawn) for t in method.student.module.told)


def test_without_guidance_a_teacher_needs_no_unconditional_branch():
    """guidance_scale 1: one call of the teacher on the rows themselves."""
    method, rows = seated(LCM(LCM.Config(guidance_scale=1.0)), FlowPath()), []
    method.teacher.module.register_forward_hook(lambda _m, _a, out: rows.append(len(out)))
    only(method)
    assert rows == [ROWS]


def test_l2_is_the_mean_square():
    """distance: l2."""
    huber, l2 = (
        seated(LCM(LCM.Config(guidance_scale=1.0, distance=d, huber_c=1e3)), FlowPath()) for d in ("huber", "l2")
    )
    # for c far above the error Huber is e^2 / (2 c)
    torch.testing.assert_close(
        only(l2).losses["consistency"], 2e3 * only(huber).losses["consistency"], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("embedded", [False, True])
def test_rows_do_not_depend_on_their_micro_batch(embedded):
    assert halves_agree(seated(LCM(LCM.Config(embed_guidance=embedded)), table()))


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_reaches_the_student_alone(tiny_unet, tune):
    """Full: the copy; LoRA: the adapter, with the shared base untouched."""
    method = assembled(LCM(LCM.Config(guidance_scale=(3.0, 5.0), embed_guidance=False)), tiny_unet, tune)
    only(method, images()).losses["consistency"].mean().backward()
    student = method.student.adapter if tune == "lora" else method.student.module
    assert touched(student) == len(list(student.parameters()))
    assert touched(method.teacher.module) == 0
    assert (method.teacher.module is method.student.module) == (tune == "lora")


def test_the_step_reports_the_spread_of_what_the_student_predicts():
    method = seated(LCM(LCM.Config(guidance_scale=1.0)), FlowPath())
    update, numbers = only(method), draw()
    u = torch.tensor(method.grid(), dtype=F64)[numbers.integers("level", 48)]
    t = u.float()
    x = (1 - t.double())[:, None] * points().x0 + t.double()[:, None] * numbers.normal("eps", 3)
    x0 = method.student.x0(x, t, points().cond)
    torch.testing.assert_close(update.metrics["x0_std"], x0.std(1, correction=0), rtol=1e-5, atol=1e-5)
