"""Stochastic steps with a noise strength eta, from flow time s to u < s.

The reverse SDEs dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dW have the path's own marginals for every eta;
eta = 0 is the probability-flow ODE, eta = 1 the reverse diffusion. x and x0 are flow states; alpha = 1 - t, sigma = t,
lambda = log(alpha / sigma), h = lambda_u - lambda_s > 0. VP networks need no other formula: their common factor
alpha + sigma cancels. s, u, eta are numbers or [rows]; noise is standard normal like x. Coefficients are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .paths import expand

Level = Tensor | float
SdeStep = Callable[[Tensor, Tensor, Level, Level, Level, Tensor], Tensor]


def sde_solver(name: str) -> SdeStep:
    """A solver for one walk, `step(x, x0, s, u, eta, noise)`; `SOLVERS` has the names, another raises UserError.

    One that looks back remembers its last step, so every walk asks for a solver of its own.
    """
    if name not in SOLVERS:
        raise UserError(f"unknown solver '{name}': {nearest(name, SOLVERS)}")
    return SOLVERS[name]()


def keeps_state(name: str, s: Level, u: Level, eta: Level) -> bool:
    """Whether the first step of a walk depends on x: its factor of x is finite and not 0.

    With alpha_s = 0 and noise it does not: `er_sde` then gives alpha_u x0 + sigma_u noise, whatever x was.
    """
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    keep = sde_solver(name)(one, zero, s, u, eta, zero).item()
    return math.isfinite(keep) and keep != 0


def er_sde_step(x: Tensor, x0: Tensor, s: Level, u: Level, eta: Level, noise: Tensor) -> Tensor:
    """Exact exponential step of first order:

    (sigma_u / sigma_s) e^{-eta^2 h} x + alpha_u (1 - e^{-(1 + eta^2) h}) x0 + sigma_u sqrt(1 - e^{-2 eta^2 h}) noise.

    eta = 0 is the ode step, eta = 1 SDE-DPM-Solver++(1) (Lu et al., arXiv 2211.01095). At u = 0 it is x0.
    From s = 1 with eta > 0 the step forgets x, since alpha_s = 0.
    """
    keep, clean, fresh = er_sde_coefficients(s, u, eta)
    return expand(keep, x) * x + expand(clean, x) * x0 + expand(fresh, x) * noise


def er_sde_coefficients(s: Level, u: Level, eta: Level) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of x, x0 and noise in `er_sde_step`, float64."""
    s, u = _wide(s), _wide(u)
    h = log_snr_step(s, u)
    strength = _wide(eta).to(h.device) ** 2
    keep = u / s * torch.exp(_times(-strength, h))
    clean = (1 - u) * -torch.expm1(_times(-1 - strength, h))
    return keep, clean, u * torch.sqrt(-torch.expm1(_times(-2 * strength, h)))


def ddim_eta_step(x: Tensor, x0: Tensor, s: Level, u: Level, eta: Level, noise: Tensor) -> Tensor:
    """DDIM with its own eta in [0, 1] (Song et al., arXiv 2010.02502, eq. 12 and 16):

    alpha_u x0 + sqrt(sigma_u^2 - std^2) eps + std noise, with std = eta sigma_u sqrt(1 - e^{-2h}) and
    eps = (x - alpha_s x0) / sigma_s.

    Equals `er_sde_step` at eta 0 and 1 only; in between the variances differ at second order in h.
    """
    s, u = _wide(s), _wide(u)
    std = _wide(eta) * u * torch.sqrt(-torch.expm1(-2 * log_snr_step(s, u)))
    keep = torch.sqrt(u**2 - std**2) / s
    return expand(keep, x) * x + expand(1 - u - keep * (1 - s), x) * x0 + expand(std, x) * noise


def euler_maruyama_step(x: Tensor, x0: Tensor, s: Level, u: Level, eta: Level, noise: Tensor) -> Tensor:
    """x + (u - s) (v + eta^2 eps / (1 - s)) + eta sqrt(2 s (s - u) / (1 - s)) noise.

    The plain discretisation with f = -1 / (1 - t), g^2 = 2 t / (1 - t), v = (x - x0) / s, eps = (x - (1 - s) x0) / s.
    Its marginals are off by O(s - u); infinite at s = 1 unless eta = 0.
    """
    s, u = _wide(s), _wide(u)
    eta = _wide(eta).to(s.device)
    width = (u - s) / s
    std = _times(eta, torch.sqrt(2 * s * (s - u) / (1 - s)))
    keep, clean = 1 + width * (1 + _times(eta**2, 1 / (1 - s))), -width * (1 + eta**2)
    return expand(keep, x) * x + expand(clean, x) * x0 + expand(std, x) * noise


def sde_dpm_2_step(
    x: Tensor, x0: Tensor, s: Level, u: Level, noise: Tensor, x0_before: Tensor, s_before: Level, eta: Level = 1.0
) -> Tensor:
    """Second-order multistep SDE-DPM-Solver++ (arXiv 2211.01095, midpoint form): `er_sde_step` plus

    alpha_u (1 - e^{-(1 + eta^2) h}) / 2 * (h / h_before) (x0 - x0_before), with x0_before predicted at s_before > s.

    The step to u = 0 has infinite h and stays of first order, i.e. it is x0; a step of no length leaves x alone.
    """
    keep, clean, fresh = er_sde_coefficients(s, u, eta)
    h, h_before = log_snr_step(s, u), log_snr_step(s_before, s)
    first_order = torch.isinf(h) | (h == 0)
    extra = torch.where(first_order, torch.zeros_like(h), clean * h / h_before / 2)
    first = expand(keep, x) * x + expand(clean, x) * x0 + expand(fresh, x) * noise
    return first + expand(extra, x) * (x0 - x0_before)


class MultistepSde:
    """`er_sde_step` at first, then `sde_dpm_2_step` with what the step before it predicted."""

    def __init__(self) -> None:
        self._before: tuple[Tensor, Level] | None = None

    def __call__(self, x: Tensor, x0: Tensor, s: Level, u: Level, eta: Level, noise: Tensor) -> Tensor:
        """One step, which the next one looks back at."""
        before, self._before = self._before, (x0, s)
        if before is None:
            return er_sde_step(x, x0, s, u, eta, noise)
        return sde_dpm_2_step(x, x0, s, u, noise, *before, eta)


SOLVERS: Mapping[str, Callable[[], SdeStep]] = {
    "er_sde": lambda: er_sde_step,
    "ddim_eta": lambda: ddim_eta_step,
    "euler_maruyama": lambda: euler_maruyama_step,
    "sde_dpm_2": MultistepSde,
}


def log_snr_step(s: Level, u: Level) -> Tensor:
    """h = lambda_u - lambda_s = log(alpha_u sigma_s / (alpha_s sigma_u)), float64, accurate for tiny steps.

    Infinite for u = 0 and for s = 1.
    """
    s, u = _wide(s), _wide(u)
    return -torch.log1p((u - s) / ((1 - u) * s))


def _times(strength: Tensor, h: Tensor) -> Tensor:
    """strength * h, with 0 * inf = 0: without noise a step from s = 1 or to u = 0 stays finite."""
    return torch.where(strength == 0, torch.zeros_like(h), strength * h)


def _wide(value: Level) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


ODE_BELOW = 0.01  # t under which a Langevin sampler only follows the velocity


def langevin_step(
    x: Tensor,
    x0: Tensor,
    t: Tensor | float,
    t_next: Tensor | float,
    noise: Tensor,
    variance: float = 1.0,
    renewal: float | None = None,
) -> Tensor:
    """A step of dx = [-v + g score] dt' + sqrt(2 g gamma) dW with t' = 1 - t and g = 1 / (1.01 - t) (arXiv 2503.00710).

    v = (x - x0) / t, score = -(x + (1 - t) v) / t. variance is gamma: at 1 the marginals are those of the flow, below it
    samples are colder. Where t < .01 it is the Euler step along v.

    renewal: g is at most renewal t^2 / (t - t_next), which leaves the marginals alone (they are the same for every g) and
    keeps |1 - g dt / t^2| below 1, so that the directions in which data has no freedom do not blow up in large steps: from
    462 steps on a grid of two decades they do not in any case.
    """
    t, t_next = expand(t, x), expand(t_next, x)
    width, v = t - t_next, (x - x0) / t
    gain = 1 / (1 - t + ODE_BELOW)
    if renewal is not None:
        gain = torch.minimum(gain, renewal * t**2 / width)
    score = -(x + (1 - t) * v) / t
    moved = x - width * v
    noisy = moved + width * gain * score + (2 * gain * variance * width).sqrt() * noise
    return torch.where(t < ODE_BELOW, moved, noisy)
