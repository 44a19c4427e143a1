"""Signal tables against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler

from fewstep.errors import UserError
from fewstep.maths.tables import alphas_cumprod

CONFIGS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "linear", "num_train_timesteps": 100, "beta_end": 0.05},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.1, 0.2, 0.3, 0.05], "num_train_timesteps": 4},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, LCMScheduler])
def test_table_equals_the_schedulers_to_its_float32(config, scheduler):
    theirs = scheduler(**config)
    ours = alphas_cumprod(theirs.config)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours.sqrt(), theirs.alphas_cumprod.double().sqrt(), rtol=2e-5, atol=2e-7)


def test_defaults_come_from_a_saved_config_alone():
    euler = EulerDiscreteScheduler()
    saved = {key: value for key, value in euler.config.items() if not key.startswith("_")}
    assert torch.allclose(alphas_cumprod(saved), euler.alphas_cumprod.double(), rtol=2e-5)


def test_sigmoid_betas_equal_ddpms():
    theirs = DDPMScheduler(beta_schedule="sigmoid")
    assert torch.allclose(alphas_cumprod(theirs.config), theirs.alphas_cumprod.double(), rtol=5e-5)


def test_zero_terminal_snr_ends_at_zero_and_starts_as_before():
    plain = alphas_cumprod({"beta_schedule": "scaled_linear"})
    rescaled = alphas_cumprod({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True})
    assert rescaled[-1] == 0
    assert rescaled[0].item() == pytest.approx(plain[0].item(), abs=1e-15)


def test_unknown_schedule_is_named_with_the_nearest_one():
    with pytest.raises(UserError, match="did you mean 'scaled_linear'"):
        alphas_cumprod({"beta_schedule": "scaled_liner"})
