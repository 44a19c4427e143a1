"""What each option of SCott means, and which are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.data.batch import Batch, Cond
from fewstep.errors import UserError
from fewstep.maths.paths import FlowPath, VPPath
from fewstep.methods.base import Update
from fewstep.methods.diffusion.scott import SCott
from fewstep.models.build import parse
from fewstep.nets.lora import checkpointed
from tests.methods.scott import (
    CALM,
    ROWS,
    VP,
    assembled,
    draw,
    gradients,
    images,
    points,
    said,
)
from tests.oracles.harness import backward

# the solver's options


def test_every_noise_of_a_step_is_independent(tiny_unet):
    """Pitfall 3: eps of x_n, z of each sub-step, and what D's inputs are noised with have addresses of their own."""
    method = assembled(tiny_unet, disc_input="renoise", weights={"r1": 10.0}, **CALM)
    rows, numbers = 40, draw(rows=40)
    list(method.train_step(images(rows), numbers))
    names = {"eps", "solver.0", "solver.1", "solver.2", "fooling.eps", "real.eps", "made.eps", "r1"}
    assert numbers.seen.keys() == names
    table = torch.stack([n.flatten() for n in numbers.seen.values()])
    assert (torch.corrcoef(table) - torch.eye(len(names))).abs().max() < 5 / table.shape[1] ** 0.5


def test_noise_acts_within_its_range_of_levels_only():
    """eta_range on the clock: sub-steps that start outside are ODE steps, whatever z is."""
    method = points(eta_range=(0.2, 0.7), substeps=1, path=FlowPath(shift=3.0))
    t = method.path.time(torch.tensor([0.1, 0.2, 0.5, 0.7, 0.8, 1.0], dtype=torch.float64))
    assert method.within_range(t, 0.6).tolist() == [0, 0.6, 0.6, 0.6, 0, 0]
    x, cond = torch.zeros(2, 2), Cond(label=torch.zeros(2, dtype=torch.long))
    u = torch.tensor([0.9, 0.5], dtype=torch.float64)
    at = type(method.interval(draw(rows=2)))(u, u - 0.1)
    a, b = (method.walked(x, at, cond, 1.0, draw(step, rows=2)) for step in (0, 1))
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])


def test_eta_substeps_and_skip_may_change_over_training():
    """A schedule of each: h rounds; k widens the interval; eta 0 at first makes the walk deterministic."""
    ramp = {"over": 10}
    method = points(
        eta={"linear": [0, 1], **ramp}, substeps={"linear": [1, 3], **ramp}, skip={"linear": [0.01, 0.2], **ramp}
    )
    batch = Batch(torch.arange(ROWS), {"cond": images().cond, "x0": torch.randn(ROWS, 2)})
    calls = []
    method.teacher.module.register_forward_hook(lambda *_: calls.append(1))
    for step, h, k in ((0, 1, 0.01), (3, 2, 0.067), (10, 3, 0.2), (99, 3, 0.2)):
        calls.clear()
        said(method, step, batch)
        at = method.interval(draw(step))
        assert len(calls) == h
        torch.testing.assert_close((at.u - at.u_next)[at.u > k], torch.full_like(at.u, k)[at.u > k])
    at = method.interval(draw(0))
    first = method.walked(batch.x0, at, batch.cond, 1.0, draw(0))
    method.config = method.config.model_copy(update={"eta": 0.0, "substeps": 1.0})
    assert torch.equal(first, method.walked(batch.x0, at, batch.cond, 1.0, draw(0)))


@pytest.mark.parametrize("path, count, width", [(VPPath.from_scheduler({}), 1000, 24), (FlowPath(), 1000, 0.024)])
def test_the_grid_has_every_entry_of_the_table_and_intervals_of_24(path, count, width):
    """k = 24 of 1000 timesteps, ending at 0 and not below; three sub-steps of 8."""
    method = points(path, eta=0)
    assert len(method.grid()) == count == len(set(method.grid()))
    at = method.interval(draw(rows=500))
    scale = 1000 if isinstance(path, VPPath) else 1
    torch.testing.assert_close(at.u_next * scale, (at.u * scale - width).clamp_min(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", [FlowPath(), VPPath.from_scheduler({})])
def test_at_time_zero_f_is_the_identity(path):
    """Property 8: f(x, 0) = x in native variables, so a target at 0 is where the solver arrived."""
    method, x = points(path, eta=0), torch.randn(ROWS, 2)
    zero = torch.zeros(ROWS, dtype=torch.float64)
    native = path.native(x, method.time(zero))
    torch.testing.assert_close(method.f(method.student, x, zero, images().cond), native, rtol=1e-5, atol=1e-5)


# the discriminator's options


@pytest.mark.parametrize("path", [{"kind": "flow"}, VP])
def test_clean_input_is_the_sample_itself_with_the_students_level(tiny_unet, path):
    """The network is fed x0 as its native state, labelled with t_n, and no guidance; only the condition."""
    method = assembled({**tiny_unet, "path": path}, eta=0.5, **CALM)
    fed: list[dict] = []
    pack = method.discriminator.family.pack
    method.discriminator.family = type("Spy", (type(method.discriminator.family),), {
        "pack": lambda self, module, x, timestep, cond: fed.append({"x": x, "k": timestep, "cond": cond})
        or pack(module, x, timestep, cond)
    })()  # fmt: skip
    batch = images()
    said(method, batch=batch)
    k = method.path.timestep(method.time(method.interval(draw()).u))
    assert [len(call["x"]) for call in fed] == [ROWS, 2 * ROWS]
    torch.testing.assert_close(fed[1]["x"][:ROWS], batch.x0)
    torch.testing.assert_close(fed[1]["k"], k.repeat(2))
    torch.testing.assert_close(fed[0]["x"], fed[1]["x"][ROWS:])  # what the student made, both times
    assert all(set(call["cond"]) == {"label"} for call in fed)


def test_discriminator_is_not_told_the_guidance():
    """Pitfall 8: a student that reads the guidance, and a D that does not."""
    method = points(guidance_scale=(2.0, 8.0))
    told = method.told(images().cond, torch.full((ROWS,), 3.0))
    assert set(told) == {"label", "guidance"}
    asked = []
    method.discriminator = type(
        "D", (), {"features": lambda self, x, t, cond, layers: asked.append(set(cond)) or [x]}
    )()
    method.heads = lambda features: features[0].sum(1)
    batch = Batch(torch.arange(ROWS), {"cond": images().cond, "x0": torch.randn(ROWS, 2)})
    method.config = method.config.model_copy(update={"adversarial": "hinge"})
    said(method, batch=batch)
    assert asked == [{"label"}, {"label"}]


def test_renoised_input_has_one_level_and_two_noises(tiny_unet):
    """alpha_tau x + sigma_tau e: tau uniform on the grid and the same for both, e independent."""
    method = assembled(tiny_unet, disc_input="renoise", **CALM)
    batch, numbers = images(), draw()
    at = method.interval(numbers)
    t = method.judged_at(at, numbers)
    assert not torch.equal(t, method.time(at.u))
    for name in ("real", "made"):
        eps = draw().within(name).normal("eps", 1, 8, 8)
        expected = (1 - t).view(-1, 1, 1, 1) * batch.x0 + t.view(-1, 1, 1, 1) * eps
        torch.testing.assert_close(method.shown(batch.x0, t, numbers.within(name)), expected)


@pytest.mark.parametrize(
    "kind, generator, discriminator",
    [
        ("hinge", lambda f: -f, lambda r, f: torch.relu(1 - r) + torch.relu(1 + f)),
        ("linear", lambda f: -f, lambda r, f: f - r),
        ("softplus", lambda f: torch.log1p(torch.exp(-f)), lambda r, f: torch.log1p(torch.exp(-r)) + torch.log1p(torch.exp(f))),
    ],
)  # fmt: skip
def test_adversarial_losses_are_those_of_the_logits(tiny_unet, kind, generator, discriminator):
    """-D(fake) for the student; the objectives of D by name."""
    method = assembled(tiny_unet, adversarial=kind, weights={"r1": 1.0}, **CALM)
    student, critic = said(method)
    real, fake = critic.metrics["logits_real"], critic.metrics["logits_fake"]
    torch.testing.assert_close(student.losses["adversarial"], generator(fake))
    torch.testing.assert_close(critic.losses["discriminator"], discriminator(real, fake))


@pytest.mark.parametrize("disc_input", ["clean", "renoise"])
def test_r1_grows_with_the_square_of_ds_slope(tiny_unet, disc_input):
    """|D(x) - D(x + 0.1 n)|^2: a head twice as steep pays four times."""
    method = assembled(tiny_unet, disc_input=disc_input, weights={"r1": 1.0}, **CALM)
    once = said(method)[1].losses["r1"]
    for p in method.heads.module.parameters():
        p.data.mul_(2)
    torch.testing.assert_close(said(method)[1].losses["r1"], 4 * once, rtol=1e-4, atol=1e-9)
    assert (once > 0).all()


@pytest.mark.parametrize("heads", ["mean", "conv"])
@pytest.mark.parametrize("layers", [None, ("down_blocks.1.resnets.0", "mid_block")])
def test_heads_read_the_layers_asked_for(tiny_unet, heads, layers):
    """One head a layer, of either kind."""
    method = assembled(tiny_unet, heads=heads, layers=layers, **CALM)
    assert len(method.heads.module.heads) == (1 if layers is None else 2)
    assert all(torch.isfinite(rows).all() for update in said(method) for rows in update.losses.values())


def test_gradients_through_a_checkpointed_discriminator_are_the_same(tiny_unet):
    """Activation checkpointing recomputes D's blocks with D's adapter, up to the layer where its forward stops."""
    grads = []
    for checkpointing in (False, True):
        method = assembled(tiny_unet, **CALM)
        if checkpointing:
            checkpointed(method.discriminator.module)
        student, critic = said(method)
        grads.append([*gradients(method, student), *filled(method, critic)])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def filled(method, critic: Update) -> list[Tensor]:
    """D's gradients; parameters behind the layer that is read have none."""
    backward(method, critic)
    parts = (method.discriminator, method.heads)
    return [p.grad for part in parts for p in part.trainable().values() if p.grad is not None]


# bad input


@pytest.mark.parametrize(
    "config",
    [
        {"eta": 1.0},
        {"eta": 0.1},
        {"eta": {"linear": [0, 0.3], "over": 5}},
        {"eta": {"exponential": [0.5, 0.01], "over": 5}},
        {"eta": 0.5, "solver": "sde_dpm_2"},
        {"eta": 0.5, "solver": "euler_maruyama"},
        {"eta": 1.0, "solver": "ddim_eta"},
    ],
)
def test_noise_at_pure_noise_is_refused_with_the_mend(config):
    """Pitfall 2: from alpha = 0 the exact step forgets the state; also where a schedule gets there later."""
    with pytest.raises(
        UserError, match=r"at t = 1, .*config.eta_range=\[0, 0.98\].* ddim_eta with eta below 1, or eta 0"
    ):
        points(**{"eta_range": (0.0, 1.0), **config})


@pytest.mark.parametrize(
    "config",
    [
        {"eta": 1.0, "eta_range": (0.0, 0.98)},
        {"eta": 0.99, "solver": "ddim_eta", "eta_range": (0.0, 1.0)},
        {"eta": 0.0, "eta_range": (0.0, 1.0)},
        {"eta": 1.0, "eta_range": (0.0, 1.0), "path": VPPath.from_scheduler({})},
        {"eta": 1.0, "eta_range": (0.0, 1.0), "path": FlowPath(t_max=0.98)},
    ],
)
def test_what_the_refusal_recommends_runs_and_is_finite(config):
    """The mends on a flow path; DDPM tables end before alpha = 0 and are never refused."""
    method = points(**{"eta_range": (0.0, 1.0), **config})
    batch = Batch(torch.arange(64), {"cond": Cond(label=torch.zeros(64).long()), "x0": torch.randn(64, 2)})
    (update,) = method.train_step(batch, draw(rows=64))
    assert torch.isfinite(update.losses["consistency"]).all()


def test_a_table_that_ends_at_zero_signal_is_refused_too():
    """Zero terminal SNR: alpha = 0 at the last entry."""
    table = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    with pytest.raises(UserError, match="forgets the state"):
        points(VPPath.from_scheduler(table), eta=1.0, eta_range=(0.0, 1.0))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"adversarial": "linear"}, "no bound on D: add a penalty, weights.r1=10, or choose hinge"),
        ({"solver": "er_sd"}, "er_sde"),
        ({"solver": "ddim_eta", "eta": 1.2}, "ddim_eta takes eta up to 1"),
        ({"eta": -0.1}, "must not be negative"),
        ({"eta_range": [0.9, 0.1]}, "must increase within"),
        ({"substeps": 0}, "at least 1"),
        ({"substeps": {"linear": [0, 3], "over": 9}}, "at least 1"),
        ({"skip": 1.0}, "between 0 and 1"),
        ({"weights": {"advers": 1.0}}, "no loss term 'advers'.*adversarial"),
        ({"guidance_scale": [9, 4]}, "upside down"),
    ],
)
def test_bad_config_is_refused_with_the_mend(config, message):
    with pytest.raises(UserError, match=message):
        parse(SCott.Config, config, "config")


def test_linear_without_discriminator_or_with_penalty_is_allowed():
    for config in ({"weights": {"r1": 5}}, {"weights": {"adversarial": 0}}):
        assert parse(SCott.Config, {"adversarial": "linear", **config}, "config").adversarial == "linear"
