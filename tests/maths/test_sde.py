"""The SDE family: identities, published coefficients, and exact marginals under the exact Gaussian denoiser."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from fewstep.errors import UserError
from fewstep.maths.sde import (
    SOLVERS,
    ddim_eta_step,
    er_sde_coefficients,
    er_sde_step,
    euler_maruyama_step,
    keeps_state,
    log_snr_step,
    sde_dpm_2_step,
    sde_solver,
)
from fewstep.maths.solvers import step

F64 = torch.float64
ETAS = [0.0, 0.3, 0.5, 1.0, 1.3]
LEVELS = [(0.9, 0.6), (0.6, 0.59), (0.3, 0.01), (1.0, 0.5), (0.4, 0.0), (1.0, 0.0)]


@pytest.fixture
def state(normal):
    return normal(2, 3), normal(2, 3), normal(2, 3)


@pytest.mark.parametrize(("s", "u"), LEVELS)
@pytest.mark.parametrize("solver", [er_sde_step, ddim_eta_step])
def test_without_noise_the_step_is_the_ode_step(state, s, u, solver):
    x, x0, noise = state
    assert torch.allclose(solver(x, x0, s, u, 0.0, noise), step("ode", x, x0, s, u), atol=1e-13)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("s", [1.0, 0.7, 0.01])
def test_a_step_to_zero_is_x0(state, s, eta):
    x, x0, noise = state
    assert torch.equal(er_sde_step(x, x0, s, 0.0, eta, noise), x0)
    assert torch.equal(sde_dpm_2_step(x, x0, s, 0.0, noise, x, 1.0, eta), x0)


@pytest.mark.parametrize("eta", ETAS[1:])
def test_from_pure_noise_the_state_is_forgotten(state, eta):
    x, x0, noise = state
    assert torch.allclose(er_sde_step(x, x0, 1.0, 0.4, eta, noise), 0.6 * x0 + 0.4 * noise, atol=1e-15)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(("s", "u"), LEVELS)
def test_marginals_of_the_true_x0_are_kept(s, u, eta):
    """With x_s = alpha_s x0 + sigma_s eps: mean alpha_u x0 and variance sigma_u^2, for every eta and width."""
    keep, clean, fresh = er_sde_coefficients(s, u, eta)
    assert (keep * (1 - s) + clean).item() == pytest.approx(1 - u, abs=1e-14)
    assert ((keep * s) ** 2 + fresh**2).item() == pytest.approx(u**2, abs=1e-14)


@pytest.mark.parametrize("eta", ETAS)
def test_ddim_form_is_the_exponential_form(state, eta):
    """alpha_u x0 + sqrt(sigma_u^2 - std^2) eps_hat + std z."""
    x, x0, noise = state
    s, u = 0.8, 0.5
    std = er_sde_coefficients(s, u, eta)[2]
    eps = (x - (1 - s) * x0) / s
    expected = (1 - u) * x0 + (u**2 - std**2).sqrt() * eps + std * noise
    assert torch.allclose(er_sde_step(x, x0, s, u, eta, noise), expected, atol=1e-14)


def test_the_two_etas_agree_at_zero_and_one_only(state):
    x, x0, noise = state
    for eta, equal in ((0.0, True), (1.0, True), (0.5, False)):
        gap = er_sde_step(x, x0, 0.8, 0.5, eta, noise) - ddim_eta_step(x, x0, 0.8, 0.5, eta, noise)
        assert (gap.abs().max() < 1e-14) == equal


def test_the_two_etas_differ_in_variance_at_second_order():
    """(1 - e^{-2 eta^2 h}) - eta^2 (1 - e^{-2h}) is 2 eta^2 (1 - eta^2) h^2 to leading order."""
    eta, u = 0.5, 0.5
    ratios = []
    for width in (2e-3, 1e-3):
        h = log_snr_step(u + width, u).item()
        er = (er_sde_coefficients(u + width, u, eta)[2].item() / u) ** 2
        ratios.append((er - eta**2 * -math.expm1(-2 * h)) / h**2)
    assert ratios[1] == pytest.approx(2 * eta**2 * (1 - eta**2), rel=0.01)


def test_variance_preserving_eta_one_is_ddpm_ancestral():
    """std = (sigma_u / sigma_s) sqrt(1 - alpha_s^2 / alpha_u^2) in native variables."""
    s, u = 0.8, 0.5
    unit = [(t**2 + (1 - t) ** 2) ** 0.5 for t in (s, u)]
    a_s, s_s, a_u, s_u = (1 - s) / unit[0], s / unit[0], (1 - u) / unit[1], u / unit[1]
    native_std = er_sde_coefficients(s, u, 1.0)[2].item() / unit[1]
    assert native_std == pytest.approx(s_u / s_s * math.sqrt(1 - a_s**2 / a_u**2), abs=1e-14)


@pytest.mark.parametrize(("eta", "expected"), [(0.0, 1.1862831858), (0.5, 1.0983388061), (1.0, 0.7464677060)])
def test_a_single_step_has_its_known_value(eta, expected):
    x, x0, z = (torch.tensor([v], dtype=F64) for v in (1.4, 0.7588495575, 0.5))
    assert er_sde_step(x, x0, 0.9, 0.6, eta, z).item() == pytest.approx(expected, abs=1e-10)


def test_tiny_steps_lose_no_digits():
    """h = (s - u) / (s (1 - s)) up to its own second order; the log of a rounded ratio is off by 1e-4 here."""
    s, u = 0.37, 0.37 - 1e-12
    h = (s - u) / (0.37 * 0.63)
    assert log_snr_step(s, u).item() == pytest.approx(h, rel=1e-11, abs=0)
    assert er_sde_coefficients(s, u, 1.0)[2].item() == pytest.approx(u * math.sqrt(2 * h), rel=1e-9, abs=0)


@pytest.mark.parametrize("shape", [1.0, 3.0])
@pytest.mark.parametrize("order", [1, 2])
def test_eta_one_is_diffusers_sde_dpm_solver(state, order, shape):
    """Coefficients of `sde-dpmsolver++` read off its own update functions, orders 1 and 2 (midpoint)."""
    x, x0, noise = state
    before = x.flip(0)
    solver = DPMSolverMultistepScheduler(
        solver_order=order, algorithm_type="sde-dpmsolver++", use_flow_sigmas=True, prediction_type="flow_prediction",
        flow_shift=shape,
    )  # fmt: skip
    solver.set_timesteps(6)
    solver.sigmas = solver.sigmas.double()
    solver._step_index = 2
    r, s, u = solver.sigmas[1].item(), solver.sigmas[2].item(), solver.sigmas[3].item()
    if order == 1:
        theirs = solver.dpm_solver_first_order_update(x0, sample=x, noise=noise)
        ours = er_sde_step(x, x0, s, u, 1.0, noise)
    else:
        theirs = solver.multistep_dpm_solver_second_order_update([before, x0], sample=x, noise=noise)
        ours = sde_dpm_2_step(x, x0, s, u, noise, before, r)
    assert torch.allclose(theirs, ours, atol=1e-13)


def affine(solver, exact, s, u, eta, *more):
    """(slope, offset, noise gain) of one step with the exact denoiser, which is affine in x for Gaussian data."""
    x = torch.tensor([[0.0], [1.0], [0.0]], dtype=F64)
    z = torch.tensor([[0.0], [0.0], [1.0]], dtype=F64)
    at0, at1, noisy = solver(x, exact.x0(x, s), s, u, eta, z, *more).flatten().tolist()
    return at1 - at0, at0, noisy - at0


def propagate(solver, exact, levels, eta, mean, variance):
    """Mean and variance after the steps, exactly."""
    for s, u in pairwise(levels):
        slope, offset, gain = affine(solver, exact, s, u, eta)
        mean, variance = slope * mean + offset, slope**2 * variance + gain**2
    return mean, variance


def marginal(exact, t):
    return (1 - t) * exact.mean, exact.variance(t)


def line(top, bottom, steps):
    return torch.linspace(top, bottom, steps + 1, dtype=F64).tolist()


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(("s", "u"), LEVELS)
def test_gaussian_marginals_are_exact_once_the_posterior_variance_is_added(oracle, s, u, eta):
    """With x0 drawn from p(x0 | x_s) a step of any width keeps the marginals; the denoiser's mean alone omits
    clean^2 Var[x0 | x_s], the O(step^2) per step that vanishes with many steps."""
    exact = oracle.Gaussian()
    slope, offset, gain = affine(er_sde_step, exact, s, u, eta)
    posterior = exact.std**2 * s**2 / exact.variance(s)
    missing = er_sde_coefficients(s, u, eta)[1].item() ** 2 * posterior
    assert slope * (1 - s) * exact.mean + offset == pytest.approx((1 - u) * exact.mean, abs=1e-10)
    assert slope**2 * exact.variance(s) + gain**2 + missing == pytest.approx(exact.variance(u), abs=1e-10)


@pytest.mark.parametrize(
    ("eta", "substeps", "slope"),
    [
        (0.0, 1, 0.579777),
        (0.0, 3, 0.635526),
        (0.5, 1, 0.298146),
        (0.5, 3, 0.323856),
        (1.0, 1, 0.044248),
        (1.0, 3, 0.044248),
    ],
)
def test_mean_end_point_of_nine_intervals_solved_in_substeps(oracle, eta, substeps, slope):
    """The slope in x of E[x0 | x_.9] under the discrete solver; at eta = 1 the posterior mean's, whatever the step."""
    exact, product = oracle.Gaussian(), 1.0
    levels = line(0.9, 0.0, 9 * substeps)
    for s, u in pairwise(levels):
        product *= affine(er_sde_step, exact, s, u, eta)[0]
    assert product == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("eta", "mean", "std"),
    [(0.0, 1.251050, 0.0), (0.5, 0.896939, 0.436157), (1.0, 0.552212, 0.514412), (1.3, 0.501053, 0.516085)],
)
def test_many_steps_reach_the_exact_transition(oracle, eta, mean, std):
    """N(alpha_u m + r sqrt(V_u/V_t) (x - alpha_t m), V_u (1 - r^2)), r = [(alpha_t/alpha_u) sqrt(V_u/V_t)]^(eta^2)."""
    exact = oracle.Gaussian()
    t, u, x = 0.9, 0.3, 1.4
    r = ((1 - t) / (1 - u) * (exact.variance(u) / exact.variance(t)) ** 0.5) ** (eta**2)
    assert std == pytest.approx((exact.variance(u) * (1 - r**2)) ** 0.5, abs=1e-6)
    for solver, tolerance in ((er_sde_step, 5e-3), (euler_maruyama_step, 2e-2)):
        got = propagate(solver, exact, line(t, u, 200), eta, x, 0.0)
        assert got[0] == pytest.approx(mean, abs=tolerance)
        assert got[1] ** 0.5 == pytest.approx(std, abs=tolerance)


def test_euler_maruyama_is_biased_at_first_order(oracle):
    exact = oracle.Gaussian()
    truth = marginal(exact, 0.3)
    errors = []
    for steps in (50, 100):
        got = propagate(euler_maruyama_step, exact, line(0.9, 0.3, steps), 1.0, *marginal(exact, 0.9))
        errors.append(abs(got[1] - truth[1]))
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)


def test_second_order_beats_first_order_on_the_ode(oracle, normal):
    """With eta = 0 the multistep solver converges at order 2 to the exact transport."""
    exact, x = oracle.Gaussian(), normal(1, 5)
    truth = exact.transport(x, 0.9, 0.2)

    def solve(steps):
        levels, y = line(0.9, 0.2, steps), x
        before = None
        for i, (s, u) in enumerate(pairwise(levels)):
            x0 = exact.x0(y, s)
            zero = torch.zeros_like(y)
            y = er_sde_step(y, x0, s, u, 0.0, zero) if before is None else sde_dpm_2_step(
                y, x0, s, u, zero, before, levels[i - 1], 0.0
            )  # fmt: skip
            before = x0
        return (y - truth).abs().max().item()

    assert solve(80) / solve(160) > 3.5


def test_levels_and_strengths_may_differ_by_row(state):
    x, x0, noise = state
    s, u, eta = (torch.tensor(v, dtype=F64) for v in ([0.9, 0.5], [0.4, 0.0], [0.0, 1.0]))
    both = er_sde_step(x, x0, s, u, eta, noise)
    assert torch.allclose(both[:1], er_sde_step(x[:1], x0[:1], 0.9, 0.4, 0.0, noise[:1]), atol=1e-15)
    assert torch.equal(both[1:], x0[1:])


# solvers by name


def test_solvers_by_name_are_the_steps_themselves(state):
    x, x0, noise = state
    for name, function in (
        ("er_sde", er_sde_step),
        ("ddim_eta", ddim_eta_step),
        ("euler_maruyama", euler_maruyama_step),
    ):
        assert torch.equal(sde_solver(name)(x, x0, 0.8, 0.5, 0.7, noise), function(x, x0, 0.8, 0.5, 0.7, noise))
    with pytest.raises(UserError, match="unknown solver 'er_sd': did you mean 'er_sde'"):
        sde_solver("er_sd")


def test_the_multistep_solver_looks_back_at_its_own_walk_alone(state):
    """First step of first order; the second one uses x0 and level of the first; a new walk has forgotten both."""
    x, x0, noise = state
    solve = sde_solver("sde_dpm_2")
    first = solve(x, x0, 0.9, 0.6, 1.0, noise)
    assert torch.equal(first, er_sde_step(x, x0, 0.9, 0.6, 1.0, noise))
    assert torch.equal(solve(first, x, 0.6, 0.4, 0.5, noise), sde_dpm_2_step(first, x, 0.6, 0.4, noise, x0, 0.9, 0.5))
    fresh = sde_solver("sde_dpm_2")(first, x, 0.6, 0.4, 0.5, noise)
    assert torch.equal(fresh, er_sde_step(first, x, 0.6, 0.4, 0.5, noise))


@pytest.mark.parametrize("name", SOLVERS)
def test_without_noise_every_solver_starts_from_pure_noise(state, name):
    """At s = 1, eta = 0 each is the ode step, although alpha_s = 0 makes its noise terms infinite."""
    x, x0, noise = state
    assert torch.allclose(sde_solver(name)(x, x0, 1.0, 0.6, 0.0, noise), step("ode", x, x0, 1.0, 0.6), atol=1e-13)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("s", [0.3, 1e-3])
def test_a_step_of_no_length_changes_nothing(state, name, s):
    """Rows at the lowest entry of a DDPM table walk from it to itself, in several parts."""
    x, x0, noise = state
    solve = sde_solver(name)
    once = solve(x, x0, s, s, 1.0, noise)
    torch.testing.assert_close(once, x)
    torch.testing.assert_close(solve(once, x0 + 1, s, s, 1.0, noise), x)


@pytest.mark.parametrize(
    ("name", "eta", "kept"),
    [
        ("er_sde", 0.0, True),
        ("er_sde", 0.01, False),
        ("sde_dpm_2", 0.01, False),
        ("euler_maruyama", 0.01, False),
        ("euler_maruyama", 0.0, True),
        ("ddim_eta", 0.99, True),
        ("ddim_eta", 1.0, False),
    ],
)
def test_what_a_step_from_pure_noise_keeps_of_the_state(name, eta, kept):
    """x_u = alpha_u x0 + sigma_u z from s = 1 as soon as eta > 0; linear eta keeps sigma_u sqrt(1 - eta^2) of it."""
    assert keeps_state(name, 1.0, 0.98, eta) == kept
    assert keeps_state(name, 0.98, 0.97, eta)
