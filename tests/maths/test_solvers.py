"""Schedules, steps and rollouts against closed forms and against the stock schedulers that will run the students."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SCMScheduler,
)

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.maths.paths import FlowPath, TrigFlowPath, VPPath
from fewstep.maths.solvers import Schedule, heun_step, rollout, sample, step

F64 = torch.float64
STEPS = [1, 2, 4, 8]


def wavy(x, k, cond):
    """A network without special structure."""
    return 0.6 * x + 0.3 * torch.sin(2 * x + 0.01 * k)


def gaussian_eps(exact, path):
    """The eps-network of N(m, s^2) on a table: sigma (x - alpha m) / (alpha^2 s^2 + sigma^2)."""
    abar = torch.tensor(path.alphas_cumprod, dtype=F64)

    def network(x, k, cond):
        a2 = abar[k.round().long()]
        return (1 - a2).sqrt() * (x - a2.sqrt() * exact.mean) / (a2 * exact.std**2 + 1 - a2)

    return network


class TestSchedule:
    def test_uniform_levels(self):
        assert Schedule.uniform(4).u == (1.0, 0.75, 0.5, 0.25)
        assert Schedule.uniform(2, "renoise", 3.0, start=0.9) == Schedule("renoise", (0.9, 0.45), 3.0)
        assert Schedule.uniform(8).steps == 8

    @pytest.mark.parametrize("u", [(), (0.5, 0.5), (0.5, 0.75), (1.2, 0.5), (1.0, 0.0), (1.0, -0.1)])
    def test_levels_out_of_order_or_range_are_refused(self, u):
        with pytest.raises(UserError, match="levels"):
            Schedule("ode", u)

    def test_unknown_words_and_step_counts_are_refused(self):
        with pytest.raises(UserError, match="euler"):
            Schedule("euler", (1.0,))
        with pytest.raises(UserError, match="stale"):
            Schedule("ode", (1.0,), noise="stale")
        with pytest.raises(UserError, match="at least 1"):
            Schedule.uniform(0)


class TestStep:
    def test_ode_moves_along_the_velocity(self, normal):
        x0, eps = normal(2, 3), normal(2, 3)
        x = 0.3 * x0 + 0.7 * eps
        assert torch.allclose(step("ode", x, x0, 0.7, 0.4), x + (0.4 - 0.7) * (eps - x0), atol=1e-14)

    def test_rows_may_have_their_own_times(self, normal):
        x, x0 = normal(2, 3), normal(2, 3)
        t, t_next = torch.tensor([0.9, 0.5], dtype=F64), torch.tensor([0.4, 0.1], dtype=F64)
        both = step("ode", x, x0, t, t_next)
        assert torch.allclose(both[1:], step("ode", x[1:], x0[1:], 0.5, 0.1), atol=1e-15)

    @pytest.mark.parametrize("kind", ["ode", "renoise"])
    def test_a_step_to_zero_is_exactly_x0(self, kind, normal):
        x, x0 = normal(2, 3), normal(2, 3)
        assert torch.equal(step(kind, x, x0, 0.7, 0.0), x0)
        assert torch.equal(step(kind, x, x0, torch.full((2,), 0.7), torch.zeros(2), normal(2, 3)), x0)

    def test_renoise_mixes_fresh_noise(self, normal):
        x, x0, noise = normal(2, 3), normal(2, 3), normal(2, 3)
        assert torch.allclose(step("renoise", x, x0, 0.7, 0.4, noise), 0.6 * x0 + 0.4 * noise, atol=1e-15)
        with pytest.raises(ValueError, match="needs noise"):
            step("renoise", x, x0, 0.7, 0.4)

    def test_float32_states_stay_float32(self):
        x = torch.ones(2, 3)
        assert step("ode", x, x, torch.full((2,), 0.7, dtype=F64), 0.1).dtype == torch.float32
        assert step("ode", x, x, 0.7, 0.1).dtype == torch.float32


class TestRollout:
    def test_level_zero_is_the_start_noise_bit_for_bit_without_a_call(self, oracle):
        draws, network = oracle.Draws(), oracle.Network(FlowPath(3.0), wavy)
        x, u = rollout(network, Schedule.uniform(4), None, draws, (2, 2), until=0)
        assert torch.equal(x, draws.drawn["rollout.start"])
        assert (u, network.calls) == (1.0, [])

    def test_level_i_takes_i_calls_and_keeps_no_graph(self, oracle):
        weight = torch.ones((), dtype=F64, requires_grad=True)
        network = oracle.Network(FlowPath(), lambda x, k, cond: weight * x)
        x, u = rollout(network, Schedule.uniform(4), None, oracle.Draws(), (5,), until=3)
        assert (u, network.calls) == (0.25, [3, 3, 3])
        assert not x.requires_grad

    @pytest.mark.parametrize("kind", ["ode", "renoise"])
    def test_going_on_from_a_level_gives_the_sample(self, oracle, kind):
        """Training starts from what the sampler passes through: one more step at a time ends in the sample."""
        network, schedule = oracle.Network(FlowPath(3.0), wavy), Schedule.uniform(3, kind)
        draws = oracle.Draws()
        done = sample(network, schedule, None, draws, (4,))
        levels = [rollout(network, schedule, None, oracle.Draws(), (4,), until=i)[0] for i in range(4)]
        assert torch.equal(levels[3], done)
        for i in range(3):
            t, t_next = (network.path.time(u) if u else 0.0 for u in (*schedule.u, 0.0)[i : i + 2])
            x0 = network.x0(levels[i], torch.full((3,), t, dtype=F64), None)
            assert torch.equal(step(kind, levels[i], x0, t, t_next, draws.drawn.get(f"rollout.{i}")), levels[i + 1])

    def test_only_renoise_draws_and_never_for_the_last_step(self, oracle):
        names = {}
        for kind in ("ode", "renoise"):
            draws = oracle.Draws()
            sample(oracle.Network(FlowPath(), wavy), Schedule.uniform(3, kind), None, draws, (4,))
            names[kind] = list(draws.drawn)
        assert names == {"ode": ["rollout.start"], "renoise": ["rollout.start", "rollout.0", "rollout.1"]}

    def test_start_noise_can_be_used_at_every_level(self, oracle):
        draws, exact = oracle.Draws(), oracle.Gaussian()
        x, _ = rollout(exact, Schedule("renoise", (1.0, 0.5), noise="start"), None, draws, (4,), until=1)
        start = draws.drawn["rollout.start"]
        assert list(draws.drawn) == ["rollout.start"]
        assert torch.allclose(x, 0.5 * exact.x0(start, 1.0) + 0.5 * start, atol=1e-14)

    def test_a_level_beyond_the_schedule_is_an_error(self, oracle):
        with pytest.raises(ValueError, match="level 3"):
            rollout(oracle.Gaussian(), Schedule.uniform(2), None, oracle.Draws(), (4,), until=3)

    def test_guidance_of_the_schedule_is_applied(self, oracle, normal):
        network = oracle.Network(FlowPath(), lambda x, k, cond: x * cond["label"][:, None])
        cond, draws = oracle.Cond(label=torch.tensor([1.0, 2.0, 3.0], dtype=F64)), oracle.Draws()
        done = sample(network, Schedule.uniform(1, guidance=2.5), cond, draws, (4,))
        noise = draws.drawn["rollout.start"]
        assert torch.allclose(done, noise - 2.5 * cond["label"][:, None] * noise, atol=1e-13)
        assert network.calls == [6]

    def test_float32_networks_see_float32(self, oracle):
        seen = []
        network = oracle.Network(FlowPath(3.0), lambda x, k, cond: seen.append((x.dtype, k.dtype)) or x)
        x, _ = rollout(network, Schedule.uniform(2, "renoise"), None, oracle.Draws(dtype=torch.float32), (4,))
        assert seen == [(torch.float32, torch.float32)] * 2
        assert x.dtype == torch.float32


def test_many_ode_steps_on_a_table_follow_the_exact_transport(oracle, sd):
    """The probability flow of Gaussian data, in flow variables from t_max = .936, with first-order error."""
    exact, path = oracle.Gaussian(), VPPath.from_scheduler(sd)
    network, errors = oracle.Network(path, gaussian_eps(exact, path)), []
    for steps in (125, 250):
        draws = oracle.Draws()
        done = sample(network, Schedule("ode", path.grid(steps)), None, draws, (4,))
        start = path.start(draws.drawn["rollout.start"])
        errors.append((done - exact.transport(start, path.t_max, 0.0)).abs().max())
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.2)


class TestStockSchedulers:
    """The schedulers that are exported step as `sample` does, here in float64 wherever they allow it."""

    def run(self, scheduler, x, network, path):
        """The pipeline's loop: native states, the scheduler's own labels."""
        generator = torch.Generator().manual_seed(7)
        for label in scheduler.timesteps:
            output = network(x, label.to(x.dtype), None)
            extra = {} if isinstance(scheduler, DDIMScheduler) else {"generator": generator}
            x = scheduler.step(output, label, x, **extra).prev_sample
        return x

    def noises(self, oracle, shape, count, dtype):
        """The pipeline's generator order under our addresses."""
        generator = torch.Generator().manual_seed(7)
        draws = oracle.Draws(shape[0], dtype)
        fresh = [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]
        first = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
        draws.normal = lambda name, *_: first if name == "rollout.start" else fresh[int(name.split(".")[1])]
        return draws, first

    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("factor", [1.0, 3.0])
    @pytest.mark.parametrize("kind", ["ode", "renoise"])
    def test_flow_match_euler_with_explicit_sigmas(self, oracle, steps, factor, kind):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=factor, stochastic_sampling=kind == "renoise")
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        draws, noise = self.noises(oracle, (3, 4), steps, torch.float32)
        path = FlowPath(factor)
        ours = sample(oracle.Network(path, wavy), Schedule(kind, path.grid(steps)), None, draws, (4,))
        assert torch.allclose(self.run(scheduler, noise, wavy, path), ours, atol=3e-6)

    @pytest.mark.parametrize("steps", STEPS)
    def test_flow_match_lcm(self, oracle, steps):
        scheduler = FlowMatchLCMScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        draws, noise = self.noises(oracle, (3, 4), steps, torch.float32)
        path = FlowPath(3.0)
        ours = sample(oracle.Network(path, wavy), Schedule("renoise", path.grid(steps)), None, draws, (4,))
        assert torch.allclose(self.run(scheduler, noise, wavy, path), ours, atol=3e-6)

    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("factor", [1.0, 3.0])
    def test_first_order_flow_dpm_solver_on_its_own_grid(self, oracle, steps, factor):
        scheduler = DPMSolverMultistepScheduler(
            solver_order=1, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=factor
        )
        scheduler.set_timesteps(steps)
        draws, noise = self.noises(oracle, (3, 4), steps, torch.float32)
        path = FlowPath(factor, integer_timesteps=True)
        ours = sample(oracle.Network(path, wavy), Schedule.uniform(steps, start=0.999), None, draws, (4,))
        assert torch.allclose(self.run(scheduler, noise, wavy, path), ours, atol=3e-6)

    @pytest.mark.parametrize("steps", [*STEPS, 50])
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    def test_ddim_trailing_is_euler_in_flow_variables(self, oracle, sd, steps, prediction):
        """x = (alpha + sigma) y makes DDIM and Euler one solver: below 1e-12 of the size of the states."""
        sd["prediction_type"] = prediction
        scheduler = DDIMScheduler(**sd, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
        path = VPPath.from_scheduler(sd)
        scheduler.alphas_cumprod = torch.tensor(path.alphas_cumprod, dtype=F64)
        scheduler.set_timesteps(steps)
        draws, noise = self.noises(oracle, (3, 4), 0, F64)
        ours = sample(oracle.Network(path, wavy), Schedule("ode", path.grid(steps)), None, draws, (4,))
        assert (self.run(scheduler, noise, wavy, path) - ours).abs().max() < 1e-12

    @pytest.mark.parametrize("steps", [*STEPS, 50])
    def test_ddim_with_the_analytic_network_of_a_gaussian(self, oracle, sd, steps):
        scheduler = DDIMScheduler(**sd, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
        path = VPPath.from_scheduler(sd)
        eps = gaussian_eps(oracle.Gaussian(), path)
        scheduler.alphas_cumprod = torch.tensor(path.alphas_cumprod, dtype=F64)
        scheduler.set_timesteps(steps)
        draws, noise = self.noises(oracle, (3, 4), 0, F64)
        ours = sample(oracle.Network(path, eps), Schedule("ode", path.grid(steps)), None, draws, (4,))
        assert (self.run(scheduler, noise, eps, path) - ours).abs().max() < 1e-12

    @pytest.mark.parametrize("steps", [1, 2, 4])
    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_lcm_with_as_many_original_steps_is_renoise_on_the_trailing_grid(self, oracle, sd, steps, prediction):
        sd["prediction_type"] = prediction
        scheduler = LCMScheduler(**sd, original_inference_steps=4, clip_sample=False, timestep_scaling=1e4)
        path = VPPath.from_scheduler(sd)
        scheduler.alphas_cumprod = torch.tensor(path.alphas_cumprod, dtype=F64)
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == [round(1000 * u) for u in path.grid(steps)]
        draws, noise = self.noises(oracle, (3, 4), steps, F64)
        ours = sample(oracle.Network(path, wavy), Schedule("renoise", path.grid(steps)), None, draws, (4,))
        assert (self.run(scheduler, noise, wavy, path) - ours).abs().max() < 1e-11

    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_scm_is_renoise_on_the_trigflow_clock(self, oracle, steps):
        scheduler = SCMScheduler(sigma_data=0.5)
        path = TrigFlowPath(0.5)
        u = path.grid(steps)
        angles = [level * np.pi / 2 for level in (*u, 0.0)]
        scheduler.set_timesteps(steps, timesteps=angles, max_timesteps=None, intermediate_timesteps=None)
        draws, noise = self.noises(oracle, (3, 4), steps, torch.float32)
        ours = sample(oracle.Network(path, wavy), Schedule("renoise", u), None, draws, (4,))
        x, generator = 0.5 * noise, torch.Generator().manual_seed(7)
        for angle in scheduler.timesteps[:-1]:
            output = 0.5 * wavy(x, angle, None)
            x = scheduler.step(output, angle, x, generator=generator).prev_sample
        assert torch.allclose(x / 0.5, ours, atol=3e-6)


class TestHeun:
    def solve(self, exact, x, steps):
        levels = torch.linspace(1, 0.1, steps + 1, dtype=F64).tolist()
        for t, t_next in pairwise(levels):
            x = heun_step(exact.velocity, x, t, t_next)
        return x

    def test_error_falls_with_the_square_of_the_step(self, oracle, normal):
        exact, x = oracle.Gaussian(), normal(3, 4)
        truth = exact.transport(x, 1.0, 0.1)
        coarse, fine = ((self.solve(exact, x, n) - truth).abs().max() for n in (16, 32))
        assert 3.5 < coarse / fine < 4.5

    def test_the_step_to_zero_is_euler_with_one_call(self, normal):
        calls = []
        x = normal(2, 3)
        out = heun_step(lambda y, t: calls.append(t) or 2 * y, x, 0.4, 0.0)
        assert calls == [0.4]
        assert torch.allclose(out, x - 0.4 * 2 * x, atol=1e-15)

    def test_rows_of_times_reach_the_network_as_rows(self, oracle, normal):
        exact, x = oracle.Gaussian(), normal(2, 3)
        rows = heun_step(exact.velocity, x, torch.full((2,), 0.8, dtype=F64), 0.5)
        assert torch.allclose(rows, heun_step(exact.velocity, x, 0.8, 0.5), atol=1e-15)

    def test_rows_may_end_at_times_of_their_own(self, oracle, normal):
        """Each as if alone; one that ends at 0 is an Euler step, and the network is never asked at 0."""
        exact, x, asked = oracle.Gaussian(), normal(3, 4), []

        def velocity(y, t):
            asked.append(t.min().item())
            return exact.velocity(y, t)

        t, t_next = torch.tensor([1.0, 0.8, 0.3], dtype=F64), torch.tensor([0.7, 0.5, 0.0], dtype=F64)
        rows = heun_step(velocity, x, t, t_next)
        alone = [heun_step(exact.velocity, x[i : i + 1], t[i].item(), t_next[i].item()) for i in range(3)]
        assert torch.allclose(rows, torch.cat(alone), atol=1e-15)
        assert min(asked) == 0.3


class TestSecondTimes:
    """What a two-time network is told in each step (`Schedule.told`), and what a rollout feeds."""

    @pytest.mark.parametrize(
        "target, last, expected",
        [
            ("next", 0.0, [0.75, 0.5, 0.25, 0.0]),
            ("next", 0.5, [0.75, 0.5, 0.25, 0.125]),
            ("zero", 0.5, [0.0] * 4),
            ("same", 0.5, [1.0, 0.75, 0.5, 0.25]),
        ],
    )
    def test_a_rollout_tells_the_second_time_of_every_step(self, target, last, expected):
        told = []

        class Listens:
            path = FlowPath()

            def x0(self, x, t, cond):
                told.append(cond["s"])
                return torch.zeros_like(x)

        schedule = Schedule("ode", FlowPath().grid(4), target=target, last=last)
        sample(Listens(), schedule, Cond(), Draw.for_images(0, range(2)), (3,))
        assert [s.tolist() for s in told] == [[pytest.approx(s)] * 2 for s in expected]

    def test_networks_with_one_time_are_told_none(self):
        assert Schedule.uniform(2).told(1.0, 0.5) is None

    @pytest.mark.parametrize("said", [{"target": "end"}, {"rescale": "norm"}, {"last": 1.5}])
    def test_other_words_are_refused(self, said):
        with pytest.raises(UserError, match="allowed are"):
            Schedule("ode", (1.0,), **said)
