"""Guidance as an input of Stable Diffusion networks: `timestep_cond`, as the stock pipelines feed it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.models.folder import open_model
from fewstep.models.registry import FAMILIES
from fewstep.models.stable_diffusion import guidance_embedding
from fewstep.nets.extra_inputs import folded

from .stock import PROMPTS, denoiser, latents, own, stock
from .tiny_sd import KINDS, tiny_sd


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each kind."""
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny_sd(root / kind, kind) for kind in KINDS}


@pytest.fixture
def noise() -> Tensor:
    """Native noise for two rows."""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_guidance_is_embedded_as_sine_and_cosine():
    """e(w) at w = 7.5, width 256: sin(1000 w f_i), cos(1000 w f_i)."""
    e = guidance_embedding(torch.tensor([8.5]), 256)[0]
    torch.testing.assert_close(e[:3], torch.tensor([-0.851236, 0.842228, 0.011820]), atol=2e-4, rtol=0)
    torch.testing.assert_close(e[128:131], torch.tensor([-0.524783, 0.539121, -0.999930]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("width", [16, 255, 256])
def test_the_embedding_is_that_of_the_stock_pipeline(folders, width):
    """Also for scales whose float32 minus 1 is not the float32 of their difference (8.4)."""
    scales = [1.0, 1.1, 3.3, 7.5, 8.4, 14.9]
    theirs = stock(folders["sd15"]).get_guidance_scale_embedding(torch.tensor([s - 1 for s in scales]), width)
    torch.testing.assert_close(guidance_embedding(torch.tensor(scales), width), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_an_embedded_guidance_means_what_the_stock_pipeline_makes_of_it(folders, noise, kind):
    """One call a step, fed guidance_scale - 1."""
    role = denoiser(folders[kind])
    role.family.upgrade(role.handle.module, ["guidance"])
    torch.nn.init.normal_(role.handle.module.time_embedding.cond_proj.weight, std=0.3)
    told = role.handle.around.prompts(PROMPTS).with_(guidance=torch.full((2,), 8.4))
    ours = own(role, noise, 1.0, "renoise", cond=told)
    pipeline = stock(folders[kind], "lcm", role.handle.module)
    torch.testing.assert_close(ours, latents(pipeline, noise, 8.4), atol=1e-4, rtol=1e-5)
    assert (ours - latents(pipeline, noise, 3.0)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_an_upgraded_network_answers_as_before_and_learns_its_input(folders, noise, kind):
    """A zero projection adds nothing, bit for bit, and its gradient is not zero."""
    role = denoiser(folders[kind])
    cond, t = role.handle.around.prompts(PROMPTS), torch.full((2,), 0.5)
    before = role.output(noise, t, cond).detach()
    upgraded = role.family.upgrade(role.handle.module, ("guidance",))
    told = cond.with_(guidance=torch.tensor([4.0, 9.0]))
    after = role.output(noise, t, told)
    assert upgraded is role.handle.module and torch.equal(after, before)
    assert torch.equal(role.output(noise, t, cond), before)
    after.square().mean().backward()
    assert upgraded.time_embedding.cond_proj.weight.grad.abs().max() > 0


def test_an_upgraded_network_is_saved_and_loaded_with_its_input(folders, noise, tmp_path):
    """The stock class's config names the input's width."""
    role = denoiser(folders["sd15"])
    module = role.family.upgrade(role.handle.module, ("guidance",))
    torch.nn.init.normal_(module.time_embedding.cond_proj.weight)
    tiny_sd(tmp_path / "again")
    role.family.save(module, tmp_path / "again")
    again = denoiser(tmp_path / "again")
    told = role.handle.around.prompts(PROMPTS).with_(guidance=torch.tensor([4.0, 9.0]))
    t = torch.full((2,), 0.5)
    assert json.loads((tmp_path / "again/unet/config.json").read_text())["time_cond_proj_dim"] == 256
    assert torch.equal(again.output(noise, t, told), role.output(noise, t, told))


def test_a_second_upgrade_changes_nothing(folders):
    """The trained projection is kept."""
    module = open_model(folders["sd15"]).module
    family = FAMILIES.get("stable_diffusion")
    weight = family.upgrade(module, ("guidance",)).time_embedding.cond_proj.weight
    assert family.upgrade(module, ("guidance",)).time_embedding.cond_proj.weight is weight


def test_other_inputs_join_the_time_embedding_and_fold_away(folders, noise):
    """A duration beside the guidance: as before at first, and for constant values a stock network again."""
    role, t = denoiser(folders["sd15"]), torch.full((2,), 0.5)
    cond = role.handle.around.prompts(PROMPTS)
    before = role.output(noise, t, cond)
    role.family.upgrade(role.handle.module, ("delta", "guidance"))
    told = cond.with_(delta=torch.full((2,), 0.8), guidance=torch.full((2,), 4.0))
    assert torch.equal(role.output(noise, t, told), before)
    for embedding in role.handle.module.extra_inputs.embeddings.values():
        torch.nn.init.normal_(embedding[2].weight, std=0.3)
    after = role.output(noise, t, told)
    assert (after - before).abs().max() > 1e-3
    role.handle.module = folded(role.handle.module, {"delta": 0.8, "guidance": 4.0})
    torch.testing.assert_close(role.output(noise, t, cond), after, atol=1e-5, rtol=1e-5)


def test_a_network_without_the_input_does_not_see_the_guidance(folders, noise):
    """So a discriminator on the teacher judges a guided student's condition unchanged."""
    role, t = denoiser(folders["sd15"]), torch.full((2,), 0.5)
    cond = role.handle.around.prompts(PROMPTS)
    assert torch.equal(role.output(noise, t, cond.with_(guidance=torch.ones(2))), role.output(noise, t, cond))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_sealed_network_gives_one_image_whatever_guidance_is_asked_for(folders, noise, kind):
    """The stock pipeline doubles no batch for it; its own default of 7.5 (5.0) would else guide a distilled student."""
    role = denoiser(folders[kind])
    module = role.handle.module
    sealed = stock(folders[kind], "lcm", role.family.sealed(module))
    plain = own(role, noise, 1.0, "renoise")
    images = [latents(sealed, noise, scale) for scale in (0.0, 1.0, 7.5)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[1], images[2])
    torch.testing.assert_close(images[0], plain, atol=1e-4, rtol=1e-5)
    assert module.time_embedding.cond_proj is None and module.config.time_cond_proj_dim is None
    assert (latents(stock(folders[kind], "lcm"), noise, 7.5) - plain).abs().max() > 1e-2


def test_sealing_silences_an_input_that_was_never_told(folders):
    """A random projection, as older networks carry, is zeroed in the copy and kept in the original."""
    role = denoiser(folders["sd15"])
    module = role.family.upgrade(role.handle.module, ("guidance",))
    torch.nn.init.normal_(module.time_embedding.cond_proj.weight)
    sealed = role.family.sealed(module)
    assert not sealed.time_embedding.cond_proj.weight.any() and module.time_embedding.cond_proj.weight.any()


def test_families_without_such_a_default_have_nothing_to_seal():
    """A pixel UNet is exported as it is."""
    family = FAMILIES.get("unet2d")
    module = family.build(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4).module
    assert family.sealed(module) is module
