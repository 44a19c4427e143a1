"""Self-E against closed forms (arXiv 2512.22374, reconstructed): data N(m_c, .49), one class and the null class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Cond
from fewstep.maths.average_velocity import landing
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule, sample
from fewstep.methods.diffusion.self_e import Landed, SelfE, noise_gap
from fewstep.nets.extra_inputs import fed
from tests.oracles.average import AverageVelocity, exact
from tests.oracles.harness import backward, batch, draw, seat
from tests.oracles.maps import Reads

STD, TIED, FREE = 0.7, 1.0, 0.2
TIMES = [(0.75, 0.375), (0.9, 0.5)]


class Marginal(nn.Module):
    """Velocity of N(1, std^2), whatever its second time says: the fake model that knows the student's law exactly."""

    def __init__(self, std: float):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(TIED)), std
        self.extra_inputs, self.dim, self.null = Reads("s"), 1, 1
        self.told: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """v at x [rows, dim]."""
        self.told.append(fed("s"))
        t = timestep[:, None] / 1000
        return exact(x, t, t, self.mean, self.std)


def seated(fake: nn.Module | None = None, dim: int = 1, **config: Any) -> SelfE:
    """The method on the exact network, without normalisation and with lambda uncapped unless told."""
    said = {"norm_dims": "none", "lambda_max": 1e6, "full_from": None if fake is None else 0, **config}
    networks: dict[str, nn.Module] = {"student": AverageVelocity((TIED, FREE), STD, dim=dim)}
    if fake is not None:
        networks["fake_velocity"] = fake
    method = SelfE(SelfE.Config(**said))
    seat(method, networks)
    return method


def variance(t: float, std: float = STD) -> float:
    """A(t) = (1-t)^2 std^2 + t^2."""
    return (1 - t) ** 2 * std**2 + t**2


def landed(x0: Tensor, x_hat: Tensor, t: float, s: float) -> Landed:
    """Rows of one class at these times."""
    full = torch.full((len(x0),), 1.0)
    return Landed(x0, x_hat, t * full, s * full, Cond(label=torch.zeros(len(x0), dtype=torch.long)))


@pytest.mark.parametrize(
    "t, s, gap", [(0.5, 0.25, 2 / 3), (0.75, 0.375, 2.4), (0.9, 0.5, 8), (0.98, 0.5, 48), (0.3, 0.3, 0)]
)
def test_lambda_is_the_gap_of_noise_to_signal(t, s, gap):
    """lambda(t, s) = t / (1 - t) - s / (1 - s); finite at t = 1."""
    assert noise_gap(torch.tensor([t]), torch.tensor([s])).item() == pytest.approx(gap, rel=1e-4)
    assert noise_gap(torch.tensor([1.0]), torch.tensor([0.0])).isfinite()


@pytest.mark.parametrize("norm", ["sample", "channels", "none"])
def test_at_s_equal_t_the_target_is_the_data_whatever_the_direction(norm):
    method = seated(norm_dims=norm)
    x0, x_hat, d = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(method.target(landed(x0, x_hat, 0.6, 0.6), d), x0)


def test_the_target_has_the_norm_of_the_data():
    """|x_renorm| = |x0|, over a whole sample or over its channels at each place."""
    x0, x_hat, d = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    rows = landed(x0, x_hat, 0.8, 0.3)
    whole = seated(norm_dims="sample").target(rows, d)
    torch.testing.assert_close(whole.flatten(1).norm(dim=1), x0.flatten(1).norm(dim=1))
    places = seated(norm_dims="channels").target(rows, d)
    torch.testing.assert_close(places.norm(dim=1), x0.norm(dim=1))


def test_the_mixed_target_is_data_and_self_loss_together():
    """x_hat - z = [(x_hat - x0) + lambda d] / (1 + lambda), in float64."""
    x0, x_hat, d = (torch.randn(6, 3, dtype=torch.float64) for _ in range(3))
    gap = noise_gap(torch.tensor([0.75], dtype=torch.float64), torch.tensor([0.375], dtype=torch.float64))
    rows = landed(x0, x_hat, 0.75, 0.375)
    z = seated().target(rows._replace(t=rows.t.double(), s=rows.s.double()), d)
    torch.testing.assert_close(x_hat - z, ((x_hat - x0) + gap * d) / (1 + gap), rtol=0, atol=1e-15)


def test_the_classifier_direction_points_to_the_condition():
    """d = G(null) - G(c) is -(s^2 / (1 - s)) grad log q(c | x_s): (m_null - m_c) s^2 / A(s) here, at every x."""
    s, x = 0.375, torch.randn(8, 1)
    d = seated().direction(landed(x, x, 0.75, s), torch.randn(8, 1), step=0)
    torch.testing.assert_close(d, torch.full_like(d, (FREE - TIED) * s**2 / variance(s)))


@pytest.mark.parametrize("t, s, shift, std", [(*TIMES[0], 0.8132, 0.159), (*TIMES[1], 4.2953, 0.054)])
def test_alone_it_overshoots_by_lambda_and_keeps_the_spread_of_the_mean(t, s, shift, std):
    """Fixed point E[x0 | x_t, c] + lambda (m_c - m_null) s^2 / A(s): mean off by .8132 and 4.2953, std .159 and .054."""
    gap = t / (1 - t) - s / (1 - s)
    assert gap * (TIED - FREE) * s**2 / variance(s) == pytest.approx(shift, abs=1e-4)
    assert (1 - t) * STD**2 / variance(t) ** 0.5 == pytest.approx(std, abs=1e-3)
    method, x = seated(), torch.linspace(-2, 2, 9)[:, None]
    mean = TIED + (1 - t) * STD**2 / variance(t) * (x - (1 - t) * TIED)
    rows = landed(mean, mean + shift, t, s)
    target = method.target(rows, method.direction(rows, torch.zeros_like(x), step=0))
    torch.testing.assert_close(target, rows.x_hat, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "t, s, std", [(0.5, 0.25, 0.4519), (0.75, 0.375, 0.4122), (0.9, 0.5, 0.5261), (0.75, 0.7, 0.1677)]
)
def test_the_full_direction_has_the_data_s_mean_and_more_of_its_spread(t, s, std):
    """k = k0 + lambda (1 - s) (g(.49) - g(tau^2)) k at tau = k sqrt(A(t)): the mean is exact, tau as tabled."""
    k = std / variance(t) ** 0.5
    method, x = seated(Marginal(std)), torch.linspace(-2, 2, 9)[:, None]
    centre = x - (1 - t) * TIED
    rows = landed(TIED + (1 - t) * STD**2 / variance(t) * centre, TIED + k * centre, t, s)
    target = method.target(rows, method.direction(rows, torch.zeros_like(x), step=0))
    torch.testing.assert_close(target, rows.x_hat, rtol=0, atol=1e-3)


def test_at_s_0_there_is_no_direction():
    """The landing point is the sample itself, and both branches return it."""
    x = torch.randn(4, 1)
    d = seated().direction(landed(x, x, 0.75, 0.0), torch.randn(4, 1), step=0)
    assert d.abs().max() < 1e-6


@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_with_mu_the_fake_model_s_term_is_added(mu):
    """d = (G_null - G_c) + mu (F - G_null); at mu = 1 the null branch cancels and is not asked."""
    t, s, x, noise = 0.75, 0.375, torch.randn(4, 1), torch.randn(4, 1)
    fake = Marginal(0.3)
    method, rows = seated(fake, mu=mu), landed(x, x, t, s)
    x_s = (1 - s) * x + s * noise
    free, tied, made = (x_s - s * exact(x_s, s, s, m, std) for m, std in ((FREE, STD), (TIED, STD), (TIED, 0.3)))
    torch.testing.assert_close(method.direction(rows, noise, step=0), free - tied + mu * (made - free))
    assert torch.equal(fake.told[-1], rows.t), "the fake model is told where the student started"
    assert method.student.module.calls == ([4] if mu == 1 else [4, 4])


def test_the_guided_evaluator_moves_the_scoring_branch():
    """g_null + a (g_c - g_null) in place of g_c."""
    x = torch.randn(4, 1)
    plain, guided = (
        seated(eval_cfg=a).direction(landed(x, x, 0.75, 0.375), torch.zeros(4, 1), step=0) for a in (1.0, 3.0)
    )
    torch.testing.assert_close(guided, 3 * plain)


def test_rows_at_s_equal_t_alone_are_flow_matching():
    """w |x_hat - x0|^2 with w = 1 / t^2 is |V - (eps - x0)|^2: at the exact network no parameter is pulled on average."""
    method, rows = seated(reach=0.0, label_dropout=0.0, noise_share=0.0), 20_000
    x0 = TIED + STD * torch.randn(rows, 1, generator=torch.Generator().manual_seed(0))
    (update,) = method.train_step(batch(rows, x0=x0), draw(0, rows))
    backward(method, update)
    assert method.student.module.means.grad.abs().max() < 0.05 and method.student.module.std.grad.abs() < 0.05


def test_the_one_step_schedule_is_told_half_of_its_time():
    """s = .5 t in the step that ends at 0, or at 0 it would blur; guidance keeps norms and doubles calls."""
    method = seated(steps=1, guidance_scale=3.0)
    schedule = method.schedule()
    assert (schedule.target, schedule.told(1.0, 0.0), schedule.rescale) == ("next", 0.5, "energy")
    assert seated(steps=1, guidance_scale=1.0).schedule().rescale is None
    x = sample(method.student, schedule, batch(6).cond, draw(0, 6), (1,))
    assert method.student.module.calls == [12] and x.shape == (6, 1)


def test_s_equal_t_at_every_step_is_ordinary_flow_sampling():
    """`multi` against Euler steps of the velocity."""
    method = seated(sampler="multi", steps=4, guidance_scale=1.0)
    x = sample(method.student, method.schedule(), batch(6).cond, draw(0, 6), (1,))
    state = draw(0, 6).normal("rollout.start", 1)
    for t, t_next in zip((1.0, 0.75, 0.5, 0.25), (0.75, 0.5, 0.25, 0.0)):
        state = state + (t_next - t) * exact(state, t, t, TIED, STD)
    torch.testing.assert_close(x, state)


def test_exact_averages_are_sampled_exactly_when_the_last_step_is_told_0():
    """`any` with last = 0 at V*: the data's law in one step and in four."""
    method = seated(guidance_scale=1.0, last=0.0)
    for steps in (1, 4):
        schedule = Schedule("ode", FlowPath().grid(steps), target="next")
        x = sample(method.student, schedule, batch(6).cond, draw(0, 6), (1,))
        start = draw(0, 6).normal("rollout.start", 1)
        torch.testing.assert_close(x, TIED + STD * start, rtol=1e-4, atol=1e-5)


def test_landing_is_the_posterior_mean_on_the_networks_own_branch():
    """G(x, t, t) = m + (1 - t) s^2 / A(t) (x - (1 - t) m)."""
    t, x = torch.full((5,), 0.6), torch.randn(5, 1)
    found = landing(seated().student, x, t, t, batch(5).cond)
    expected = TIED + 0.4 * STD**2 / variance(0.6) * (x - 0.4 * TIED)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
