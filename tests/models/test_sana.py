"""What SANA alone has: an instruction before each prompt, a mask, a scaled label, an autoencoder without posterior."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.data.batch import Cond
from fewstep.models.folder import family_of, open_model
from fewstep.models.registry import FAMILIES

from .flow_stock import denoiser, euler, latents, pretrained, scheduled
from .tiny_sana import tiny_sana

PROMPTS = ["a red cat", "2 dogs?", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_sana(tmp_path_factory.mktemp("tiny") / "sana")


def test_prompts_and_null_are_the_pipelines_own(folder):
    """The pipeline's default instruction goes before a prompt, and not before the default negative prompt."""
    around, told = open_model(folder).around, []
    pipeline = pretrained(folder)
    encode = pipeline.encode_prompt
    pipeline.encode_prompt = lambda *a, **k: told.append(encode(*a, **k)) or told[-1]
    latents(pipeline, torch.randn(2, 4, 8, 8), 3.0, 1)
    del pipeline.encode_prompt
    embeds, mask, negative, no_mask = told[0]
    cond = around.prompts(["a red cat", "2 dogs?"])
    null = around.null(cond)
    assert set(cond) == {"prompt_embeds", "mask"}
    assert torch.equal(cond["prompt_embeds"], embeds) and torch.equal(cond["mask"], mask)
    torch.testing.assert_close(null["prompt_embeds"], negative)
    assert torch.equal(null["mask"], no_mask) and 0 < null["mask"].sum() < cond["mask"].sum()


def test_padding_is_not_read(folder):
    """A masked prompt equals the trimmed one, and what stands in the padding does not matter."""
    role, x, t = denoiser(folder), torch.randn(1, 4, 8, 8), torch.tensor([0.6])
    cond = role.handle.around.null(role.handle.around.prompts(["a"]))
    kept = int(cond["mask"].sum())
    noise = torch.randn_like(cond["prompt_embeds"])
    filled = torch.where(cond["mask"][..., None] > 0, cond["prompt_embeds"], noise)
    trimmed = Cond(prompt_embeds=cond["prompt_embeds"][:, :kept], mask=cond["mask"][:, :kept])
    with torch.no_grad():
        wanted = role.velocity(x, t, cond)
        torch.testing.assert_close(role.velocity(x, t, trimmed), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(role.velocity(x, t, cond.with_(prompt_embeds=filled)), wanted, atol=1e-5, rtol=1e-5)
        unmasked = role.velocity(x, t, cond.with_(mask=torch.ones_like(cond["mask"]), prompt_embeds=filled))
    assert (unmasked - wanted).abs().max() > 1e-3


def test_the_label_has_the_networks_own_scale(tmp_path):
    """1000 t timestep_scale, as the stock pipeline feeds it."""
    folder = tiny_sana(tmp_path / "sana", timestep_scale=0.001)
    pipeline, role, noise = scheduled(folder), denoiser(folder), torch.randn(2, 4, 8, 8)
    theirs = latents(pipeline, noise, 1.0)
    torch.testing.assert_close(euler(role, pipeline.scheduler, noise, 1.0), theirs, atol=1e-5, rtol=1e-5)
    fed = role.family.pack(
        role.handle.module, noise, torch.tensor([500.0, 900.0]), role.handle.around.prompts(["a", "b"])
    )
    torch.testing.assert_close(fed["timestep"], torch.tensor([0.5, 0.9]))


def test_latents_are_encoded_without_a_posterior(folder):
    """encode(images) .41407, whatever noise is offered; parts of a batch give what the whole gives."""
    around, images = open_model(folder).around, torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        wanted = pretrained(folder).vae.encode(images).latent * 0.41407
    torch.testing.assert_close(around.encode(images), wanted)
    around.pixels_at_once = 32 * 32
    torch.testing.assert_close(around.encode(images, torch.randn(3, 4, 8, 8)), wanted)


def test_pixels_a_latent(folder):
    """From the autoencoder's levels; 32 where there is none."""
    assert open_model(folder).around.factor == 4
    assert FAMILIES.get("sana").build(size="tiny").around.factor == 32


def test_a_network_with_embedded_guidance_is_another_family(folder, tmp_path):
    """SANA-Sprint's pipeline is another one: it is not taken for SANA."""
    copied = shutil.copytree(folder, tmp_path / "sprint")
    file = copied / "transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": True}))
    assert (family_of(folder), family_of(copied)) == ("sana", "sana_sprint")


def test_prompts_do_not_depend_on_their_neighbours(folder):
    """All are padded to one length, and the mask says how far each goes."""
    around = open_model(folder).around
    together, alone = around.prompts(PROMPTS), [around.prompts([prompt]) for prompt in PROMPTS]
    assert torch.equal(together["mask"], Cond.cat(alone)["mask"])
    torch.testing.assert_close(together["prompt_embeds"], Cond.cat(alone)["prompt_embeds"])
