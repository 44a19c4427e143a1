"""VAE, text encoders and tokenizers around a latent network, against the stock pipelines."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.models.folder import open_model
from fewstep.models.registry import FAMILIES

from .tiny_sd import KINDS, tiny_sd

PROMPTS = ["a red cat", "2 dogs?", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each kind."""
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny_sd(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def stock(folders: dict[str, Path]) -> dict[str, Any]:
    """diffusers' own pipelines."""
    made = {kind: DiffusionPipeline.from_pretrained(f, use_safetensors=True) for kind, f in folders.items()}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


def around(folder: Path) -> Any:
    """What is around the network of a folder."""
    return open_model(folder).around


def pictures(rows: int = 3, size: int = 16) -> Tensor:
    """[rows, 3, size, size] in [-1, 1]"""
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- pictures


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_latents_are_the_posterior_times_the_scaling_factor(folders, stock, kind):
    """(mean + std noise) scale, with the mean alone when there is no noise."""
    vae, images, noise = stock[kind].vae, pictures(), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    scale = {"sd15": 0.18215, "sdxl": 0.13025}[kind]
    torch.testing.assert_close(around(folders[kind]).encode(images), posterior.mean * scale)
    sampled = around(folders[kind]).encode(images, noise)
    torch.testing.assert_close(sampled, (posterior.mean + posterior.std * noise) * scale)
    assert (sampled - posterior.mean * scale).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_latents_are_the_stock_pipelines_images(folders, stock, kind):
    """decode(x / scale), in [-1, 1] before the pipeline's postprocessing."""
    given: dict[str, Any] = {"num_inference_steps": 2, "latents": torch.randn(2, 4, 8, 8)}
    latents = stock[kind](PROMPTS[:2], output_type="latent", **given).images
    images = torch.from_numpy(stock[kind](PROMPTS[:2], output_type="np", **given).images).permute(0, 3, 1, 2)
    ours = around(folders[kind]).decode(latents)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)


def test_a_shift_is_taken_off_and_put_back(folders):
    """x = (z - shift) scale."""
    here = around(folders["sd15"])
    plain, scale = here.encode(pictures()), here.part("vae").config.scaling_factor
    picture = here.decode(plain)
    here.part("vae").register_to_config(shift_factor=0.25)
    torch.testing.assert_close(here.encode(pictures()), plain - 0.25 * scale)
    torch.testing.assert_close(here.decode(plain - 0.25 * scale), picture)


def gradient(here: Any, latents: Tensor) -> Tensor:
    """Of a function of the decoded images in the latents."""
    latents = latents.clone().requires_grad_()
    here.decode(latents).square().mean().backward()
    assert latents.grad is not None
    return latents.grad


def test_parts_of_a_batch_give_the_images_and_gradients_of_the_whole(folders):
    """The VAE sees one row at a time when a row has more pixels than allowed."""
    here, latents = around(folders["sd15"]), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        whole, z = here.decode(latents), here.encode(pictures())
    wanted = gradient(here, latents)
    here.pixels_at_once = 2 * 16 * 16
    torch.testing.assert_close(here.decode(latents), whole)
    torch.testing.assert_close(here.encode(pictures()), z)
    torch.testing.assert_close(gradient(here, latents), wanted)
    assert wanted.abs().max() > 0


@pytest.mark.parametrize(("rows", "largest"), [(1, 1), (2, 2), (3, 3)])
def test_the_decoders_memory_is_that_of_its_largest_part(folders, rows, largest):
    """What the graph keeps between forward and backward is the latents, and each part is decoded twice."""
    here, seen = around(folders["sd15"]), []
    here.pixels_at_once = rows * 16 * 16
    hook = here.part("vae").decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    latents = torch.randn(4, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = here.decode(latents)
    forward = list(seen)
    images.sum().backward()
    hook.remove()
    assert max(forward) == largest and sum(forward) == 4 and sorted(seen[len(forward) :]) == sorted(forward)
    assert sum(kept) <= 2 * latents.numel()


def test_nothing_is_kept_when_no_gradient_is_asked_for(folders):
    """A sampler's decoding has no graph."""
    here = around(folders["sd15"])
    assert not here.decode(torch.randn(1, 4, 8, 8)).requires_grad
    with torch.no_grad():
        assert not here.decode(torch.randn(1, 4, 8, 8, requires_grad=True)).requires_grad


# ---- prompts


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_prompts_and_null_are_the_pipelines_own(folders, stock, kind):
    """The empty prompt stands for no condition."""
    here = around(folders[kind])
    embeds, negative = stock[kind].encode_prompt(PROMPTS, "cpu", 1, True)
    cond = here.prompts(PROMPTS)
    assert set(cond) == {"prompt_embeds"} and torch.equal(cond["prompt_embeds"], embeds)
    torch.testing.assert_close(here.null(cond)["prompt_embeds"], negative)
    assert torch.equal(here.null(cond)["prompt_embeds"], here.prompts([""])["prompt_embeds"].expand(3, -1, -1))


def test_xl_has_pooled_prompts_and_picture_sizes(folders, stock):
    """No condition is zeros for both texts; the sizes stay."""
    here = around(folders["sdxl"])
    embeds, negative, pooled, no_pooled = stock["sdxl"].encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    cond = here.prompts(PROMPTS)
    null = here.null(cond)
    assert torch.equal(cond["prompt_embeds"], embeds) and torch.equal(cond["pooled"], pooled)
    assert torch.equal(null["prompt_embeds"], negative) and torch.equal(null["pooled"], no_pooled)
    sizes = stock["sdxl"]._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, 16)
    assert torch.equal(cond["time_ids"], sizes.repeat(3, 1)) and torch.equal(null["time_ids"], cond["time_ids"])


def test_xl_encodes_the_empty_prompt_where_the_pipeline_does(folders, tmp_path):
    """force_zeros_for_empty_prompt off."""
    folder = shutil.copytree(folders["sdxl"], tmp_path / "xl")
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    here, theirs = around(folder), DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    cond = here.prompts(PROMPTS)
    _, negative, _, no_pooled = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    torch.testing.assert_close(here.null(cond)["prompt_embeds"], negative)
    torch.testing.assert_close(here.null(cond)["pooled"], no_pooled)
    assert here.parts()["force_zeros_for_empty_prompt"] is False


def test_other_fields_of_a_condition_survive(folders):
    """An embedded guidance is no text."""
    here = around(folders["sd15"])
    cond = here.prompts(PROMPTS).with_(guidance=torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(here.null(cond)["guidance"], cond["guidance"])


# ---- parts


def test_parts_are_loaded_when_they_are_asked_for_and_frozen(folders, tmp_path):
    """A folder whose VAE is no VAE opens; asking for it is what fails."""
    folder = shutil.copytree(folders["sd15"], tmp_path / "sd")
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    here = around(folder)
    encoder = here.part("text_encoder")
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(UserError, match="cannot load AutoencoderKL from"):
        here.decode(torch.zeros(1, 4, 8, 8))


def test_loading_a_part_takes_no_random_numbers(folders):
    """A resumed run loads at another moment and must draw the same dropout."""
    here, before = around(folders["sdxl"]), torch.get_rng_state()
    here.parts()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("part", "ask"),
    [
        ("vae", lambda here: here.decode(torch.zeros(1, 4, 8, 8))),
        ("vae", lambda here: here.encode(torch.zeros(1, 3, 16, 16))),
        ("text_encoder", lambda here: here.prompts(["a"])),
        ("text_encoder_2", lambda here: here.prompts(["a"])),
        ("tokenizer", lambda here: here.prompts(["a"])),
        ("tokenizer_2", lambda here: here.prompts(["a"])),
    ],
)
def test_a_missing_part_is_named_with_its_mend_and_copying_it_is_enough(folders, tmp_path, part, ask):
    """Raised when it is asked for; the rest still works."""
    folder = shutil.copytree(folders["sdxl"], tmp_path / "xl")
    shutil.move(folder / part, tmp_path / "aside")
    here = around(folder)
    with pytest.raises(UserError, match=f"'{folder}' has no {part}/: copy the pipeline's {part} folder there"):
        ask(here)
    assert here.parts()[part] is None
    shutil.move(tmp_path / "aside", folder / part)
    ask(around(folder))


def test_an_absent_package_is_named(folders, monkeypatch):
    """transformers comes with an extra."""
    here = around(folders["sd15"])
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(UserError, match=r"text_encoder needs transformers.*pip install 'fewstep\[text\]'"):
        here.part("text_encoder")


def test_a_network_built_from_sizes_has_nothing_around_it():
    """Its latents can't be decoded, and it is told from where they could."""
    built = FAMILIES.get("stable_diffusion").build(size="tiny").around
    with pytest.raises(UserError, match="built from sizes has no vae: write `from: FOLDER`"):
        built.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(UserError, match="built from sizes has no text_encoder: write `from: FOLDER`"):
        built.null(Cond(prompt_embeds=torch.zeros(1, 12, 16)))


@pytest.mark.parametrize(("kind", "pipeline"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)])
def test_parts_are_what_the_stock_constructor_takes(folders, stock, kind, pipeline):
    """With network and scheduler they are the pipeline again."""
    loaded = open_model(folders[kind])
    made = pipeline(unet=loaded.module, scheduler=stock[kind].scheduler, **loaded.around.parts())
    made.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"num_inference_steps": 2, "latents": torch.randn(2, 4, 8, 8), "output_type": "np"}
    assert (made(PROMPTS[:2], **given).images == stock[kind](PROMPTS[:2], **given).images).all()


def test_the_key_follows_the_weights_around_the_network(folders, tmp_path):
    """Equal for a copy and for another network, different for another VAE."""
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    assert around(copied).key() == around(folders["sd15"]).key()
    open_model(tiny_sd(tmp_path / "other", seed=1)).module.save_pretrained(copied / "unet")
    assert around(copied).key() == around(folders["sd15"]).key()
    shutil.rmtree(copied / "vae")
    shutil.copytree(tmp_path / "other/vae", copied / "vae")
    assert around(copied).key() != around(folders["sd15"]).key()
