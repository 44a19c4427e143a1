"""FreeFlow against closed forms (Tong et al., arXiv 2511.19428): data N(m, s^2), and a 2-D mixture.

With a(t) = sqrt((1-t)^2 s^2 + t^2): v(x, t) = -m + (t - (1-t) s^2) / a^2 (x - (1-t) m), the exact map is
f*(z, d) = d m + a(1-d) z and V*(z, d) = -m + (1 - a(1-d)) / d z.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Cond
from fewstep.maths.derivative import derivative
from fewstep.maths.flow_maps import flow_map, map_velocity, teacher_walk
from fewstep.maths.paths import VPPath, add_noise
from fewstep.methods.base import Total, Update
from fewstep.methods.diffusion.freeflow import FreeFlow
from tests.oracles.harness import batch, draw
from tests.oracles.maps import ExactMap, M, Polynomial, S, freeflow, gaussian, spread

F64 = torch.float64
ROWS = 64


def prior(rows: int = ROWS) -> tuple[Tensor, Tensor, Cond]:
    """z, durations over the whole range, labels; float64."""
    z = torch.randn(rows, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    return z, torch.linspace(0, 1, rows, dtype=F64), batch(rows).cond


def in_float64(method: FreeFlow) -> FreeFlow:
    for name in ("teacher", "student", "fake_velocity"):
        getattr(method, name).module.double()
    return method


def directions(method: FreeFlow, step: int = 0, rows: int = 4096) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What a step moves the student against, by term."""
    parts = method.parts(rows, torch.device("cpu"))
    asked = method.asked(batch(rows).cond, parts, draw(step, rows))
    return method.directions(asked, parts)


# 1, 2, 10: the map


def test_exact_map_is_the_gaussian_transport():
    """Property 1: f*(z, d) = d m + a(1-d) z, V*(z, 0) = z - m = v(z, 1), V*(z, 1) = -m + (1-s) z."""
    method = in_float64(freeflow())
    z, delta, cond = prior()
    expected = delta[:, None] * M + spread(1 - delta)[:, None] * z
    torch.testing.assert_close(flow_map(method.student, z, delta, cond), expected, rtol=0, atol=1e-7)
    at = [map_velocity(method.student, z, torch.full_like(delta, d), cond) for d in (0.0, 1.0)]
    torch.testing.assert_close(at[0], method.teacher.velocity(z, torch.ones_like(delta), cond), rtol=0, atol=1e-7)
    torch.testing.assert_close(at[0], z - M, rtol=0, atol=1e-7)
    torch.testing.assert_close(at[1], (1 - S) * z - M, rtol=0, atol=1e-7)


def residual(how: str, h: float) -> float:
    """Largest |V* + d dV*/dd - v(f*, 1-d)| over z and d."""
    method = in_float64(freeflow())
    z, delta, cond = prior()
    v, slope = derivative(lambda s: map_velocity(method.student, z, s, cond), delta, how, h)
    x = z - delta[:, None] * v
    return (v + delta[:, None] * slope - method.teacher.velocity(x, 1 - delta, cond)).abs()[8:-8].max().item()


def test_exact_map_moves_with_the_teacher():
    """Property 2: the identity holds to 1e-7 with jvp (m and s are float32 numbers) and to O(h^2) with differences."""
    assert residual("jvp", 0.0) < 1e-7
    coarse, fine = residual("central", 0.02), residual("central", 0.01)
    assert coarse / fine == pytest.approx(4, rel=0.05) and fine < 1e-3


def test_integrating_the_teacher_reaches_the_exact_map():
    """Property 10: 2000 Euler steps from z to 1-d agree with f* to 1e-3, also with the walk of `finish`."""
    method = in_float64(freeflow())
    z, _, cond = prior()
    for delta in (0.3, 0.7, 1.0):
        x, width = z, delta / 2000
        for i in range(2000):
            x = x - width * method.teacher.velocity(x, torch.full((ROWS,), 1 - i * width, dtype=F64), cond)
        torch.testing.assert_close(x, delta * M + spread(1 - delta) * z, rtol=0, atol=1e-3)
    walked = teacher_walk(method.teacher, z, 1.0, cond, 2000)
    torch.testing.assert_close(walked, x, rtol=0, atol=1e-12)


# 3, 4: the directions


@pytest.mark.parametrize("how, error", [("jvp", 1e-5), ("central", 1e-3), ("backward", 1e-2)])
def test_prediction_is_zero_at_the_exact_map(how, error):
    """Property 3: with V = V* the residual is 0, and with it the student's gradient."""
    method = freeflow(mode="pred", derivative=how)
    assert directions(freeflow(derivative=how, weight_power=0.0))[0]["prediction"].abs().max() < error
    if how == "jvp":
        (update,) = method.train_step(batch(256), draw(0, 256))
        sum(rows.mean() for rows in update.losses.values()).backward()
        assert max(p.grad.abs().max() for p in method.student.module.parameters()) < 1e-2  # w is 1000 there


def test_correction_is_zero_where_the_student_makes_the_teachers_law():
    """Property 3: exact student and exact fake model, D_N = 0."""
    assert directions(freeflow())[0]["correction"].abs().max() < 1e-5


def test_correction_moves_a_shifted_student_back():
    """Property 4: for x^ ~ N(b, s^2), D_N = (m - b) r / a(r)^2, and x^ goes against V . D_N, towards m."""
    b = M + 0.5
    method = freeflow({"student": ExactMap(b), "fake_velocity": gaussian(b)})
    parts = method.parts(ROWS, torch.device("cpu"))
    asked = method.asked(batch(ROWS).cond, parts, draw(0, ROWS)).rows(parts["correction"])
    found, x0 = method.correction(asked)
    r = asked.level[:, None]
    torch.testing.assert_close(found, (M - b) * r / spread(r) ** 2, rtol=1e-4, atol=1e-5)
    v = ((asked.start - x0) - 0.1 * found).detach()  # a descent step on V . sg[D_N]
    assert ((asked.start - v) - x0).mul(M - b).min() > 0


def test_correction_is_the_distance_of_the_two_clean_predictions_over_r():
    """Property 4, any networks: v_fake - v = (x0_teacher - x0_fake) / r."""
    method = in_float64(freeflow({"fake_velocity": gaussian(-0.3, 1.1)}))
    x, r, cond = torch.randn(ROWS, 1, dtype=F64), torch.linspace(0.05, 0.999, ROWS, dtype=F64), batch(ROWS).cond
    teacher, fake = method.teacher, method.fake_velocity
    gap = (teacher.x0(x, r, cond) - fake.x0(x, r, cond)) / r[:, None]
    torch.testing.assert_close(fake.velocity(x, r, cond) - teacher.velocity(x, r, cond), gap, rtol=1e-6, atol=1e-9)


def test_guidance_acts_within_the_interval_of_each_term():
    """v_g is guided at r <= .7 in the correction and everywhere in the prediction, with the row's own scale."""
    method = freeflow({"teacher": gaussian(null_mean=0.0)}, guidance_scale=3.0, correction_interval=(0.0, 0.7))
    plain = freeflow({"teacher": gaussian(null_mean=0.0)})
    rows, parts = 512, method.parts(512, torch.device("cpu"))
    asked = method.asked(batch(rows).cond, parts, draw(0, rows)).rows(parts["correction"])
    moved = (method.correction(asked)[0] - plain.correction(asked)[0])[:, 0]
    assert (moved[asked.level > 0.7] == 0).all() and (moved[asked.level <= 0.7].abs() > 1e-3).all()
    # guidance of Gaussians of one std moves the mean: v_g - v = -(g - 1)(m_c - m_u) t / a^2, and D_N loses it
    t = asked.level[asked.level <= 0.7]
    torch.testing.assert_close(moved[asked.level <= 0.7], 2 * M * t / spread(t) ** 2, rtol=1e-4, atol=1e-4)


# 8: the mix


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("balance", ["after", "before"])
def test_lambda_makes_the_lengths_of_the_two_terms_equal(balance, alpha):
    """Property 8: mean |lambda D_N| = alpha mean |w D_G|, or of the unweighted D_G; over all parts of the step."""
    networks = {"student": ExactMap(0.3, 0.9), "fake_velocity": gaussian(0.1, 0.8)}
    method = freeflow(networks, balance=balance, alpha=alpha)
    moves, lengths, _ = directions(method, rows=ROWS)
    step = method.train_step(batch(ROWS), draw(0, ROWS))
    said = next(step)
    assert isinstance(said, Total)
    update = step.send({name: 3 * value for name, value in said.items()})  # as from three equal parts
    assert isinstance(update, Update)
    weighted = moves["prediction"].norm(dim=1).mean()
    expected = weighted if balance == "after" else lengths["prediction"].mean()
    assert (balance == "before") == (abs(expected / weighted - 1) > 0.1)
    found = update.metrics["balance"] * moves["correction"].norm(dim=1).mean()
    assert found.item() == pytest.approx(alpha * expected.item(), rel=2e-3)


# 5: training


def fitted(mode: str, steps: int = 500) -> nn.Module:
    """A student linear in z, trained with its own fake model."""
    torch.manual_seed(0)
    networks = {"student": Polynomial(), "fake_velocity": gaussian(0.0, 1.0)}
    method = freeflow(networks, mode=mode, warmup=100 if mode == "joint" else 0, fake_updates=2)
    rates = {"student": 0.03, "fake_velocity": 0.03}
    roles = [r.name for r in method.roles() if r.name in rates]
    optimizers = {n: torch.optim.Adam(getattr(method, n).trainable().values(), rates[n], (0.8, 0.99)) for n in roles}
    fades = [torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / steps)) for o in optimizers.values()]
    for step in range(steps):
        for update in advanced(method, step, 256):
            parameters = list(getattr(method, update.role_names[0]).trainable().values())
            torch.stack([rows.mean() for rows in update.losses.values()]).sum().backward(inputs=parameters)
            optimizers[update.role_names[0]].step()
            optimizers[update.role_names[0]].zero_grad()
        for fade in fades:
            fade.step()
    return method


def advanced(method: FreeFlow, step: int, rows: int):
    """The updates of a step, with its totals sent back."""
    running, reply = method.train_step(batch(rows), draw(step, rows)), None
    while True:
        try:
            said = running.send(reply)
        except StopIteration:
            return
        reply = dict(said) if isinstance(said, Total) else None
        if isinstance(said, Update):
            yield said


def distance(method: FreeFlow, low: float, high: float) -> float:
    """Root mean square of V - V* for d in (low, high)."""
    z = torch.randn(2048, 1, generator=torch.Generator().manual_seed(1))
    delta, cond = torch.linspace(low, high, 2048), batch(2048).cond
    exact = freeflow().student
    with torch.no_grad():
        gap = map_velocity(method.student, z, delta, cond) - map_velocity(exact, z, delta, cond)
    return gap.square().mean().sqrt().item()


def test_a_linear_student_learns_the_exact_map_from_the_prediction():
    """Property 5: everywhere to a few thousandths, without data and without a fake model."""
    method = fitted("pred")
    assert distance(method, 0.0, 1.0) < 5e-3


def test_a_linear_student_learns_the_exact_map_from_both_terms():
    assert distance(fitted("joint"), 0.0, 1.0) < 2e-2


def test_the_correction_alone_knows_the_end_of_the_map_only():
    """Property 5: x^ gets the teacher's law (up to its sign: N(0, 1) noise is symmetric), the map between does not."""
    method = fitted("corr")
    assert distance(method, 1.0, 1.0) < 5e-2
    assert distance(method, 0.3, 0.7) > 0.2


# 11: DDPM teachers


class EpsGaussian(nn.Module):
    """The exact eps of N(m, s^2) data, called as a DDPM network: native state, timestep k."""

    def __init__(self, path: VPPath):
        super().__init__()
        self.path, self.dim, self.null = path, 1, 1
        self.mean = nn.Parameter(torch.tensor(M))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """eps = y + (1-t) v at y = x / scale."""
        t = self.path.time(timestep.double() / len(self.path.alphas_cumprod))[:, None]
        y = x.double() / self.path.scale(t)
        v = -self.mean + (t - (1 - t) * S**2) / spread(t) ** 2 * (y - (1 - t) * self.mean)
        return (y + (1 - t) * v).to(x.dtype)


class EpsMap(nn.Module):
    """The exact map from t_max: f*(y, d) = (1-t) m + a(t) / a(t_max) (y - (1 - t_max) m) at t = t_max - d, told as eps."""

    def __init__(self, path: VPPath):
        super().__init__()
        from tests.oracles.maps import Reads

        self.path, self.extra_inputs, self.dim, self.null = path, Reads("delta"), 1, 1
        self.mean = nn.Parameter(torch.tensor(M))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """eps that means V at the start state x / scale(t_max)."""
        from fewstep.nets.extra_inputs import fed

        top, delta = self.path.t_max, fed("delta")[:, None].double()
        y, t = x.double() / self.path.scale(top), top - delta
        end = (1 - t) * self.mean + spread(t) / spread(top) * (y - (1 - top) * self.mean)
        v = torch.where(delta > 0, (y - end) / delta.clamp_min(1e-9), 0.0)
        return (y + (1 - top) * v).to(x.dtype)


def sd_path() -> VPPath:
    """Stable Diffusion's table: t_max = .936."""
    return VPPath.from_scheduler({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})


def test_ddpm_teacher_shown_as_a_flow_is_the_gaussian_velocity():
    """Property 11: y, t and v of an eps network are those of the closed form."""
    path = sd_path()
    teacher = freeflow({"teacher": EpsGaussian(path)}, path=path).teacher
    t = torch.linspace(path.t_min + 1e-4, path.t_max - 1e-4, ROWS, dtype=F64)
    y = torch.randn(ROWS, 1, dtype=F64)
    expected = -M + ((t - (1 - t) * S**2) / spread(t) ** 2)[:, None] * (y - (1 - t)[:, None] * M)
    torch.testing.assert_close(teacher.velocity(y, t, batch(ROWS).cond), expected, rtol=1e-5, atol=1e-5)
    assert path.t_max == pytest.approx(0.936, abs=1e-3)


def test_ddpm_student_starts_at_t_max_and_has_no_residual_at_its_exact_map():
    """z / (alpha + sigma) is where sampling starts, delta runs over [0, t_max], the teacher is asked at t_max - delta."""
    path = sd_path()
    networks = {"teacher": EpsGaussian(path), "student": EpsMap(path), "fake_velocity": EpsGaussian(path)}
    method = freeflow(networks, path=path, derivative="central", weight_power=0.0)
    parts = method.parts(1024, torch.device("cpu"))
    asked = method.asked(batch(1024).cond, parts, draw(0, 1024))
    assert asked.delta.max() <= path.t_max and asked.level.max() <= path.t_max
    torch.testing.assert_close(asked.start, draw(0, 1024).normal("start", 1) / path.scale(path.t_max))
    far = asked.rows(parts["prediction"])
    inside = (far.delta > 0.05) & (far.delta < path.t_max - 0.01)
    assert method.prediction(far)[0][inside].abs().max() < 2e-2
    made = method.correction(asked.rows(parts["correction"]))[1]
    exact = M + S / spread(path.t_max) * (asked.start[parts["correction"]] - (1 - path.t_max) * M)
    torch.testing.assert_close(made, exact, rtol=1e-3, atol=1e-3)
