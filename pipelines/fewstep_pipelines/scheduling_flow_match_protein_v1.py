"""Samplers of protein flow models: the teacher's stochastic one, and the few-step one of distilled students.

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

States are x = (1 - t) data + t noise, t = 1 - tau from 1 (noise) to 0. `timesteps` holds t. Networks answer
u = data - noise. Noise is not centred here: who calls a step keeps the state's centre of mass at 0.
"""

import math
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

PER_DECADE = 200  # grid positions: t = 10^(-k / 200), k whole
ODE_BELOW = 0.01


@dataclass
class ProteinSchedulerOutput(BaseOutput):
    """A step's result.

    prev_sample: state at the next level. pred_original_sample: the clean chain that the network stands for.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


class _ProteinScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What both have: levels, the step's place in them, and noise."""

    order = 1
    config: Any

    @property
    def init_noise_sigma(self) -> float:
        """Factor of unit noise that makes the first state."""
        raise NotImplementedError

    @property
    def step_index(self) -> int:
        """Number of the step that comes next."""
        return self._step_index

    def set_noise_scale(self, noise_scale: Optional[float]) -> None:  # noqa: UP045
        """In place of the config's, for the coming runs; None: the config's."""
        chosen = self.config.noise_scale if noise_scale is None else noise_scale
        if not 0 <= chosen < math.inf:
            raise ValueError(f"noise_scale={chosen}: write 0 or more, 1 is all the noise")
        self._noise_scale = float(chosen)

    def set_timesteps(
        self,
        num_inference_steps: Optional[int] = None,  # noqa: UP045
        device: Any = None,
        sigmas: Optional[list[float]] = None,  # noqa: UP045
    ) -> None:
        """Begins a run of so many steps, or one on levels t of your own: decreasing, in (0, 1]."""
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError("give either num_inference_steps or sigmas")
        if sigmas is None:
            if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
                raise ValueError(f"num_inference_steps={num_inference_steps}: write a whole number from 1")
            sigmas = self._levels_of(num_inference_steps).tolist()
        self._begin([float(t) for t in sigmas], device)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """(1 - t) data + t noise, with t [rows]."""
        t = timesteps.to(original_samples).reshape(-1, *[1] * (original_samples.ndim - 1))
        return (1 - t) * original_samples + t * noise

    def draw(self, like: torch.Tensor, generator: Any = None, mask: Any = None) -> torch.Tensor:
        """Unit normal noise like the state `like` [rows, residues, 3].

        Of a list of generators each draws for the residues [residues] of its own row of `mask` alone, so that a chain's
        noise depends on neither its batch nor padding.
        """
        if not isinstance(generator, (list, tuple)):
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
        if len(generator) != len(like):
            raise ValueError(f"{len(generator)} generators do not fit {len(like)} chains")
        noise = torch.zeros_like(like)
        for row, one in enumerate(generator):
            kept = slice(None) if mask is None else mask[row]
            place = noise[row, kept]
            noise[row, kept] = randn_tensor(place.shape, generator=one, device=like.device, dtype=like.dtype)
        return noise

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        mask: Any = None,
    ) -> Any:
        """One step from the current level to the next; from the last one to the clean chain.

        Args:
            model_output: u = data - noise, the shape of `sample`.
            timestep: the level t, the next of `timesteps`. A tensor on another device is believed, not waited for.
            sample: state at t.
            generator: of the noise that is added; a list has one a chain.
            mask: residues [rows, residues], which a list of generators draws for.
        """
        t, t_next = self._next(timestep)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        clean = x + t * model_output.to(x.dtype)
        keep, fresh = self._shares(t, t_next)
        moved = (1 - t_next) * clean + keep * (x - (1 - t) * clean)
        if fresh:
            moved = moved + fresh * self.draw(x, generator, mask)
        self._step_index += 1
        moved, clean = moved.to(sample.dtype), clean.to(sample.dtype)
        return ProteinSchedulerOutput(moved, clean) if return_dict else (moved, clean)

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the config and, beside it, this file, so that a saved folder stays loadable."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _begin(self, levels: list, device: Any = None) -> None:
        falling = all(a > b for a, b in pairwise(levels))
        if not levels or not falling or not 0 < levels[-1] <= levels[0] <= 1:
            raise ValueError(f"levels {levels} must decrease from at most 1 and stay above 0")
        self._levels = [*levels, 0.0]  # numbers of the host, in float64: a step waits for no device
        self.sigmas = torch.tensor(self._levels, dtype=torch.float32)
        self.timesteps = self.sigmas[:-1].to(device)
        self.num_inference_steps = len(levels)
        self._step_index = 0

    def _next(self, timestep: Any) -> tuple:
        """Levels of the step at hand."""
        if self._step_index >= self.num_inference_steps:
            raise ValueError(f"all {self.num_inference_steps} steps are done: call set_timesteps to begin another run")
        t, t_next = self._levels[self._step_index : self._step_index + 2]
        here = not isinstance(timestep, torch.Tensor) or timestep.device.type == "cpu"
        if here and abs(float(timestep) - t) > 1e-6:
            raise ValueError(f"step {self._step_index} is at t = {t:.6g}, not at {float(timestep):.6g}")
        return t, t_next

    def _levels_of(self, steps: int) -> torch.Tensor:
        raise NotImplementedError

    def _shares(self, t: float, t_next: float) -> tuple:
        """(keep, fresh) of x' = (1 - t') clean + keep (x - (1 - t) clean) + fresh noise; both 0 at t' = 0."""
        raise NotImplementedError


class FlowMatchProteinScheduler(_ProteinScheduler):
    """Denoise and noise again (distilled Proteina, arXiv 2510.03095): x' = (1 - t') clean + noise_scale t' noise.

    The first state is noise_scale t_1 noise. t_i = 10^(-k_i / 200), k_i = round(linspace(first, last, N)); one step is
    at `first` alone. (The released generators of one step are called at t = .63: first = 40 is .631.)

    Args:
        first: k of the first level; 30 gives .708.
        last: k of the last level; 400 gives .01.
        noise_scale: factor of the noise's standard deviation in every step, the first too; 1 is what students train
            with. The network is told t all the same, that is, it sees less noise than it is told. It is not the
            number of the same name of `FlowMatchProteinSDEScheduler`, which scales a variance.
    """

    @register_to_config
    def __init__(self, first: int = 30, last: int = 400, noise_scale: float = 0.45):
        self.set_noise_scale(noise_scale)
        self._begin(self._levels_of(1).tolist())

    @property
    def init_noise_sigma(self) -> float:
        """noise_scale t_1."""
        return self._noise_scale * self._levels[0]

    def _levels_of(self, steps: int) -> torch.Tensor:
        first, last = self.config.first, self.config.last
        if steps > last - first + 1:
            raise ValueError(f"{steps} steps: the grid has {last - first + 1} levels")
        return torch.pow(10.0, -torch.linspace(first, last, steps, dtype=torch.float64).round() / PER_DECADE)

    def _shares(self, t, t_next):
        return 0.0, self._noise_scale * t_next


class FlowMatchProteinSDEScheduler(_ProteinScheduler):
    """The teacher's sampler (Proteina, arXiv 2503.00710): velocity and score together, in hundreds of Euler steps.

    dx = [u + g score] dtau + sqrt(2 g noise_scale) dW with g = 1 / (tau + .01), on tau_k = 1 - 10^(-decades k / N)
    stretched to end at 1; where tau > .99 along u alone.

    The score pulls a state to the clean chain at the rate g / t^2, a step is (t + .0101) (1 - 10^(-2 / N)) long. So a
    direction that the chain leaves no freedom (a bond) is multiplied by about 1 - g dt / t^2, which is beyond -1 near
    t = .01 for N < 462: deviations are then amplified there, by a factor of 2 over all steps at N = 400 and of 10^8 at
    N = 100, and the chain tears. `renewal` avoids it.

    Args:
        noise_scale: factor of the noise's *variance*; 1 has the model's own marginals, below it chains are colder.
        decades: of t that the levels span.
        renewal: g is at most renewal t^2 / dt, i.e. a step replaces no larger share of the noise. The equation has the
            model's marginals for every g, so nothing but the discretisation changes, and any number of steps is stable:
            with .5, standard deviations are right within 15 % from 50 steps on. None: as Proteina.
    """

    @register_to_config
    def __init__(
        self,
        noise_scale: float = 0.45,
        decades: float = 2.0,
        renewal: Optional[float] = None,  # noqa: UP045
    ):
        if renewal is not None and not 0 <= renewal <= 1:
            raise ValueError(f"renewal={renewal}: write a share from 0 to 1, or None")
        self.set_noise_scale(noise_scale)
        self._begin(self._levels_of(1).tolist())

    @property
    def init_noise_sigma(self) -> float:
        """1."""
        return 1.0

    def _levels_of(self, steps: int) -> torch.Tensor:
        """t_k = (10^(-decades k / N) - 10^-decades) / (1 - 10^-decades), k = 0 .. N - 1."""
        end = 10.0**-self.config.decades
        levels = torch.pow(10.0, -self.config.decades * torch.arange(steps, dtype=torch.float64) / steps)
        return (levels - end) / (1 - end)

    def _shares(self, t, t_next):
        if t_next == 0 or t < ODE_BELOW:
            return t_next / t, 0.0
        width = t - t_next
        gain = 1 / (1 - t + ODE_BELOW)
        if self.config.renewal is not None:
            gain = min(gain, self.config.renewal * t**2 / width)
        # u = (clean - x) / t and score = -(x - (1 - t) clean) / t^2
        return t_next / t - width * gain / t**2, math.sqrt(2 * gain * self._noise_scale * width)
