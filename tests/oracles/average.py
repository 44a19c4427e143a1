"""Average velocities of points in closed form, and students that are linear in their parameters; data N(m_c, s^2) a class.

With a(t)^2 = (1-t)^2 s^2 + t^2 the trajectory through x at t is x_s = (1-s) m + a(s) / a(t) (x - (1-t) m), and

    V*(x, t, s) = (x - x_s) / (t - s) = -m + [(t + s) - s^2 (2 - t - s)] / (a(t) (a(t) + a(s))) (x - (1-t) m)

which is v(x, t) at s = t. Guidance of Gaussians of one std moves the mean: m_g = g m_c + (1 - g) m_null.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.maths.paths import FlowPath, Path, expand
from fewstep.methods.diffusion.any_step import AnyStepMethod
from fewstep.nets.extra_inputs import fed
from tests.oracles.harness import batch, seat
from tests.oracles.maps import M, Reads, S, spread

F64 = torch.float64


def exact(x: Tensor, t: Any, s: Any, mean: Any = M, std: Any = S) -> Tensor:
    """V* at x [rows, ...]; times and mean broadcast against x."""
    a, b = spread(t, std), spread(s, std)
    return -mean + ((t + s) - std**2 * (2 - t - s)) / (a * (a + b)) * (x - (1 - t) * mean)


class AverageVelocity(nn.Module):
    """V* of N(means[label], std^2), the last entry being the null class; `bend` * (t - s) off it."""

    def __init__(self, means: tuple[float, ...] = (M, M), std: float = S, bend: float = 0.0, dim: int = 1):
        super().__init__()
        self.means, self.std = nn.Parameter(torch.tensor(means)), nn.Parameter(torch.tensor(std))
        self.bend = nn.Parameter(torch.tensor(bend))
        self.extra_inputs, self.dim, self.null = Reads("s"), dim, len(means) - 1
        self.calls: list[int] = []

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """V at x [rows, dim] and t = timestep / 1000."""
        self.calls.append(len(x))
        t, s = expand(timestep / 1000, x), expand(fed("s"), x)
        return exact(x, t, s, self.means[label][:, None], self.std) + self.bend * (t - s) * x


class NativeAverage(nn.Module):
    """V* as a network of another path answers it: fed the native state and its label, in that path's parameterisation."""

    def __init__(self, path: Path, dim: int = 1):
        super().__init__()
        self.path, self.extra_inputs, self.dim, self.null = path, Reads("s"), dim, 1
        self.mean = nn.Parameter(torch.tensor(M))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """The output that means V* at the flow state y = x / scale(t)."""
        t = self.path.time(timestep / len(self.path.alphas_cumprod))
        y = x / expand(self.path.scale(t), x)
        return self.path.output(exact(y, expand(t, x), expand(fed("s"), x), self.mean), y, t)


class Polynomial(nn.Module):
    """V = sum_ij (b_ij + g_ij x) T_i(2t - 1) T_j(2s - 1) over i + j <= degree, Chebyshev polynomials T."""

    def __init__(self, degree: int = 5):
        super().__init__()
        self.powers = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
        self.degree = degree
        self.offset, self.gain = (nn.Parameter(torch.zeros(len(self.powers))) for _ in range(2))
        self.extra_inputs, self.dim, self.null = Reads("s"), 1, 1

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """V at x [rows, 1]."""
        t, s = self._chebyshev(timestep / 1000), self._chebyshev(fed("s"))
        basis = torch.stack([t[i] * s[j] for i, j in self.powers], 1)
        return (basis @ self.offset)[:, None] + (basis @ self.gain)[:, None] * x

    def _chebyshev(self, time: Tensor) -> list[Tensor]:
        place = 2 * time - 1
        basis = [torch.ones_like(place), place]
        while len(basis) <= self.degree:
            basis.append(2 * place * basis[-1] - basis[-2])
        return basis


def seated(
    method: type[AnyStepMethod], network: nn.Module | None = None, path: Path | None = None, **config: Any
) -> Any:
    """The method on `network`, or on V* itself."""
    made = method(method.Config(**config))  # type: ignore[call-arg]
    return seat(made, {"student": network if network is not None else AverageVelocity()}, path or FlowPath())


def data(rows: int, mean: float = M, std: float = S, seed: int = 0) -> Batch:
    """Samples of N(mean, std^2), all of class 0."""
    noise = torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed))
    return batch(rows, x0=mean + std * noise)


def places(rows: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Any]:
    """x, t and s < t over the whole range, labels; float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, dtype=F64, generator=generator)
    t = torch.linspace(0.02, 1, rows, dtype=F64)
    return x, t, t * torch.rand(rows, dtype=F64, generator=generator), batch(rows).cond


def distance(method: Any, where: Callable[[Tensor], Tensor] = torch.zeros_like, target: Any = exact) -> float:
    """Root mean square of V - V* from t over (0, 1] down to where(t), x of N(m, s^2) noised; V* itself has about 1."""
    x, t, _, cond = places(2048, seed=1)
    s = where(t)
    x = (1 - t[:, None]) * M + spread(t[:, None]) * x
    with torch.no_grad():
        gap = method.student.velocity(x.float(), t.float(), cond.with_(s=s.float())) - target(x, t[:, None], s[:, None])
    return gap.square().mean().sqrt().item()


def stationary(method: Any, gradient: Callable[[], list[Tensor]]) -> None:
    """Moves a student that is linear in its parameters to where its gradient vanishes: one Newton step."""
    parameters = list(method.student.module.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters).detach()

    def at(place: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(place, parameters)
        return torch.cat([g.double() for g in gradient()])

    offset = at(start)
    slopes = torch.stack([at(start + unit) - offset for unit in torch.eye(len(start))], 1)
    torch.nn.utils.vector_to_parameters((start - torch.linalg.solve(slopes, offset)).float(), parameters)
