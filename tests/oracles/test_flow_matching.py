"""Flow matching against closed forms: its optimum is the exact velocity, and a DDPM network is the same field."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.maths.paths import FlowPath, VPPath
from fewstep.methods.diffusion.flow_matching import FlowMatching
from fewstep.models.oracle import GAUSSIAN
from tests.oracles.harness import backward, batch, gaussian_wasserstein2, samples, seat, train, updates

MEAN, STD = [0.6, -0.3], 0.7
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class GaussianEps(nn.Module):
    """eps(x, k) of N(m, s^2) under x = sqrt(abar) x0 + sqrt(1 - abar) eps, from the table alone.

    eps = sqrt(1 - abar) (x - sqrt(abar) m) / (abar s^2 + 1 - abar)
    """

    def __init__(self, abar: Tensor, mean: list[float], std: float):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))
        self.abar, self.dim, self.null = abar, len(mean), 1

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        low = timestep.floor().long().clamp(max=len(self.abar) - 2)
        ratio = torch.log(self.abar) - torch.log1p(-self.abar)  # log SNR, linear between entries
        abar = torch.sigmoid(torch.lerp(ratio[low], ratio[low + 1], timestep.double() - low)).to(x.dtype)[:, None]
        return (1 - abar).sqrt() * (x - abar.sqrt() * self.mean) / (abar * self.std**2 + 1 - abar)


def networks(mean: list[float] = MEAN, std: float = STD) -> dict:
    """The same Gaussian as a flow network and as an eps network on Stable Diffusion's table."""
    path = VPPath.from_scheduler(STABLE_DIFFUSION)
    flow = GAUSSIAN.build(means=[mean], std=[std]).module
    return {
        "flow": (flow, FlowPath()),
        "eps": (GaussianEps(torch.tensor(path.alphas_cumprod, dtype=torch.float64), mean, std), path),
    }


def method(kind: str, mean: list[float] = MEAN, std: float = STD, **config) -> FlowMatching:
    network, path = networks(mean, std)[kind]
    return seat(FlowMatching(FlowMatching.Config(label_dropout=0.0, **config)), {"student": network}, path)


def gradients(matcher: FlowMatching, repeats: int = 24, rows: int = 4096) -> Tensor:
    """Independent gradient estimates [repeats, parameters] on data of N(MEAN, STD^2)."""
    generator, found = torch.Generator().manual_seed(0), []

    def data(_):
        return batch(rows, x0=torch.tensor(MEAN) + STD * torch.randn(rows, 2, generator=generator))

    parameters = list(matcher.student.module.parameters())
    for update in updates(matcher, range(repeats), data):
        matcher.student.module.zero_grad()
        backward(matcher, update)
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    return torch.stack(found)


def z_scores(estimates: Tensor) -> Tensor:
    """Mean over standard error of each parameter's gradient; parameters that never matter are left out."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return (estimates.mean(0) / error)[error > 0]


@pytest.mark.parametrize("kind", ["flow", "eps"])
@pytest.mark.parametrize("law", ["uniform", "logit_normal", "mix"])
def test_gradient_vanishes_at_the_gaussian_optimum_and_nowhere_else(kind, law):
    """E |output - target|^2 is stationary at the closed form, under every law of time, in v and in eps."""
    assert z_scores(gradients(method(kind, time=law))).abs().max() < 4
    assert z_scores(gradients(method(kind, mean=[0.9, -0.3], std=0.6, time=law))).abs().max() > 8


def test_training_reaches_the_gaussian_and_its_sampler_draws_it():
    """From N(0, 1) to the data's mean and std; 50 Euler steps then sample it (W2 below 5 % of the std)."""
    matcher = method("flow", mean=[0.0, 0.0], std=1.0)
    module, generator = matcher.student.module, torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([module.means, module.log_std], 0.03)
    halving = torch.optim.lr_scheduler.StepLR(optimizer, 60, 0.5)

    def data(_):
        return batch(512, x0=torch.tensor(MEAN) + STD * torch.randn(512, 2, generator=generator))

    train(matcher, range(300), data, {"student": optimizer}, lambda *_: halving.step())
    made = samples(matcher, matcher.schedule(), 20_000)
    assert gaussian_wasserstein2(made, torch.tensor(MEAN), STD**2 * torch.eye(2)) < 0.05 * STD


@pytest.mark.parametrize("u", [0.03, 0.25, 0.5, 0.749, 0.98])
def test_ddpm_and_flow_networks_of_one_distribution_are_one_field(u):
    """Shown as flow networks, eps-prediction on a DDPM table and v-prediction agree in v, x0 and score."""
    flow, eps = method("flow").student, method("eps").student
    flow.module.double(), eps.module.double()
    t = eps.path.time(torch.full((40,), u, dtype=torch.float64))
    x, cond = torch.randn(40, 2, dtype=torch.float64), batch(40).cond
    for what in ("velocity", "x0", "score"):
        torch.testing.assert_close(
            getattr(eps, what)(x, t, cond), getattr(flow, what)(x, t, cond), rtol=1e-6, atol=1e-6
        )
