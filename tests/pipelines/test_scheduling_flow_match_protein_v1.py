"""Samplers of protein flow models, against the recursions that define them and against closed forms of Gaussians."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fewstep_pipelines import FlowMatchProteinScheduler, FlowMatchProteinSDEScheduler
from fewstep_pipelines import scheduling_flow_match_protein_v1 as scheduling

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.maths.log_path import LogFlowPath
from fewstep.maths.solvers import Schedule, sample

from .proteins import TABLE

BOTH = (FlowMatchProteinScheduler, FlowMatchProteinSDEScheduler)


@pytest.mark.parametrize("steps", TABLE)
def test_the_grid_is_the_published_one(steps):
    """t_i = 10^(-k_i / 200), k_i = round(linspace(30, 400, N)), to four digits."""
    scheduler = FlowMatchProteinScheduler()
    scheduler.set_timesteps(steps)
    assert [round(t, 4) for t in scheduler.timesteps.tolist()] == [float(t) for t in TABLE[steps].split()]


@pytest.mark.parametrize("first", (30, 40, 0))
@pytest.mark.parametrize("steps", (1, 2, 16, 20, 200))
def test_the_grid_is_that_of_the_path_that_students_train_on(steps, first):
    path = LogFlowPath(t_max=10 ** (-first / 200))
    scheduler = FlowMatchProteinScheduler(first=path.first)
    scheduler.set_timesteps(steps)
    expected = torch.tensor([path.time(u) for u in path.grid(steps)])
    assert torch.allclose(scheduler.timesteps, expected, rtol=1e-6, atol=0)
    assert abs(scheduler.timesteps[0].item() - 10 ** (-first / 200)) < 1e-7


def test_one_step_is_at_the_first_level_and_40_is_that_of_released_one_step_generators():
    scheduler = FlowMatchProteinScheduler(first=40)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == pytest.approx([0.63], abs=1e-3)


def test_the_teachers_levels_are_logarithmic_and_stretched_from_1_to_0():
    """tau_k = 1 - 10^(-2 k / N), moved and scaled so that tau_0 = 0 and tau_N = 1."""
    scheduler = FlowMatchProteinSDEScheduler()
    scheduler.set_timesteps(400)
    tau = 1 - 10 ** (-2 * torch.arange(401, dtype=torch.float64) / 400)
    tau = (tau - tau[0]) / (tau[-1] - tau[0])
    assert torch.allclose(scheduler.sigmas.double(), 1 - tau, atol=1e-7)
    assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1])


class Chain:
    """A denoiser that knows its data: the mean of N(0, std^2) given x, in float64."""

    path = LogFlowPath()

    def __init__(self, std):
        self.std = std

    def x0(self, x, t, cond):
        t = t.reshape(-1, 1, 1).to(x)
        return (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2) * x

    def velocity(self, x, t, cond):
        return (x - self.x0(x, t, cond)) / t.reshape(-1, 1, 1).to(x)


class Wide(Draw):
    """The same numbers in float64."""

    def normal(self, name, *shape, per="row"):
        return super().normal(name, *shape, per=per).double()


def _run(scheduler, steps, denoiser, draw, shape):
    """A pipeline's loop."""
    scheduler.set_timesteps(steps)
    noise = iter(["rollout.start", *(f"rollout.{i}" for i in range(steps))])
    scheduler.draw = lambda like, *_: draw.normal(next(noise), *shape)
    x = scheduler.draw(None) * scheduler.init_noise_sigma
    for t, level in zip(scheduler.timesteps, scheduler._levels):
        at = torch.full((len(x),), level, dtype=torch.float64)
        x = scheduler.step(-denoiser.velocity(x, at, None), t, x).prev_sample
    return x


@pytest.mark.parametrize("noise_scale", (1.0, 0.45))
@pytest.mark.parametrize("steps", (1, 2, 16))
def test_the_few_step_sampler_is_the_rollout_of_training(steps, noise_scale):
    """x_1 = gamma t_1 n, x_{i+1} = (1 - t') x0 + gamma t' n, the network told t itself."""
    path, denoiser = LogFlowPath(t_max=10**-0.15, zero_signal=True), Chain(0.5)
    u = path.grid(steps)
    schedule = Schedule("renoise", u, noise_scale=noise_scale)
    denoiser.path = path
    ours = _run(FlowMatchProteinScheduler(noise_scale=noise_scale), steps, denoiser, Wide(0, 0, range(3)), (7, 3))
    draw = Wide(0, 0, range(3))
    x = noise_scale * path.time(u[0]) * draw.normal("rollout.start", 7, 3)
    for i, level in enumerate(u):
        x = denoiser.x0(x, torch.full((3,), path.time(level), dtype=torch.float64), None)
        if i + 1 < steps:
            t = path.time(u[i + 1])
            x = (1 - t) * x + noise_scale * t * draw.normal(f"rollout.{i}", 7, 3)
    assert torch.allclose(ours, x, rtol=0, atol=1e-9)
    theirs = sample(denoiser, schedule, Cond(), Wide(0, 0, range(3)), (7, 3))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("renewal", (None, 0.5))
@pytest.mark.parametrize("noise_scale", (1.0, 0.45))
def test_the_teachers_sampler_is_the_rollout_of_training(noise_scale, renewal):
    config = {"noise_scale": noise_scale, "renewal": renewal}
    scheduler, denoiser = FlowMatchProteinSDEScheduler(**config), Chain(0.5)
    ours = _run(scheduler, 50, denoiser, Wide(0, 0, range(3)), (7, 3))
    u = tuple(denoiser.path.clock(t) for t in scheduler._levels[:-1])
    theirs = sample(denoiser, Schedule("sde", u, **config), Cond(), Wide(0, 0, range(3)), (7, 3))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


def _share(scheduler, level, following, std):
    """What a step multiplies x by where data is N(0, std^2), and its noise's standard deviation."""
    scheduler.set_timesteps(sigmas=[level] if following == 0 else [level, following])
    zero, one = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    velocity = Chain(std).velocity(one, torch.tensor([level]), None)
    scheduler.draw = lambda *_: zero
    kept = scheduler.step(-velocity, level, one).prev_sample.item()
    scheduler._step_index, scheduler.draw = 0, lambda *_: one
    return kept, scheduler.step(zero, level, zero).prev_sample.item()


def _spread(steps, std, **config):
    """Standard deviation of the sampler's output for data N(0, std^2), as a share of std: variances followed exactly."""
    scheduler = FlowMatchProteinSDEScheduler(**config)
    scheduler.set_timesteps(steps)
    levels, variance = list(scheduler._levels), 1.0
    for level, following in pairwise(levels):
        kept, fresh = _share(scheduler, level, following, std)
        variance = kept**2 * variance + fresh**2
    return math.sqrt(variance) / std


def test_an_euler_maruyama_step_is_the_equation_of_the_paper():
    """dx = [u + g score] dtau + sqrt(2 g gamma) dW, g = 1 / (tau + .01), score = (tau u - x) / (1 - tau)."""
    scheduler = FlowMatchProteinSDEScheduler(noise_scale=0.45)
    scheduler.set_timesteps(sigmas=[0.7, 0.6])
    x, u, noise = torch.randn(3, 2, 5, 3, dtype=torch.float64)
    scheduler.draw = lambda *_: noise
    g, score = 1 / (0.3 + 0.01), (0.3 * u - x) / 0.7
    expected = x + 0.1 * (u + g * score) + math.sqrt(2 * g * 0.45 * 0.1) * noise
    assert torch.allclose(scheduler.step(u, 0.7, x).prev_sample, expected, rtol=0, atol=1e-12)


def test_beyond_tau_of_99_the_teacher_follows_the_velocity_alone():
    scheduler = FlowMatchProteinSDEScheduler(noise_scale=1.0)
    scheduler.set_timesteps(sigmas=[0.0099, 0.004])
    x, u = torch.randn(2, 1, 5, 3, dtype=torch.float64)
    moved = scheduler.step(u, 0.0099, x).prev_sample
    assert torch.allclose(moved, x + 0.0059 * u, rtol=0, atol=1e-12)
    assert torch.allclose(scheduler.step(u, 0.004, moved).prev_sample, moved + 0.004 * u, rtol=0, atol=1e-12)


def test_at_400_steps_a_gaussian_comes_out_with_its_own_spread_and_cold_with_the_root_of_the_noise_scale():
    """Data N(0, s^2): std s at gamma = 1, and sqrt(gamma) s else, to 1 %, for s much above .01."""
    for std in (0.1, 0.5, 1.0):
        assert _spread(400, std, noise_scale=1.0) == pytest.approx(1, abs=0.02)
        assert _spread(400, std, noise_scale=0.45) == pytest.approx(math.sqrt(0.45), abs=0.02)


def test_in_100_steps_stiff_directions_blow_up_and_in_400_they_do_not():
    """Where data has no freedom (std .003 nm) a step multiplies by about 1 - g dt / t^2 near t = .01."""
    assert _spread(100, 0.003, noise_scale=1.0) > 1e6
    assert 1 < _spread(400, 0.003, noise_scale=1.0) < 10


@pytest.mark.parametrize(("steps", "stable"), ((100, False), (400, False), (461, False), (462, True), (1000, True)))
def test_steps_stop_amplifying_at_462(steps, stable):
    """|1 - dt / t - g dt / t^2| <= 1 at all levels t >= .01, with dt = (t + .0101) (1 - 10^(-2 / N))."""
    scheduler = FlowMatchProteinSDEScheduler()
    scheduler.set_timesteps(steps)
    pairs = list(pairwise(scheduler._levels))
    ratio = 1 - 10 ** (-2 / steps)
    assert all(t - after == pytest.approx((t + 0.01 / 0.99) * ratio, rel=1e-6) for t, after in pairs)
    factors = [_share(scheduler, t, after, 1e-9)[0] for t, after in pairs]
    assert (max(map(abs, factors)) <= 1) == stable
    grown = math.prod(max(abs(f), 1) for f in factors)
    assert {100: 1e8, 400: 2}.get(steps, grown) == pytest.approx(grown, rel=0.1)


@pytest.mark.parametrize("steps", (50, 100, 400))
def test_with_renewal_spreads_are_right_at_any_number_of_steps(steps):
    for std in (0.003, 0.01, 0.03, 0.1, 0.5, 1.0):
        assert _spread(steps, std, noise_scale=1.0, renewal=0.5) == pytest.approx(1, abs=0.15)
        assert _spread(steps, std, noise_scale=0.45, renewal=0.5) == pytest.approx(math.sqrt(0.45), abs=0.1)


def test_without_renewal_of_noise_the_teacher_is_the_ode():
    scheduler = FlowMatchProteinSDEScheduler(renewal=0.0)
    scheduler.set_timesteps(20)
    x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser, ours = Chain(0.5), x
    for level in scheduler._levels[:-1]:
        at = torch.tensor([level])
        ours = scheduler.step(-denoiser.velocity(ours, at, None), level, ours).prev_sample
    theirs = x
    for t, after in pairwise(scheduler._levels):
        theirs = theirs + (after - t) * denoiser.velocity(theirs, torch.tensor([t]), None)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_the_noise_scale_is_a_standard_deviation_in_few_steps_and_a_variance_in_the_teacher():
    few, many = FlowMatchProteinScheduler(noise_scale=0.25), FlowMatchProteinSDEScheduler(noise_scale=0.25)
    for scheduler, factor in ((few, 0.25), (many, 0.5)):
        cold = _share(scheduler, 0.5, 0.4, 1.0)[1]
        scheduler.set_noise_scale(1.0)
        assert cold == pytest.approx(factor * _share(scheduler, 0.5, 0.4, 1.0)[1])
    few.set_noise_scale(None)
    few.set_timesteps(16)
    assert few.init_noise_sigma == pytest.approx(0.25 * 10**-0.15)  # of the first state too
    assert many.init_noise_sigma == 1
    assert few.timesteps[0].item() == pytest.approx(10**-0.15)  # and labels are those of all the noise


@pytest.mark.parametrize("kind", BOTH)
def test_the_last_step_lands_on_the_clean_chain(kind):
    scheduler = kind()
    scheduler.set_timesteps(3)
    x, u = torch.randn(2, 2, 5, 3)
    for t in scheduler.timesteps:
        found = scheduler.step(u, t, x)
    assert torch.allclose(found.pred_original_sample, x + t * u, atol=1e-6)
    assert torch.equal(found.prev_sample, found.pred_original_sample)


@pytest.mark.parametrize("kind", BOTH)
def test_levels_are_visited_in_order_and_once(kind):
    scheduler, x = kind(), torch.zeros(1, 2, 3)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="step 0 is at t"):
        scheduler.step(x, scheduler.timesteps[1], x)
    assert scheduler.step_index == 0
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    assert scheduler.step_index == 2
    with pytest.raises(ValueError, match="all 2 steps are done"):
        scheduler.step(x, scheduler.timesteps[1], x)


@pytest.mark.parametrize("kind", BOTH)
def test_bad_numbers_of_steps_levels_and_scales_are_refused(kind):
    scheduler = kind()
    for steps in (0, -1, 2.5):
        with pytest.raises(ValueError, match="whole number from 1"):
            scheduler.set_timesteps(steps)
    for levels in ([], [0.5, 0.5], [0.1, 0.5], [1.1, 0.5], [0.5, 0.0]):
        with pytest.raises(ValueError, match="must decrease"):
            scheduler.set_timesteps(sigmas=levels)
    with pytest.raises(ValueError, match="either num_inference_steps or sigmas"):
        scheduler.set_timesteps(2, sigmas=[0.5])
    for scale in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="noise_scale"):
            scheduler.set_noise_scale(scale)


def test_more_steps_than_the_grid_has_levels_and_a_share_beyond_1_are_refused():
    scheduler = FlowMatchProteinScheduler()
    scheduler.set_timesteps(371)
    with pytest.raises(ValueError, match="the grid has 371 levels"):
        scheduler.set_timesteps(372)
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        FlowMatchProteinSDEScheduler(renewal=1.5)


@pytest.mark.parametrize("kind", BOTH)
def test_states_keep_their_dtype_and_are_stepped_in_float32_at_least(kind):
    for dtype in (torch.bfloat16, torch.float64):
        scheduler = kind(noise_scale=0.0)
        scheduler.set_timesteps(3)
        x, u = torch.randn(2, 2, 5, 3).to(dtype)
        found = scheduler.step(u, scheduler.timesteps[0], x)
        assert found.prev_sample.dtype == found.pred_original_sample.dtype == dtype
        wide = kind(noise_scale=0.0)
        wide.set_timesteps(3)
        exact = wide.step(u.double(), wide.timesteps[0], x.double()).prev_sample
        assert torch.equal(found.prev_sample, exact.float().to(dtype) if dtype == torch.bfloat16 else exact)


@pytest.mark.parametrize("kind", BOTH)
def test_what_is_saved_is_loaded_with_its_code_beside_it(kind, tmp_path):
    scheduler = kind(noise_scale=0.7)
    scheduler.save_pretrained(tmp_path)
    assert (tmp_path / "scheduling_flow_match_protein_v1.py").read_text() == Path(scheduling.__file__).read_text()
    again = kind.from_pretrained(tmp_path)
    assert _settings(again) == _settings(scheduler)
    assert again._noise_scale == 0.7


def _settings(scheduler):
    return {name: value for name, value in scheduler.config.items() if name[0] != "_"}


def test_schedulers_are_made_from_one_anothers_config():
    few = FlowMatchProteinScheduler.from_config(FlowMatchProteinSDEScheduler(noise_scale=0.3).config, noise_scale=0.6)
    assert (few._noise_scale, few.config.first) == (0.6, 30)
    many = FlowMatchProteinSDEScheduler.from_config(few.config, renewal=0.5)
    assert (many._noise_scale, many.config.renewal, many.config.decades) == (0.6, 0.5, 2.0)


def test_a_list_of_generators_draws_for_each_chains_own_residues():
    scheduler = FlowMatchProteinScheduler()
    mask = torch.arange(9)[None] < torch.tensor([[5], [9]])

    def drawn(rows, width):
        generators = [torch.Generator().manual_seed(i) for i in range(2)][rows]
        return scheduler.draw(torch.zeros(len(mask[rows]), width, 3), generators, mask[rows, :width])

    both = drawn(slice(0, 2), 9)
    assert torch.equal(drawn(slice(0, 1), 5), both[:1, :5])
    assert both[0, 5:].abs().max() == 0 and both[0, :5].abs().min() > 0 and both[1].abs().min() > 0
    with pytest.raises(ValueError, match="1 generators do not fit 2 chains"):
        scheduler.draw(torch.zeros(2, 9, 3), [torch.Generator()])


def test_noise_is_added_by_the_level_of_each_row():
    x, noise = torch.randn(2, 3, 4, 3)
    t = torch.tensor([0.0, 0.25, 1.0])
    found = FlowMatchProteinScheduler().add_noise(x, noise, t)
    assert torch.equal(found[0], x[0]) and torch.equal(found[2], noise[2])
    assert torch.allclose(found[1], 0.75 * x[1] + 0.25 * noise[1])
