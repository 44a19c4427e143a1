"""Samplers of protein flow models: the teacher's stochastic one, and the few-step one of distilled students.

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

States are x = (1 - t) data + t noise, t = 1 - tau from 1 (noise) to 0. `timesteps` holds t. Networks answer
u = data - noise. Noise is not centred here: who calls a step keeps the state's centre of mass at 0.
"""

import math
import shutil
from dataclasses import dataclass
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


class _ProteinScheduler(SchedulerMixin, ConfigMixin):
    """What both have: levels, the step's place in them, and noise."""

    order = 1
    config: Any

    @property
    def init_noise_sigma(self) -> float:
        """Factor of unit noise that makes the first state."""
        raise NotImplementedError

    def set_noise_scale(self, noise_scale: Optional[float]) -> None:  # noqa: UP045
        """In place of the config's, for the coming run; None: the config's."""
        self._noise_scale = self.config.noise_scale if noise_scale is None else noise_scale

    def _set_levels(self, levels: torch.Tensor, device: Any) -> None:
        self.sigmas = torch.cat([levels, levels.new_zeros(1)]).to(device, torch.float32)
        self.timesteps = self.sigmas[:-1]
        self.num_inference_steps = len(levels)
        self._step = 0

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the config and, beside it, this file, so that a saved folder stays loadable."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample itself."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """One step from the current level to the next.

        Args:
            model_output: u = data - noise, the shape of `sample`.
            timestep: the level t; levels are visited in order.
            sample: state at t.
            generator: of the noise that is added.
        """
        t, t_next = self.sigmas[self._step], self.sigmas[self._step + 1]
        self._step += 1
        clean = sample + t * model_output
        if t_next == 0:
            moved = clean
        else:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            moved = self._moved(sample, clean, model_output, t, t_next, noise)
        return ProteinSchedulerOutput(moved, clean) if return_dict else (moved, clean)

    def _moved(self, sample, clean, u, t, t_next, noise):
        raise NotImplementedError


class FlowMatchProteinScheduler(_ProteinScheduler):
    """Denoise and noise again: x' = (1 - t') clean + noise_scale t' noise, from noise_scale t_1 noise.

    Args:
        first: k of the first level t = 10^(-k / 200); 30 gives .708.
        last: k of the last level; 400 gives .01.
        noise_scale: factor of the noise's standard deviation in every step, the first too; 1 is what students train with.
    """

    @register_to_config
    def __init__(self, first: int = 30, last: int = 400, noise_scale: float = 0.45):
        self.set_noise_scale(noise_scale)
        self.set_timesteps(1)

    @property
    def init_noise_sigma(self) -> float:
        """noise_scale t_1."""
        return self._noise_scale * float(self.sigmas[0])

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """t_i = 10^(-k_i / 200), k_i = round(linspace(first, last, N))."""
        span = torch.linspace(self.config.first, self.config.last, num_inference_steps, dtype=torch.float64)
        self._set_levels(torch.pow(10.0, -span.round() / PER_DECADE), device)

    def _moved(self, sample, clean, u, t, t_next, noise):
        return (1 - t_next) * clean + self._noise_scale * t_next * noise


class FlowMatchProteinSDEScheduler(_ProteinScheduler):
    """The teacher's sampler (Proteina, arXiv 2503.00710): velocity and score together, in hundreds of steps.

    dx = [u + g score] dtau + sqrt(2 g noise_scale) dW with g = 1 / (tau + .01), on tau_k = 1 - 10^(-decades k / N)
    stretched to end at 1; where tau > .99 along u alone.

    Args:
        noise_scale: factor of the noise's *variance*; 1 has the model's own marginals, below it chains are colder.
        decades: of t that the levels span.
    """

    @register_to_config
    def __init__(self, noise_scale: float = 0.45, decades: float = 2.0):
        self.set_noise_scale(noise_scale)
        self.set_timesteps(1)

    @property
    def init_noise_sigma(self) -> float:
        """1."""
        return 1.0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """t_k = (10^(-decades k / N) - 10^-decades) / (1 - 10^-decades), k = 0 .. N - 1."""
        end = 10.0**-self.config.decades
        places = torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
        levels = torch.exp(-self.config.decades * math.log(10.0) * places)
        self._set_levels((levels - end) / (1 - end), device)

    def _moved(self, sample, clean, u, t, t_next, noise):
        width = t - t_next
        if t < ODE_BELOW:
            return sample + width * u
        gain = 1 / (1 - t + ODE_BELOW)
        score = -(sample - (1 - t) * u) / t
        return sample + width * (u + gain * score) + (2 * gain * self._noise_scale * width).sqrt() * noise
