"""The trajectories of a Gaussian in closed form, as students: what every trajectory method is meant to learn."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.maths.paths import expand
from fewstep.methods.base import DiffusionMethod
from fewstep.models.oracle import GAUSSIAN, GAUSSIAN_MIXTURE, MLP, MixtureNet
from tests.oracles.harness import backward, batch, draw, updates

MEAN, STD = [0.6, -0.3], 0.5


def spread(t: Tensor, std: Tensor | float) -> Tensor:
    """sqrt((1 - t)^2 s^2 + t^2), the std of x_t."""
    return ((1 - t) ** 2 * std**2 + t**2).sqrt()


class OdeMap(nn.Module):
    """The network whose jump from t to `edge` is the trajectory of N(mean, std^2): v = (x - map(x)) / (t - edge).

    map(x) = (1 - e) m + (S_e / S_t) (x - (1 - t) m). The edge of t is the largest of `edges` below t; (0,) makes
    f = x - t v the consistency function m + s / S_t (x - (1 - t) m).
    """

    def __init__(self, mean: list[float] = MEAN, std: float = STD, edges: tuple[float, ...] = (0.0,)):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))
        self.edges, self.dim, self.null = torch.tensor(sorted(edges)), len(mean), 1

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """v at x [rows, dim]."""
        t = timestep / 1000
        below = self.edges.to(t)[None] < t[:, None] - 1e-6
        edge = self.edges.to(t)[(below.sum(1) - 1).clamp_min(0)]
        t, edge = expand(t, x), expand(edge, x)
        ratio = spread(edge, self.std) / spread(t, self.std)
        moved = (1 - edge) * self.mean + ratio * (x - (1 - t) * self.mean)
        return (x - moved) / (t - edge).clamp_min(1e-6)


def teacher() -> nn.Module:
    """The exact velocity of N(MEAN, STD^2)."""
    return GAUSSIAN.build(means=[MEAN], std=[STD]).module


def data(rows: int, seed: int = 0):
    """A function of the step: batches of N(MEAN, STD^2)."""
    generator = torch.Generator().manual_seed(seed)
    return lambda _step: batch(rows, x0=torch.tensor(MEAN) + STD * torch.randn(rows, 2, generator=generator))


def gradients(method: DiffusionMethod, steps: int = 16, rows: int = 4096) -> Tensor:
    """Gradient estimates of the student's parameters, [steps, parameters]."""
    found, module = [], method.student.module
    for update in updates(method, range(steps), data(rows)):
        module.zero_grad()
        backward(method, update)
        found.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    return torch.stack(found)


def walked_down(method: DiffusionMethod, x: Tensor) -> Tensor:
    """Where the method's own teacher steps take x [rows, dim] from the top of its grid to the end, level by level.

    This is what f at the top is trained to be: f(x_t, t) = f(x_s, s) at every level, f(x, 0) = x.
    """
    levels = [*method.grid(), 0.0]
    for u, u_next in pairwise(levels):
        at = [torch.full((len(x),), v, dtype=torch.float64) for v in (u, u_next)]
        x = method.walked(x, at, batch(len(x)).cond, 1.0, draw(0, len(x)))
    return x


def bias(method: DiffusionMethod, rows: int = 256) -> float:
    """RMS distance of `walked_down` from the exact trajectory m + s x, in units of the data's std."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gap = walked_down(method, x) - (torch.tensor(MEAN, dtype=torch.float64) + STD * x)
    return gap.square().mean().sqrt().item() / STD


# the mixture in the plane


def mixture() -> MixtureNet:
    """Three Gaussians, exact."""
    return GAUSSIAN_MIXTURE.build(means=[[-1.0, 0.0], [1.0, 0.0], [0.0, 1.2]], std=[0.25, 0.25, 0.25]).module


def fitted(net: MixtureNet, steps: int = 600, rows: int = 512) -> nn.Module:
    """An MLP that has learnt the velocity of `net`: the student as it starts, "from teacher"."""
    torch.manual_seed(0)
    student, generator = MLP.build(width=96, depth=3).module, torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    label = torch.zeros(rows, dtype=torch.long)
    for _ in range(steps):
        x0, eps = net.data(label, generator), torch.randn(rows, 2, generator=generator)
        t = torch.rand(rows, generator=generator)
        loss = (student((1 - t[:, None]) * x0 + t[:, None] * eps, 1000 * t, label) - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student
