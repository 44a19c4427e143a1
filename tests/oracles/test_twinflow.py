"""TwinFlow against closed forms (Cheng et al., arXiv 2512.05150): data N(m, s^2), one-step outputs N(b, g^2).

With a_s(t)^2 = (1-t)^2 s^2 + t^2 and k_s(t) = (t - (1-t) s^2) / a_s(t)^2: v(x, t) = -m + k_s (x - (1-t) m), and
V*(x, t, r) = (x - X) / (t - r), X = (1-r) m + a_s(r) / a_s(t) (x - (1-t) m), is the exact average velocity.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.maths.average_velocity import average_velocity
from fewstep.maths.paths import FlowPath
from fewstep.maths.rcgm import dealt
from fewstep.maths.solvers import Schedule, sample
from fewstep.methods.base import Update
from fewstep.methods.diffusion.twinflow import TwinFlow
from fewstep.models.oracle import MLP
from fewstep.nets.extra_inputs import fed
from fewstep.roles import Handle, RoleSpec
from tests.oracles.harness import backward, batch, draw, seat
from tests.oracles.maps import Reads

M, S = 1.0, 0.5
PLAIN = {"metric": "l2", "clamp": None, "null_drop": 0.0}


def field(x: Tensor, t: Tensor, mean: Any, std: Any) -> Tensor:
    """The velocity of N(mean, std^2)."""
    return -mean + (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)


def average(x: Tensor, t: Tensor, r: Tensor, mean: Any, std: Any) -> Tensor:
    """Its exact average from t down to r < t."""
    spread = [((1 - u) ** 2 * std**2 + u**2) ** 0.5 for u in (r, t)]
    end = (1 - r) * mean + spread[0] / spread[1] * (x - (1 - t) * mean)
    return (x - end) / (t - r).clamp_min(1e-9)


class Twins(nn.Module):
    """Every role in closed form: at s = t the velocity of N(m, s^2), below it its average, at negative time the velocity
    of N(b, g^2); the whole way from noise is the generator z -> b + g z. b and g of generator and twin are parameters."""

    def __init__(self, b: float = M, g: float = S, twin: tuple[float, float] | None = None):
        super().__init__()
        self.extra_inputs, self.dim, self.null = Reads("s", "sign"), 1, 1
        self.made = nn.Parameter(torch.tensor([b, g], dtype=torch.float64))
        self.twin = nn.Parameter(torch.tensor(twin or (b, g), dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """V at x [rows, 1]."""
        t, s, sign = (fed(name)[:, None].double() for name in ("t", "s", "sign"))
        x = x.double()
        way = torch.where(t > s, average(x, t, s, M, S), field(x, t, M, S))
        way = torch.where((t == 1) & (s == 0), x - self.made[0] - self.made[1] * x, way)
        return torch.where(sign < 0, field(x, t, *self.twin), way)


def twinflow(network: nn.Module | None = None, **config: Any) -> TwinFlow:
    """The method, squared errors without clamp, on a network of one dimension."""
    method = TwinFlow(TwinFlow.Config(**{**PLAIN, **config}))
    seat(method, {"student": network or Twins()}, FlowPath())
    return method


def gaussian(rows: int, dim: int = 1, seed: int = 0) -> Any:
    """A batch of real data N(1, .5^2)."""
    noise = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return batch(rows, x0=M + S * noise)


def update(method: TwinFlow, rows: int = 64, step: int = 0) -> Update:
    """What a step says."""
    (said,) = method.train_step(gaussian(rows, seed=step), draw(step, rows))
    assert isinstance(said, Update)
    return said


# 3, 4: RCGM in the method


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("split", ["uniform", "random"])
def test_the_exact_averages_have_a_residual_of_the_order_of_d(order, split):
    """Property 3: under the marginal velocity, in all rows; and 10 where the generator is off by .1, that is .1 / D."""

    def largest(network: nn.Module, step: float = 0.01) -> float:
        method = twinflow(network, order=order, split=split, derivative_step=step)
        rows = dealt(method.config.group, 64, torch.device("cpu"))
        path = method.asked(gaussian(64), rows, draw(0, 64)).part(rows.path)
        path = path._replace(v=field(path.x, path.t[:, None], M, S))
        with torch.no_grad():
            answer = average_velocity(method.student, path.x, path.t, path.s, path.cond)
            return method.residual(path, answer, rows, draw(1, 64)).abs().max().item()

    coarse, fine = largest(Twins()), largest(Twins(), 1e-3)
    assert fine < 0.005 < coarse < 0.05
    assert largest(Twins(b=M + 0.1)) == pytest.approx(10, rel=0.05)


def test_order_0_is_flow_matching():
    """Rows of mul alone, the target is v: nothing is rolled out, and the loss is the plain one."""
    method = twinflow(order=0)
    rows = dealt(method.config.group, 8, torch.device("cpu"))
    asked = method.asked(gaussian(8), rows, draw(0, 8))
    assert ((asked.t - asked.s) <= 0.05 * asked.t + 1e-6).all() and method.row_multiple == 1
    with torch.no_grad():
        answer = average_velocity(method.student, asked.x, asked.t, asked.s, asked.cond)
    said = update(method, 8)
    torch.testing.assert_close(said.levels["rcgm"].rows, ((answer - asked.v) ** 2)[:, 0])
    assert set(said.losses) == {"rcgm"}


# 7: guidance


def test_guidance_from_itself_comes_to_the_usual_scale():
    """Property 7, through the method: the velocity that mul and any rows are trained on is v + (1 - 1/w) (v_c - v_u); with
    w = 5 a network that is already guided, d = 5 (v_c - v_u), is trained on what it answers."""

    class Labelled(nn.Module):
        """v_u + w (v_c - v_u): conditional data N(m, s^2), unconditional N(0, s^2)."""

        def __init__(self, scale: float):
            super().__init__()
            self.extra_inputs, self.dim, self.null = Reads("s", "sign"), 1, 1
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            t = fed("t")[:, None]
            free, tied = field(x, t, 0.0, S), field(x, t, M, S)
            return torch.where(label[:, None] == 1, free, free + self.scale * (tied - free))

    method = twinflow(Labelled(5.0), guidance_scale=5.0)
    rows = dealt(method.config.group, 64, torch.device("cpu"))
    asked = method.asked(gaussian(64), rows, draw(0, 64))
    marginal = asked._replace(v=field(asked.x, asked.t[:, None], M, S)).part(rows.path)
    with torch.no_grad():
        found = method.velocity(marginal, rows.between)
        answer = method.student.velocity(marginal.x, marginal.t, marginal.cond.with_(s=marginal.t))
    torch.testing.assert_close(found[rows.between], answer[rows.between], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[rows.whole], marginal.v[rows.whole])  # never enhanced where they start from noise
    inside = twinflow(Labelled(5.0), guidance_scale=5.0, guidance_interval=(0.3, 0.6))
    with torch.no_grad():
        changed = (inside.velocity(marginal, rows.between) != marginal.v)[:, 0]
    assert torch.equal(changed[rows.between], ((marginal.t > 0.3) & (marginal.t < 0.6))[rows.between])


# 8: the rectification


def fields(b: float, g: float, rows: int = 1 << 17) -> tuple[Tensor, Tensor, Tensor]:
    """G, the one-step outputs it was found at, and u: with exact fields of both signs."""
    method = twinflow(Twins(b, g), parts={"e2e": 1, "adv": 1})
    parts = dealt(method.config.group, 2 * rows, torch.device("cpu"))
    numbers = draw(0, 2 * rows)
    x0 = b + g * numbers.normal("z", 1)[parts.order][parts.whole]
    cond = batch(2 * rows).cond[parts.order][parts.whole]
    found = method.difference(x0, cond, parts, numbers)
    u = draw(0, 2 * rows).within("u").uniform("flat")[parts.order][parts.whole]
    return found, x0, u


def test_the_rectification_moves_the_mean_towards_the_data():
    """Property 8: where g = s, G = (m - b) u / a(u)^2 at every point, in the mean 1.18284 (m - b)."""
    b = M - 0.5
    found, _, u = fields(b, S)
    exact = (M - b) * u / ((1 - u) ** 2 * S**2 + u**2)
    torch.testing.assert_close(found[:, 0], exact.to(found), rtol=1e-4, atol=1e-4)
    assert found.mean().item() / (M - b) == pytest.approx(1.18284, abs=5e-3)


def test_the_rectifications_pull_on_the_mean_is_pi_over_4_for_unit_data():
    """Property 8: the integral of t / ((1-t)^2 s^2 + t^2) is pi/4 at s = 1 and 1.18284 at s = .5."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for std, expected in ((1.0, 0.785398), (0.5, 1.18284)):
        # the difference of the two fields at any x, with equal stds and means 1 apart
        gap = field(torch.zeros_like(t), t, 0.0, std) - field(torch.zeros_like(t), t, 1.0, std)
        assert gap.mean().item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("g, expected", [(0.4, 0.05949), (0.5, 0.0), (0.6, -0.06854)])
def test_the_rectification_moves_the_spread_towards_the_data(g, expected):
    """Property 8: d std / d tau = E[G (x^ - b)] / g."""
    found, x0, _ = fields(M, g)
    assert (found * (x0 - M)).mean().item() / g == pytest.approx(expected, abs=2e-3)


def test_the_rectification_alone_makes_the_data_from_an_exact_twin():
    """Property 8: SGD on L_rect with a twin that keeps up comes to b = m, g = s, where G is zero at every point."""
    network = Twins(0.2, 0.9)
    method = twinflow(network)
    for step in range(80):
        network.twin.data.copy_(network.made.data)
        rows = update(method, 128, step).losses["rectification"]
        (gradient,) = torch.autograd.grad(rows.mean(), network.made)
        network.made.data.sub_(0.5 * gradient)
    torch.testing.assert_close(network.made.data, torch.tensor([M, S], dtype=torch.float64), rtol=0, atol=1e-6)
    assert update(method, 256).metrics["difference_rms"].max() < 1e-5


def test_real_velocities_may_be_the_bases_own():
    """With real_velocity teacher G holds the twin against the frozen base, whatever the student's own field says."""

    class Astray(Twins):
        def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            return super().forward(x, timestep, label) + 3.0 * (fed("sign")[:, None] > 0)

    method = TwinFlow(TwinFlow.Config(**PLAIN, real_velocity="teacher"))
    seat(method, {"student": Astray(), "teacher": _base(M)}, FlowPath())
    rows = dealt(method.config.group, 64, torch.device("cpu"))
    with torch.no_grad():
        x0 = M + S * torch.randn(16, 1)
        found = method.difference(x0, batch(16).cond, rows, draw(0, 64))
    assert found.abs().max() < 1e-5


def _base(mean: float) -> nn.Module:
    from fewstep.models.oracle import GAUSSIAN

    return GAUSSIAN.build(means=[[mean]], std=[S]).module


# 9, 10: who learns from what


def test_the_twin_learns_the_field_of_what_is_made_and_moves_nothing_else():
    """Property 9: L_adv's gradient vanishes where the twin's field is that of N(b, g^2), the generator being elsewhere
    than the data; none of it reaches the generator."""

    def gradients(twin: tuple[float, float]) -> Tensor:
        network = Twins(b=0.3, g=0.8, twin=twin)
        method = twinflow(network, parts={"adv": 1}, order=1)
        rows = update(method, 1 << 15).losses["adversarial"]
        assert torch.autograd.grad(rows.mean(), network.made, allow_unused=True, retain_graph=True)[0].abs().max() == 0
        return torch.autograd.grad(rows.mean(), network.twin)[0]

    assert gradients((0.3, 0.8)).abs().max() < 0.03
    assert gradients((M, S)).abs().min() > 0.15


def test_the_rectification_has_a_gradient_through_the_generators_answer_alone():
    """Property 10: dL/dV = 2 k G / numel over the e2e rows and zero elsewhere; q and both fields carry no graph."""
    method, kept, answers = twinflow(Twins(b=0.2, twin=(0.4, 0.7)), weights={"rectification": 0.75}), [], []
    inside = method.difference
    method.difference = lambda *args: kept.append(inside(*args)) or kept[-1]

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            answers.append(output)

    method.student.module.register_forward_hook(keep)
    said = update(method, 64)
    (0.75 * said.losses["rectification"].mean()).backward()
    (answer,), (g,) = answers, kept  # one call with a graph
    assert not g.requires_grad and len(g) == 16
    torch.testing.assert_close(answer.grad[:16], 2 * 0.75 * g / g.numel())
    assert answer.grad[16:].abs().max() == 0 and method.student.module.twin.grad.abs().max() == 0


def test_parts_count_by_their_share_and_the_rectification_by_its_own_mean():
    """Section 6 of the method's algorithm: mean over all rows of weight d, plus k times the mean over e2e rows."""
    method = twinflow(Twins(b=0.2, g=0.8))
    said, rows = update(method, 64), dealt(method.config.group, 64, torch.device("cpu"))
    asked = method.asked(gaussian(64), rows, draw(0, 64))
    weight = 1 + torch.tan(0.4 * torch.pi * (1 - (asked.t - asked.s)))[rows.path]
    total = (weight * said.levels["rcgm"].rows).sum() + said.levels["adversarial"].rows.sum()
    terms = said.losses["rcgm"].mean() + said.losses["adversarial"].mean()
    torch.testing.assert_close(terms, total / 64)
    assert [len(said.losses[name]) for name in ("rcgm", "adversarial", "rectification")] == [48, 16, 16]


# 11: samplers


@pytest.mark.parametrize(
    "kind, target, u, expected",
    [
        ("renoise", "zero", (0.999, 0.6), 0.500),
        ("ode", "zero", (0.999, 0.6), 0.632),
        ("ode", "zero", (0.999, 0.8327, 0.6663, 0.5), 0.70),
        ("ode", "next", (0.999, 0.6), 0.500),
        ("ode", "next", (1.0, 0.75, 0.5, 0.25), 0.500),
        ("renoise", "next", (0.999, 0.6), 0.475),
    ],
)
def test_few_is_exact_with_fresh_noise_and_any_without(kind, target, u, expected):
    """Property 11: with V*, the std of samples; x^ without new noise spreads too far, `any` with it too little."""
    rows = 1 << 17
    made = sample(twinflow().student, Schedule(kind, u, target=target), batch(rows).cond, draw(3, rows), (1,))
    assert made.std().item() == pytest.approx(expected, abs=5e-3)
    assert made.mean().item() == pytest.approx(M, abs=5e-3)


def test_negative_time_shows_what_is_made():
    """20 Euler steps along the twin's field give N(b, g^2), but for the factors 1 - k(t)/20 that stand for a(0) = g."""
    method = twinflow(Twins(b=0.2, g=0.8))
    method.preview_cond = lambda rows: batch(rows).cond
    made = method.pictures(20_000, seed=0)["negative time"]
    std = 1.0
    for i in range(20):
        t = 1 - i / 20
        std *= 1 - (t - (1 - t) * 0.64) / ((1 - t) ** 2 * 0.64 + t**2) / 20
    assert std == pytest.approx(0.749, abs=1e-3)
    assert made.mean().item() == pytest.approx(0.2, abs=0.02) and made.std().item() == pytest.approx(std, abs=0.01)


# 14: a small network


def learned(parts: dict[str, int], steps: int = 2000, rows: int = 144) -> tuple[float, float]:
    """Mean and std of one-step samples in 8 dimensions: 300 steps of flow matching, then `steps` of the method."""
    torch.manual_seed(0)
    network = MLP.upgrade(MLP.build(dim=8, width=64, depth=2).module, ("s", "sign"))
    for config, count, rate in (({"order": 0}, 300, 3e-3), ({"parts": parts}, steps, 1e-3)):
        method = TwinFlow(TwinFlow.Config(**PLAIN, **config))
        spec = RoleSpec(ema=0.99, ema_warmup=True)
        handle = Handle(method.roles()[0], network, spec, "full", family="mlp", path=FlowPath())
        method.bind({"student": handle}, {}, {})
        optimizer = torch.optim.Adam(network.parameters(), rate, fused=True)
        fade = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
        for step in range(count):
            backward(method, next(iter(method.train_step(gaussian(rows, 8, step), draw(step, rows)))))
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            fade.step()
            handle.update_ema()
    with method.student.averaged():
        made = sample(method.student, Schedule("ode", (1.0,), target="next"), batch(4096).cond, draw(10**6, 4096), (8,))
    return made.mean().item(), made.std(0).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{"e2e": 1, "mul": 1, "any": 1}, {"e2e": 1, "mul": 1, "any": 1, "adv": 1}])
def test_a_small_network_learns_the_data_in_one_step(parts):
    """Property 14: mean 1 and std .4927, that of Euler steps of width D, with and without the twin; to .03 (found: .995,
    .493 and .994, .491)."""
    mean, std = learned(parts)
    assert mean == pytest.approx(1.0, abs=0.03) and std == pytest.approx(0.4927, abs=0.03)
