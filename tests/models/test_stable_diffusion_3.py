"""What Stable Diffusion 3 alone has: three text encoders, a pooled prompt, a VAE with a shift."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.errors import UserError
from fewstep.models.folder import open_model

from .flow_stock import denoiser, pretrained
from .tiny_sd3 import tiny_sd3

PROMPTS = ["a red cat", "2 dogs?", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")


def test_prompts_and_null_are_the_pipelines_own(folder):
    """CLIP states padded to T5's width, then T5's; pooled of both CLIP encoders; the empty prompt for no condition."""
    around = open_model(folder).around
    with torch.no_grad():
        embeds, negative, pooled, no_pooled = pretrained(folder).encode_prompt(PROMPTS, None, None)
    cond = around.prompts(PROMPTS)
    null = around.null(cond)
    assert set(cond) == {"prompt_embeds", "pooled"}
    assert torch.equal(cond["prompt_embeds"], embeds) and torch.equal(cond["pooled"], pooled)
    torch.testing.assert_close(null["prompt_embeds"], negative)
    torch.testing.assert_close(null["pooled"], no_pooled)
    assert (cond["pooled"][0] - null["pooled"][0]).abs().max() > 1e-3


def test_pooled_prompts_reach_the_network(folder):
    """They join the time embedding."""
    role, x, t = denoiser(folder), torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8])
    cond = role.handle.around.prompts(PROMPTS[:2])
    with torch.no_grad():
        moved = role.velocity(x, t, cond.with_(pooled=cond["pooled"].flip(0))) - role.velocity(x, t, cond)
    assert moved.abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_3", "text_encoder"])
def test_a_part_that_is_lost_is_named(folder, tmp_path, part):
    """T5 too, without which diffusers does not load the folder."""
    copied = shutil.copytree(folder, tmp_path / "sd3")
    shutil.rmtree(copied / part)
    with pytest.raises(UserError, match=f"has no {part}/: copy the pipeline's {part} folder there"):
        open_model(copied).around.prompts(["a"])


def test_latents_are_the_posterior_less_its_shift_times_the_scale(folder):
    """(mean + std noise - .0609) 1.5305."""
    around, images, noise = open_model(folder).around, torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        posterior = pretrained(folder).vae.encode(images).latent_dist
    torch.testing.assert_close(around.encode(images), (posterior.mean - 0.0609) * 1.5305)
    sampled = around.encode(images, noise)
    torch.testing.assert_close(sampled, (posterior.mean + posterior.std * noise - 0.0609) * 1.5305)


def test_a_scheduler_with_another_shift_makes_another_path(folder, tmp_path):
    """Read from the folder, never assumed."""
    copied = shutil.copytree(folder, tmp_path / "sd3")
    file = copied / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 1.5}))
    assert open_model(copied).path.shift == 1.5
