"""Paths: clocks, changes of variables and network parameterisations, against definitions and diffusers' schedulers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler

from fewstep.errors import UserError
from fewstep.maths.clocks import discrete
from fewstep.maths.paths import EDMPath, FlowPath, TrigFlowPath, VPPath, add_noise, expand
from fewstep.maths.solvers import Schedule

F64 = torch.float64
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATHS = {
    "flow": FlowPath(),
    "flow shift 3": FlowPath(3.0),
    "vp eps": VPPath.from_scheduler(SD),
    "vp v": VPPath.from_scheduler({**SD, "prediction_type": "v_prediction"}),
    "vp sample": VPPath.from_scheduler({**SD, "prediction_type": "sample"}),
    "vp cosine v": VPPath.from_scheduler({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
    "trig": TrigFlowPath(0.5),
    "edm": EDMPath(),
}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def inner(path, n: int = 257) -> torch.Tensor:
    """Clock values over the whole range of the path."""
    return torch.linspace(0, path.clock(path.t_max), n, dtype=F64)


def test_clock_inverts_time_exactly(path):
    u = inner(path)
    assert (path.clock(path.time(u)) - u).abs().max() < 1e-12


def test_time_runs_from_t_min_to_t_max_and_stays_there(path):
    t = path.time(inner(path))
    assert (t.diff() > 0).all()
    assert t[0].item() == pytest.approx(path.t_min, abs=1e-12)
    assert t[-1].item() == pytest.approx(path.t_max, abs=1e-12)
    assert path.time(1.0) <= path.t_max
    assert path.time(0.0) >= path.t_min


def test_functions_of_time_take_floats_and_tensors_and_keep_their_type(path):
    u = 0.37
    for function in (path.time, path.clock, path.scale, path.timestep):
        number = function(u)
        assert isinstance(number, float)
        assert function(torch.tensor([u], dtype=F64)).dtype == F64
        assert function(torch.tensor([u], dtype=F64)).item() == number
        assert function(torch.tensor([u])).dtype == torch.float32
        assert function(torch.tensor([u])).item() == pytest.approx(number, rel=1e-4)


def test_output_and_velocity_are_inverse_and_the_target_is_right(path, normal):
    """velocity(output(v)) = v, and the pair's target means eps - x0."""
    t = path.time(inner(path, 12)[1:-1])
    x0, eps, v = normal(10, 2, 3), normal(10, 2, 3), normal(10, 2, 3)
    y = add_noise(x0, eps, t)
    assert torch.allclose(path.velocity(path.output(v, y, t), y, t), v, atol=1e-10, rtol=1e-10)
    assert torch.allclose(path.output(eps - x0, y, t), path.target(x0, eps, t), atol=1e-10, rtol=1e-10)


def test_the_native_state_is_alpha_x0_plus_sigma_eps(path, normal):
    """scale = alpha + sigma and t = sigma / (alpha + sigma) for each process's own alpha and sigma."""
    t = path.time(inner(path, 9))
    x0, eps = normal(9, 4), normal(9, 4)
    native = path.native(add_noise(x0, eps, t), t)
    alpha, sigma = (expand(c, x0) for c in levels(path, t))
    assert torch.allclose(native, alpha * x0 + sigma * eps, atol=1e-10)


def levels(path, t):
    if isinstance(path, VPPath):
        abar = torch.tensor(path.alphas_cumprod, dtype=F64)
        k = path.clock(t) * len(abar)
        ratio = torch.exp(interpolate(((1 - abar) / abar).log() / 2, k))
        return (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
    if isinstance(path, TrigFlowPath):
        angle = path.clock(t) * math.pi / 2
        return path.sigma_data * angle.cos(), path.sigma_data * angle.sin()
    if isinstance(path, EDMPath):
        return torch.ones_like(t), t / (1 - t)
    return 1 - t, t


def interpolate(table, k):
    low = k.floor().long().clamp(max=len(table) - 2)
    return table[low] + (k - low) * (table[low + 1] - table[low])


def test_paths_are_values(path):
    assert copy.deepcopy(path) == path
    assert hash(copy.deepcopy(path)) == hash(path)
    with pytest.raises(AttributeError):
        path.t_max = 0.5


def test_time_has_a_derivative(path):
    """d time / du, needed by tangents in t, against central differences."""
    u = inner(path, 1003)[1:-1:50] + 1e-5
    _, slope = torch.func.jvp(path.time, (u,), (torch.ones_like(u),))
    h = 1e-7
    assert torch.allclose(slope, (path.time(u + h) - path.time(u - h)) / (2 * h), rtol=1e-5, atol=1e-7)


class TestFlow:
    def test_shift_three_grid_and_identity_of_state_and_output(self, normal):
        path, y = FlowPath(3.0), normal(2, 3)
        assert [path.time(u) for u in path.grid(4)] == pytest.approx([1, 0.9, 0.75, 0.5], abs=1e-15)
        assert path.native(y, 0.3) is y
        assert path.velocity(y, y, 0.3) is y
        assert path.start(y) is y

    @pytest.mark.parametrize("steps", range(1, 21))
    @pytest.mark.parametrize("factor", [1.0, 3.0, 6.0])
    def test_integer_labels_are_those_of_the_flow_dpm_solver(self, steps, factor):
        scheduler = DPMSolverMultistepScheduler(
            solver_order=1, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=factor
        )
        scheduler.set_timesteps(steps)
        path = FlowPath(factor, integer_timesteps=True)
        t = path.time(torch.tensor(Schedule.uniform(steps, start=0.999).u, dtype=F64))
        assert torch.allclose(t, scheduler.sigmas[:-1].double(), atol=1e-6)
        assert path.timestep(t).tolist() == scheduler.timesteps.tolist()
        assert path.timestep(t.float()).tolist() == scheduler.timesteps.tolist()

    def test_times_beyond_the_ends_are_the_ends(self):
        path = FlowPath(t_max=0.98, t_min=0.02)
        u = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0], dtype=F64)
        assert path.time(u).tolist() == [0.02, 0.02, 0.5, 0.98, 0.98]

    def test_the_grid_starts_at_t_max(self):
        path = FlowPath(3.0, t_max=FlowPath(3.0).time(0.999))
        assert path.grid(4) == pytest.approx(Schedule.uniform(4, start=0.999).u, abs=1e-12)


class TestVariancePreserving:
    def test_stable_diffusions_times(self, sd):
        path = VPPath.from_scheduler(sd)
        expected = {999: 0.93596, 749: 0.80322, 499: 0.61728, 249: 0.40940, 0: 0.02834}
        for k, t in expected.items():
            assert path.time(k / 1000) == pytest.approx(t, abs=6e-6)
        assert 1 / path.start(torch.ones(1, dtype=F64)).item() == pytest.approx(1.06593, abs=1e-5)

    @pytest.mark.parametrize("count", [1000, 50])
    def test_times_at_table_entries_are_sigma_over_alpha_plus_sigma(self, sd, count):
        path = VPPath.from_scheduler({**sd, "num_train_timesteps": count})
        abar = torch.tensor(path.alphas_cumprod, dtype=F64)
        a, s = abar.sqrt(), (1 - abar).sqrt()
        k = torch.arange(count, dtype=F64)
        assert (path.time(k / count) - s / (a + s)).abs().max() < 1e-14
        assert (path.scale(s / (a + s)) - (a + s)).abs().max() < 1e-14

    def test_labels_are_whole_numbers_at_table_entries_in_float32_too(self, sd):
        path = VPPath.from_scheduler(sd)
        k = torch.arange(1000, dtype=torch.float32)
        assert torch.equal(path.timestep(path.time(k / 1000)), k)
        between = path.timestep(path.time(torch.tensor([0.5004, 0.7506], dtype=F64)))
        assert torch.allclose(between, torch.tensor([500.4, 750.6], dtype=F64), atol=1e-9)

    def test_discrete_draws_hit_table_entries(self, sd):
        path = VPPath.from_scheduler(sd)
        labels = path.timestep(path.time(discrete(torch.rand(500, dtype=torch.float32), 1000)))
        assert torch.equal(labels, labels.round())

    def test_the_grid_is_the_trailing_one_for_every_step_count(self, sd):
        scheduler = DDIMScheduler(**sd, timestep_spacing="trailing")
        path = VPPath.from_scheduler(sd)
        for steps in range(1, 61):
            scheduler.set_timesteps(steps)
            assert [round(u * 1000) for u in path.grid(steps)] == scheduler.timesteps.tolist()

    def test_zero_terminal_snr_reaches_pure_noise_with_finite_velocity(self, sd, normal):
        path = VPPath.from_scheduler({**sd, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
        assert path.t_max == 1.0
        assert path.timestep(path.time(0.999)) == 999.0
        y = normal(2, 3)
        # at alpha = 0 the v-output is -x0, so v = eps - x0 = y + output
        assert torch.allclose(path.velocity(y, y, 1.0), 2 * y, atol=1e-14)
        assert torch.equal(path.start(y), y)

    def test_epsilon_prediction_with_zero_terminal_snr_is_refused(self, sd):
        with pytest.raises(UserError, match="v_prediction"):
            VPPath.from_scheduler({**sd, "rescale_betas_zero_snr": True})

    def test_an_unknown_prediction_is_refused_with_the_nearest(self, sd):
        with pytest.raises(UserError, match="did you mean 'epsilon'"):
            VPPath.from_scheduler({**sd, "prediction_type": "epsilom"})


class TestTrigFlow:
    def test_the_clock_is_the_angle_and_f_rotates_the_state(self, normal):
        """x0 = cos a x - sin a F with x in units of sigma_data (arXiv 2410.11081)."""
        path, x0, eps = TrigFlowPath(0.5), normal(5, 3), normal(5, 3)
        u = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.99], dtype=F64)
        t, angle = path.time(u), expand(u * math.pi / 2, x0)
        assert torch.allclose(path.timestep(t), u * math.pi / 2, atol=1e-14)
        fed = path.input_scale(t) * path.native(add_noise(x0, eps, t), t)
        assert torch.allclose(fed, angle.cos() * x0 + angle.sin() * eps, atol=1e-13)
        assert torch.allclose(angle.cos() * fed - angle.sin() * path.target(x0, eps, t), x0, atol=1e-13)

    def test_f_from_a_flow_network_is_the_conversion_of_sana_sprint(self, normal):
        """F = ((1 - 2t) y + (1 - 2t + 2t^2) v) / sqrt(t^2 + (1-t)^2) (arXiv 2503.09641)."""
        t, y, v = torch.tensor([0.2, 0.9], dtype=F64), normal(2, 3), normal(2, 3)
        s = expand(t, y)
        expected = ((1 - 2 * s) * y + (1 - 2 * s + 2 * s**2) * v) / (s**2 + (1 - s) ** 2).sqrt()
        assert torch.allclose(TrigFlowPath().output(v, y, t), expected, atol=1e-14)


class TestEDM:
    def test_the_clock_is_the_karras_grid(self):
        scheduler = EDMEulerScheduler()
        scheduler.set_timesteps(9)
        sigma = scheduler.sigmas[:-1].double()
        path = EDMPath()
        t = path.time(torch.linspace(1, 0, 9, dtype=F64))
        assert torch.allclose(t / (1 - t), sigma, rtol=1e-5)
        assert path.start(torch.ones(1, dtype=F64)).item() * path.scale(path.t_max) == pytest.approx(80.0)

    def test_preconditioning_is_the_schedulers(self, normal):
        scheduler = EDMEulerScheduler()
        path, sigma, y, output = EDMPath(), 1.7, normal(1, 3), normal(1, 3)
        t = sigma / (1 + sigma)
        native = path.native(y, t)
        theirs = scheduler.precondition_outputs(native, output, torch.tensor(sigma, dtype=F64))
        assert torch.allclose(y - t * path.velocity(output, y, t), theirs, atol=1e-12)
        fed = scheduler.precondition_inputs(native, torch.tensor(sigma, dtype=F64))
        assert torch.allclose(path.input_scale(t) * native, fed, atol=1e-12)
        assert path.timestep(t) == pytest.approx(scheduler.precondition_noise(sigma).item(), abs=1e-6)
