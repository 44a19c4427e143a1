"""Decoupled DMD against closed forms (Liu et al., arXiv 2511.22677), with one-dimensional Gaussians.

For data N(m, s^2): A(t) = (1-t)^2 s^2 + t^2 and x0(x, t) = m + (1-t) s^2 / A (x - (1-t) m).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fewstep.maths.guidance import guided_x0
from fewstep.maths.losses import mean_variance_rows
from fewstep.maths.paths import FlowPath, VPPath
from fewstep.maths.solvers import Schedule, rollout, sample
from fewstep.methods.diffusion.decoupled_dmd import SPACES, DecoupledDMD, Point
from fewstep.models.oracle import GAUSSIAN, MLP
from tests.oracles.harness import Affine, batch, draw, seat, train

S = 0.7
M_COND, M_UNCOND = 1.0, 0.4


def gaussian(mean: float, std: float = S, null_mean: float | None = None) -> nn.Module:
    """A closed-form network of N(mean, std^2) whose null class is N(null_mean, std^2)."""
    null = [mean if null_mean is None else null_mean]
    return GAUSSIAN.build(means=[[mean]], std=[std], null_mean=null, null_std=std).module


def dmd(path: FlowPath | None = None, **config) -> DecoupledDMD:
    """The method with closed-form teacher, fake model and linear student."""
    method = DecoupledDMD(DecoupledDMD.Config(**{"normaliser": "none", **config}))
    nets = {"teacher": gaussian(M_COND, null_mean=M_UNCOND), "student": Affine(S, M_COND)}
    return seat(method, {**nets, "fake_score": gaussian(M_COND)}, path)


def spread(t: torch.Tensor, std: float = S) -> torch.Tensor:
    """A(t)."""
    return (1 - t) ** 2 * std**2 + t**2


# 1-3: the directions


def test_coupled_directions_add_up_to_guided_teacher_minus_fake():
    """Property 1: with one level and one noise, D_DM + D_CA = x0_cfg - x0_fake, for any networks."""
    torch.manual_seed(0)
    method = DecoupledDMD(DecoupledDMD.Config(schedule="coupled", normaliser="none", guidance_scale=3.5))
    seat(method, {name: MLP.build(classes=3).module.double() for name in ("teacher", "student", "fake_score")})
    x0, cond = torch.randn(64, 2, dtype=torch.float64), batch(64, classes=3).cond
    directions, _ = method.directions(x0, 1.0, cond, draw(0, 64))
    point = method.points(x0, 1.0, draw(0, 64))["dm"]
    expected = guided_x0(method.teacher, *point, cond, 3.5) - method.fake_score.x0(*point, cond)
    torch.testing.assert_close(directions["dm"] + directions["ca"], expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_the_generator_loss_is_minus_direction_over_elements():
    """Property 2: d L_G / d x^ = -D / numel, and neither teacher nor fake receives a gradient."""
    method = dmd(guidance_scale=3.0)
    x0 = torch.randn(32, 1, requires_grad=True)
    cond = batch(32).cond
    update = method.generator_update(x0, 0.75, cond, draw(0, 32))
    directions, _ = method.directions(x0.detach(), 0.75, cond, draw(0, 32))
    sum(rows.mean() for rows in update.losses.values()).backward()
    torch.testing.assert_close(x0.grad, -(directions["dm"] + directions["ca"]) / x0.numel())
    for role in (method.teacher, method.fake_score):
        assert all(p.grad is None for p in role.module.parameters())


def test_direction_spaces_agree_on_a_flow_path():
    """Property 3: x0_A - x0_B = -tau (v_A - v_B), and the score's difference is (1-tau)/tau^2 times x0's."""
    a, b = dmd().teacher, dmd().fake_score
    a.module.double(), b.module.double().means.data.add_(0.3)
    x, t, cond = torch.randn(50, 1).double(), torch.linspace(0.05, 0.95, 50).double(), batch(50).cond
    gap = a.x0(x, t, cond) - b.x0(x, t, cond)
    v, score = a.velocity(x, t, cond) - b.velocity(x, t, cond), a.score(x, t, cond) - b.score(x, t, cond)
    torch.testing.assert_close(SPACES["v"](t)[:, None] * gap, -v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(SPACES["score"](t)[:, None] * gap, score, rtol=1e-6, atol=1e-6)


def test_direction_spaces_agree_on_an_eps_path():
    """Property 3: x0_A - x0_B = -(s/a) (eps_A - eps_B) with the native a = sqrt(abar), s = sqrt(1 - abar)."""
    path = VPPath.from_scheduler({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    k = torch.tensor([20, 250, 500, 980])
    abar = torch.tensor(path.alphas_cumprod, dtype=torch.float64)[k]
    t, y = path.time(k.double() / 1000), torch.randn(4, 3).double()
    eps_a, eps_b = torch.randn(2, 4, 3).double().unbind()
    gap = -t[:, None] * (path.velocity(eps_a, y, t) - path.velocity(eps_b, y, t))
    torch.testing.assert_close(gap, -((1 - abar) / abar).sqrt()[:, None] * (eps_a - eps_b), rtol=1e-6, atol=1e-6)


# 4-5: the levels


def levels(u: float, rows: int = 100_000, path: FlowPath | None = None, **config) -> dict[str, torch.Tensor]:
    """tau of each branch over many rows, for a generator input at clock value u."""
    method = dmd(path, **{"levels": (1e-6, 1.0), **config})
    return {name: p.t for name, p in method.points(torch.zeros(rows, 1), u, draw(0, rows)).items()}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_augmentation_looks_below_the_input_level_and_matching_everywhere(shift):
    """Property 4, and the pin of the time direction: t = 1 is noise, so tau_CA < t means cleaner than the input."""
    path = FlowPath(shift=shift)
    u = 0.25
    t = path.time(u)
    assert t == (0.5 if shift == 3 else 0.25)
    tau = levels(u, path=path)
    assert tau["ca"].max() <= t + 1e-6
    assert tau["dm"].min() < 0.01 and tau["dm"].max() > 0.99
    assert stats.kstest(path.clock(tau["ca"]) / u, "uniform").pvalue > 0.01  # before the shift
    assert stats.kstest(path.clock(tau["dm"]), "uniform").pvalue > 0.01
    assert abs(stats.pearsonr(tau["ca"], tau["dm"]).statistic) < 0.01


def test_at_the_first_level_both_branches_have_the_same_law():
    """Property 5: at t = 1 nothing is cut, so a one-step student sees two independent full levels."""
    tau = levels(1.0)
    assert stats.ks_2samp(tau["ca"], tau["dm"]).pvalue > 0.01


def test_levels_are_clamped_to_2_and_98_percent():
    """tau within [.02, .98]; below t = .02 the augmentation looks at exactly .02."""
    tau = levels(0.01, rows=2000, levels=(0.02, 0.98))
    assert torch.equal(tau["ca"], torch.full((2000,), 0.02))
    assert [tau["dm"].min().item(), tau["dm"].max().item()] == pytest.approx([0.02, 0.98])


def test_levels_of_a_ddpm_network_are_timesteps_20_to_980():
    """On a DDPM table the clamp is a share of the table; tau_CA stays below the input's timestep."""
    path = VPPath.from_scheduler({})
    tau = levels(path.grid(4)[1], rows=5000, path=path, levels=(0.02, 0.98))
    k = {name: path.timestep(t) for name, t in tau.items()}
    assert k["dm"].min() == pytest.approx(20, abs=0.01) and k["dm"].max() == pytest.approx(980, abs=0.01)
    assert k["ca"].max() <= 749.01


# 6-8: fields and fixed points


def test_guidance_field_of_equal_gaussians_does_not_depend_on_x():
    """Property 6: x0_c - x0_u = (m_c - m_u) t^2 / A(t)."""
    method = dmd(guidance_scale=2.0)
    t = torch.linspace(0.02, 0.98, 60)
    for x in (torch.zeros(60, 1), torch.randn(60, 1)):
        real = method.teach({"ca": Point(x, t)}, batch(60).cond)
        expected = (M_COND - M_UNCOND) * t**2 / spread(t)
        torch.testing.assert_close((real["ca"] - real["null"])[:, 0], expected, rtol=1e-4, atol=1e-5)


class AtLevel(DecoupledDMD):
    """The generator only ever sees unit noise labelled with the clock value `u`."""

    u = 1.0

    def schedule_for(self, steps: int) -> Schedule:
        return Schedule("ode", (self.u,))


def augmented(u: float, alpha: float, schedule: str) -> AtLevel:
    """The linear generator a z + b at one level, off its equilibrium, with the fake model of its own distribution."""
    method = AtLevel(
        DecoupledDMD.Config(guidance_scale=alpha, schedule=schedule, normaliser="none", fake_updates=1, steps=1)
    )
    method.u = u
    nets = {"teacher": gaussian(M_COND, null_mean=M_UNCOND), "student": Affine(0.5, 0.0), "fake_score": gaussian(0.0)}
    return seat(method, nets)


def track(method: DecoupledDMD) -> None:
    """Makes the fake model exact: N(b, a^2) for the generator a z + b."""
    fake, student = method.fake_score.module, method.student.module
    fake.means.data.fill_(student.offset.item())
    fake.log_std.data.fill_(student.gain.abs().log().item())


def equilibrium(method: AtLevel, steps: int = 200, rows: int = 256) -> tuple[float, float]:
    """(mean, std) of the generator: plain gradient descent with the fake model kept exact, second half averaged."""
    student, seen = method.student.module, []
    track(method)

    def after(count, update):
        track(method)
        seen.append((student.offset.item(), student.gain.item()))

    generator_turns = range(0, 2 * steps, 2)
    descent = torch.optim.SGD(student.parameters(), lr=0.15)
    train(method, generator_turns, lambda _: batch(rows), {"student": descent}, after)
    mean, std = np.mean(seen[steps // 2 :], 0)
    return mean, std


def rho(u: float) -> float:
    """E_CA[tau^2 / A] / E_DM[tau^2 / A] for tau_CA ~ U(0, u) and tau_DM ~ U(0, 1)."""
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    low, full = u * tau, tau
    return ((low**2 / spread(low)).mean() / (full**2 / spread(full)).mean()).item()


@pytest.mark.parametrize(("u", "printed"), [(1.0, 1.0), (0.75, 0.763), (0.5, 0.419), (0.25, 0.100)])
def test_equilibrium_of_the_hybrid_schedule(u, printed):
    """Property 7: b* = m_c + (alpha - 1) rho (m_c - m_u); the guidance decays along the trajectory, the std stays s."""
    assert rho(u) == pytest.approx(printed, abs=6e-4)
    mean, std = equilibrium(augmented(u, alpha=3.0, schedule="hybrid"))
    assert mean == pytest.approx(M_COND + 2.0 * printed * (M_COND - M_UNCOND), abs=0.03)
    assert std == pytest.approx(S, abs=0.03)


def test_equilibrium_of_the_coupled_schedule_is_the_guided_gaussian():
    """Property 7: rho = 1 at every level, b* = m_u + alpha (m_c - m_u)."""
    mean, std = equilibrium(augmented(0.25, alpha=3.0, schedule="coupled"))
    assert mean == pytest.approx(M_UNCOND + 3.0 * (M_COND - M_UNCOND), abs=0.03)
    assert std == pytest.approx(S, abs=0.03)


def test_matching_alone_recovers_the_data():
    """Property 8: with alpha = 1 a linear generator has the one fixed point (m, s)."""
    mean, std = equilibrium(augmented(1.0, alpha=1.0, schedule="hybrid"))
    assert mean == pytest.approx(M_COND, abs=0.02)
    assert std == pytest.approx(S, abs=0.02)


def test_matching_is_zero_when_fake_equals_teacher():
    """Property 8: D_DM = 0 for any x^. So with several levels only the mixture over levels is pinned, not each."""
    method = dmd(guidance_scale=1.0)
    directions, _ = method.directions(5 * torch.randn(64, 1), 0.5, batch(64).cond, draw(0, 64))
    assert directions["dm"].abs().max() < 1e-5


def test_trained_fake_and_generator_reach_the_equilibrium_together():
    """Property 7 through the whole alternating step: the fake model is learnt, five updates to one of the generator."""
    method = augmented(0.5, alpha=3.0, schedule="hybrid")
    method.config = method.config.model_copy(update={"fake_updates": 5})
    track(method)
    optimizers = {
        "student": torch.optim.SGD(method.student.module.parameters(), lr=0.1),
        "fake_score": torch.optim.Adam([method.fake_score.module.means, method.fake_score.module.log_std], lr=0.02),
    }
    seen = []
    train(method, range(6 * 150), lambda _: batch(256), optimizers, lambda *_: seen.append(_state(method)))
    mean, std = np.mean(seen[len(seen) // 2 :], 0)
    assert mean == pytest.approx(M_COND + 2.0 * rho(0.5) * (M_COND - M_UNCOND), abs=0.05)
    assert std == pytest.approx(S, abs=0.05)


def _state(method: DecoupledDMD) -> tuple[float, float]:
    return method.student.module.offset.item(), method.student.module.gain.item()


# 9-12: regulariser, fake model, rollout, sampler


def test_meanvar_is_zero_exactly_at_its_target_and_pulls_towards_it():
    """Property 9: zero iff mu_i = mu* and s2_i = s2*; gradient signs."""
    x = torch.randn(8, 1000, dtype=torch.float64)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    at_target = 0.3 + 1.2 * x
    assert mean_variance_rows(at_target, 0.3, 1.44).abs().max() < 1e-12
    for mean, std in ((0.5, 1.2), (0.1, 1.2), (0.3, 1.5), (0.3, 0.9)):
        off = (mean + std * x).requires_grad_()
        loss = mean_variance_rows(off, 0.3, 1.44)
        assert (loss > 1e-3).all()
        (grad,) = torch.autograd.grad(loss.sum(), off)
        moved = off.detach() - 10 * grad
        assert (mean_variance_rows(moved, 0.3, 1.44) < loss).all()
        signs = [grad.mean().item(), (grad * (off.detach() - mean)).mean().item()]  # along the mean, along the std
        assert np.sign(np.round(signs, 12)).tolist() == np.sign(np.round([mean - 0.3, std - 1.2], 12)).tolist()


def test_fake_model_learns_the_distribution_of_the_generator():
    """Property 10: the minimiser of L_F for a linear fake is the closed form of the generator's own N(b, a^2)."""
    method = dmd(guidance_scale=1.0, steps=1)
    student, fake = method.student.module, method.fake_score.module
    student.gain.data.fill_(0.5), student.offset.data.fill_(-0.4)
    optimizer = torch.optim.Adam([fake.means, fake.log_std], lr=0.03)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, 60, 0.5)
    critic_turns = [step for step in range(480) if step % 6]
    train(method, critic_turns, lambda _: batch(512), {"fake_score": optimizer}, lambda *_: halving.step())
    x, t, cond = torch.linspace(-3, 3, 30)[:, None], torch.linspace(0.1, 0.9, 30), batch(30).cond
    exact = -0.4 + (1 - t) * 0.25 / spread(t, 0.5) * (x[:, 0] + (1 - t) * 0.4)
    torch.testing.assert_close(method.fake_score.x0(x, t, cond)[:, 0], exact, rtol=0, atol=0.03)


def test_backward_simulation_starts_from_the_noise_and_keeps_no_graph(monkeypatch):
    """Property 11: level 0 is the noise bit for bit; level i calls the student i times, without gradient."""
    method = dmd()
    calls = []
    inside = method.student.module.forward
    monkeypatch.setattr(
        method.student.module, "forward", lambda **k: calls.append(torch.is_grad_enabled()) or inside(**k)
    )
    for level in range(4):
        calls.clear()
        x, u = rollout(method.student, method.schedule(), batch(16).cond, draw(0, 16), (1,), until=level)
        assert calls == [False] * level and not x.requires_grad and u == 1 - level / 4
        if level == 0:
            assert torch.equal(x, draw(0, 16).normal("rollout.start", 1))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ode_sampler_is_euler_of_the_flow_matching_scheduler(shift):
    """Property 12: with an exact velocity, `ode` equals FlowMatchEulerDiscreteScheduler on the same sigmas."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    method = dmd(FlowPath(shift=shift), steps=4)
    exact, cond = method.teacher, batch(16).cond
    ours = sample(exact, method.schedule(), cond, draw(0, 16), (1,))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    x = draw(0, 16).normal("rollout.start", 1)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        x = scheduler.step(exact.velocity(x, sigma.expand(16), cond), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-6)
    expected = {1.0: (1, 0.75, 0.5, 0.25), 3.0: (1, 0.9, 0.75, 0.5)}[shift]
    assert [exact.path.time(u) for u in method.schedule().u] == pytest.approx(expected)
