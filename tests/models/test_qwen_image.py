"""Qwen-Image shown as a flow network, against the stock pipeline that samples it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import open_model
from fewstep.models.patched import latents, patches

from .stock import PROMPTS, denoiser, pretrained
from .tiny_qwen_image import SIZE, tiny_qwen_image

SHAPE = (4, 8, 8)
Velocity = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_qwen_image(tmp_path_factory.mktemp("tiny") / "qwen")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    """diffusers' own."""
    return pretrained(folder)


@pytest.fixture
def noise() -> Tensor:
    """Two rows."""
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def stock_latents(pipeline: Any, noise: Tensor, scheduler: Any, scale: float = 1.0, steps: int = 4) -> Tensor:
    """What the stock pipeline makes of noise; guided against a blank where scale is not 1."""
    pipeline.register_modules(scheduler=scheduler)
    said = {"true_cfg_scale": scale, "negative_prompt": [" "] * len(PROMPTS) if scale != 1 else None, **SIZE}
    made = pipeline(PROMPTS, latents=patches(noise), num_inference_steps=steps, output_type="latent", **said).images
    return latents(made, noise.shape[2:])


@torch.no_grad()
def euler(scheduler: Any, x: Tensor, velocity: Velocity) -> Tensor:
    """x <- x + (t' - t) v over the levels that the pipeline left in its scheduler."""
    for t, t_next in itertools.pairwise(scheduler.sigmas.tolist()):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x


def rescaled(role: Denoiser, cond: Cond, scale: float) -> Velocity:
    """Guidance as the pipeline has it: each patch of v_u + w (v_c - v_u) with the norm of v_c."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        tied, free = patches(role.velocity(x, t, cond)), patches(role.velocity(x, t, role.null(cond)))
        both = free + scale * (tied - free)
        return latents(both * tied.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True), x.shape[2:])

    return velocity


# ---- the stock pipeline's samples


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("shift", [None, 1.0, 3.0])
def test_euler_is_the_stock_pipeline(folder, pipeline, noise, scale, shift):
    """v = output, fed t itself; on the folder's own levels (shift by size, ending at .02) and on static ones."""
    own = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler = own if shift is None else FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs = stock_latents(pipeline, noise, scheduler, scale)
    role = denoiser(folder)
    cond = role.handle.around.prompts(PROMPTS)
    plain = lambda x, t: role.velocity(x, t, cond)  # noqa: E731
    ours = euler(scheduler, noise, plain if scale == 1 else rescaled(role, cond, scale))
    assert theirs.std() > 0.3 and (shift is not None or abs(scheduler.sigmas[-2] - 0.02) < 1e-6)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_wrong_sign_time_or_unit_would_show(folder, pipeline, noise):
    """The parity above can fail: each flip is off by more than .01."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    theirs = stock_latents(pipeline, noise, scheduler)
    role = denoiser(folder)
    cond = role.handle.around.prompts(PROMPTS)
    wrong: list[Velocity] = [
        lambda x, t: -role.velocity(x, t, cond),
        lambda x, t: role.velocity(x, 1 - t, cond),
        lambda x, t: role.velocity(x, 1000 * t, cond),
        lambda x, t: role.velocity(x, t, cond.with_(prompt_embeds=cond["prompt_embeds"].flip(0))),
    ]
    assert all((euler(scheduler, noise, w) - theirs).abs().max() > 1e-2 for w in wrong)


def test_patches_are_the_pipelines(noise):
    """2 x 2 latents a token, and back."""
    theirs = QwenImagePipeline._pack_latents(noise, 2, 4, 8, 8)
    assert torch.equal(patches(noise), theirs)
    assert torch.equal(latents(theirs, (8, 8)), noise)
    assert torch.equal(QwenImagePipeline._unpack_latents(theirs, 16, 16, 2)[:, :, 0], noise)
    wide = torch.randn(1, 4, 4, 8)
    assert torch.equal(latents(patches(wide), (4, 8)), wide)


# ---- prompts


def test_prompts_of_any_lengths_lie_in_one_batch(folder, noise):
    """The mask makes a padded row the same as the row alone, to 1e-5; `Cond.cat` pads."""
    role = denoiser(folder)
    alone = [role.handle.around.prompts([text]) for text in (*PROMPTS, "a much longer prompt than these")]
    cond = Cond.cat(alone)
    x, t = torch.cat([noise, noise[:1]]), torch.tensor([0.2, 0.6, 0.9])
    lengths = {one["mask"].shape[1] for one in alone}
    assert len(lengths) == 3 and cond["mask"].sum(1).tolist() == [one["mask"].shape[1] for one in alone]
    with torch.no_grad():
        single = torch.cat([role.velocity(x[i : i + 1], t[i : i + 1], one) for i, one in enumerate(alone)])
        torch.testing.assert_close(role.velocity(x, t, cond), single, atol=1e-5, rtol=1e-5)
        unmasked = cond.with_(mask=torch.ones_like(cond["mask"]))
        assert (role.velocity(x, t, unmasked)[0] - single[0]).abs().max() > 1e-3


def test_padding_leaves_fields_of_another_size_alone():
    """Only what is as long as the mask in every condition grows; without a mask nothing does."""
    a = Cond(prompt_embeds=torch.ones(1, 2, 5), mask=torch.ones(1, 2), pooled=torch.ones(1, 2), s=torch.ones(1))
    b = Cond(prompt_embeds=torch.ones(2, 3, 5), mask=torch.ones(2, 3), pooled=torch.ones(2, 2), s=torch.ones(2))
    both = Cond.cat([a, b])
    assert {name: tuple(value.shape) for name, value in both.items()} == {
        "prompt_embeds": (3, 3, 5),
        "mask": (3, 3),
        "pooled": (3, 2),
        "s": (3,),
    }
    assert both["mask"].sum(1).tolist() == [2, 3, 3] and not both["prompt_embeds"][0, 2].any()
    with pytest.raises(RuntimeError):
        Cond.cat([Cond(prompt_embeds=torch.ones(1, 2, 5)), Cond(prompt_embeds=torch.ones(1, 3, 5))])


@pytest.mark.parametrize("prompts", [PROMPTS, [""]])
def test_no_condition_is_the_pipelines_blank(folder, pipeline, prompts):
    """encode_prompt(" "), padded; also for prompts shorter than a blank."""
    around = open_model(folder).around
    cond = around.prompts(prompts)
    theirs, mask = pipeline.encode_prompt([" "])
    null = around.null(cond)
    assert mask is None and null["prompt_embeds"].shape == cond["prompt_embeds"].shape
    for row in range(len(prompts)):
        real = null["mask"][row].bool()
        torch.testing.assert_close(null["prompt_embeds"][row, real], theirs[0])
        assert not null["prompt_embeds"][row, ~real].any()


def test_some_rows_may_lose_their_condition(folder):
    """`dropped`: null in the chosen rows alone, of equal length."""
    role = denoiser(folder)
    cond = role.handle.around.prompts(PROMPTS)
    dropped = role.dropped(cond, torch.tensor([True, False]))
    for name in cond:
        assert torch.equal(dropped[name][1], cond[name][1])
        assert torch.equal(dropped[name][0], role.null(cond)[name][0])


# ---- pictures


def test_latents_are_standardised_by_channel(folder, pipeline):
    """(z - mean) / std of the VAE's posterior, one frame; with noise a sample of it."""
    around, vae = open_model(folder).around, pipeline.vae
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images[:, :, None]).latent_dist
    mean, std = (torch.tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    eps = torch.randn(3, *SHAPE)
    torch.testing.assert_close(around.encode(images), (posterior.mean[:, :, 0] - mean) / std)
    z = (posterior.mean + posterior.std * eps[:, :, None])[:, :, 0]
    torch.testing.assert_close(around.encode(images, eps), (z - mean) / std)


def test_decoded_latents_are_the_stock_pipelines_images(folder, pipeline, noise):
    """decode(x std + mean), whose gradient flows through the checkpointed decoder."""
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    said: dict[str, Any] = {"latents": patches(noise), "num_inference_steps": 2, **SIZE}
    made = latents(pipeline(PROMPTS, output_type="latent", **said).images, (8, 8))
    images = torch.from_numpy(pipeline(PROMPTS, output_type="np", **said).images).permute(0, 3, 1, 2)
    x = made.clone().requires_grad_()
    ours = open_model(folder).around.decode(x)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)
    ours.square().mean().backward()
    assert x.grad is not None and x.grad.any()
