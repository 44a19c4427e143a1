"""PixArt-Sigma shown as a flow network, against the stock pipeline that samples it; prompts; adapters; sizes; export."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, PixArtSigmaPipeline
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.exporting.grids import grid, same_pairs, trained_pairs
from fewstep.exporting.lora import LORA_FILE
from fewstep.exporting.pipeline import generate, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.maths.losses import mse_rows
from fewstep.maths.paths import VPPath
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import card, family_of, open_model
from fewstep.models.pixart_sigma import PIXART_SIGMA, PixArtSigmaFamily
from fewstep.nets.discriminator import Discriminator
from fewstep.roles import merged

from .exported import SHAPE, drawn, exported
from .flow_stock import off, student, with_module
from .stock import PROMPTS, denoiser, own, pretrained
from .tiny_pixart import LENGTH, SCHEDULER, tiny_pixart

SIZE: dict[str, Any] = {"height": 16, "width": 16, "use_resolution_binning": False}  # its table begins at 256 pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_pixart(tmp_path_factory.mktemp("tiny") / "pixart")


@pytest.fixture
def noise() -> Tensor:
    """Native noise for two rows."""
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def stock(folder: Path, kind: str = "ode", steps: int = 4, transformer: Any = None) -> Any:
    """diffusers' own pipeline with a few-step scheduler, maybe with another network."""
    pipeline = copy.copy(pretrained(folder))
    scheduler: Any = DDIMScheduler(**SCHEDULER, clip_sample=False, timestep_spacing="trailing")
    if kind == "renoise":
        lcm = {"original_inference_steps": steps, "timestep_scaling": 1e4, "clip_sample": False}
        scheduler = LCMScheduler(**SCHEDULER, **lcm)
    pipeline.register_modules(scheduler=scheduler, transformer=transformer or pipeline.transformer)
    return pipeline


def stock_latents(pipeline: Any, noise: Tensor, guidance: float, steps: int = 4, output: str = "latent") -> Any:
    """What the stock pipeline makes of native noise."""
    said = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": output, **SIZE}
    return pipeline(PROMPTS, latents=noise, generator=torch.Generator().manual_seed(7), **said).images


# ---- the stock pipeline's samples


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_flow_states_make_the_stock_pipelines_samples(folder, noise, guidance, kind):
    """y = x / (alpha + sigma) is exact, the learned variance is dropped, and so are conditions, null and guidance."""
    theirs = stock_latents(stock(folder, kind), noise, guidance)
    assert theirs.std() > 0.3
    assert off(own(denoiser(folder), noise, guidance, kind), theirs) < 1e-5


def test_a_wrong_parameterisation_half_or_text_would_show(folder, noise):
    """The parity above can fail: each flip is off by more than .01."""
    theirs, role = stock_latents(stock(folder), noise, 1.0), denoiser(folder)
    cond = role.handle.around.prompts(PROMPTS)
    assert off(own(role, noise, 1.0, cond=cond[torch.tensor([1, 0])]), theirs) > 1e-2
    assert off(own(denoiser(folder, VPPath(role.path.alphas_cumprod, "v_prediction")), noise, 1.0), theirs) > 1e-2
    role.family = Second()
    assert off(own(role, noise, 1.0), theirs) > 1e-2


class Second(PixArtSigmaFamily):
    """The other half of the channels."""

    def unpack(self, module: Any, output: Any, x: Tensor) -> Tensor:
        """The variance."""
        return output.sample[:, x.shape[1] :]


def test_the_loss_is_measured_in_eps_alone(folder, noise):
    """|| network's first half - eps ||^2 on the native state."""
    role, k = denoiser(folder), 600
    x0, cond, t = (
        torch.randn_like(noise),
        role.handle.around.prompts(PROMPTS),
        torch.full((2,), role.path.time(k / 1000)),
    )
    abar = torch.tensor(role.path.alphas_cumprod[k])
    texts = {"encoder_hidden_states": cond["prompt_embeds"], "encoder_attention_mask": cond["mask"]}
    with torch.no_grad():
        state = (abar.sqrt() * x0 + (1 - abar).sqrt() * noise).float()
        answer = role.handle.module(state, timestep=torch.full((2,), k), **texts).sample
        loss = role.denoising_loss(x0, noise, t, cond)
    assert answer.shape == (2, 8, 8, 8)
    torch.testing.assert_close(loss, mse_rows(answer[:, :4], noise), rtol=1e-4, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_the_pipeline_visits_the_trained_levels(folder, noise, steps, kind):
    """Whole labels 999, 749, ..., and the flow times that they stand for."""
    path, pipeline = open_model(folder).path, stock(folder, kind, steps)
    stock_latents(pipeline, noise, 1.0, steps)
    labels = pipeline.scheduler.timesteps.tolist()
    assert labels == [round(1000 * (1 - i / steps)) - 1 for i in range(steps)]
    visited = grid(pipeline.scheduler, "PixArtSigmaPipeline", steps)
    assert same_pairs(trained_pairs(path, path.grid(steps)), visited)


# ---- prompts and pictures


@pytest.mark.parametrize("prompts", [PROMPTS, ["", "A Bird"]])
def test_prompts_and_null_are_the_pipelines_own(folder, prompts):
    """300 tokens of small letters and the mask; no condition is the empty prompt, and a second time is no text."""
    around, theirs = open_model(folder).around, pretrained(folder)
    cond = around.prompts(prompts)
    null = around.null(cond.with_(s=torch.tensor([0.2, 0.4])))
    embeds, mask, none, none_mask = theirs.encode_prompt(prompts, True, clean_caption=False)
    for ours, wanted, wanted_mask in ((cond, embeds, mask), (null, none, none_mask)):
        torch.testing.assert_close(ours["prompt_embeds"], wanted)
        assert torch.equal(ours["mask"], wanted_mask) and wanted_mask.shape == (2, LENGTH)
    assert torch.equal(null["s"], torch.tensor([0.2, 0.4])) and null["mask"].sum(1).tolist() == [1, 1]
    small = around.prompts([text.lower() for text in prompts])
    assert torch.equal(small["prompt_embeds"], cond["prompt_embeds"])


@pytest.mark.parametrize(("installed", "read"), [(True, "a cat"), (False, "a <b>cat</b>")])
def test_texts_are_cleaned_where_the_pipeline_cleans_them(folder, monkeypatch, installed, read):
    """Its call does so where two packages are installed, and reads the text as it is without them."""
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma
    from diffusers.utils import import_utils

    for name in ("is_bs4_available", "is_ftfy_available"):
        monkeypatch.setattr(pipeline_pixart_sigma, name, lambda: installed)
        monkeypatch.setattr(import_utils, name, lambda: installed)
    clean = lambda _self, text: text.replace("<b>", "").replace("</b>", "")  # noqa: E731
    monkeypatch.setattr(PixArtSigmaPipeline, "_clean_caption", clean)
    around = open_model(folder).around
    wanted, _, _, _ = around.text_pipeline().encode_prompt([read], False, clean_caption=False)
    assert torch.equal(around.prompts(["a <b>cat</b>"])["prompt_embeds"], wanted)


def test_padding_is_not_attended_to(folder, noise):
    """A batch of padded texts is each row alone, cut to its text, to 1e-5; what stands in the padding does not count."""
    role, t = denoiser(folder), torch.tensor([0.3, 0.8])
    cond = role.handle.around.prompts(["a red cat", "two dogs, and a much longer text"])
    lengths = cond["mask"].sum(1).tolist()
    assert lengths[0] != lengths[1] and max(lengths) < LENGTH
    padding = (1 - cond["mask"])[..., None].float()
    with torch.no_grad():
        v = role.velocity(noise, t, cond)
        noisy = cond.with_(prompt_embeds=cond["prompt_embeds"] + padding * torch.randn(2, LENGTH, 32))
        torch.testing.assert_close(role.velocity(noise, t, noisy), v, atol=1e-5, rtol=1e-5)
        alone = [Cond(**{n: f[i : i + 1, :length] for n, f in cond.items()}) for i, length in enumerate(lengths)]
        single = [role.velocity(noise[i : i + 1], t[i : i + 1], one) for i, one in enumerate(alone)]
        torch.testing.assert_close(torch.cat(single), v, atol=1e-5, rtol=1e-5)
        read = role.velocity(noise, t, cond.with_(mask=torch.ones_like(cond["mask"])))
    assert off(read, v) > 1e-2


def test_decoded_latents_are_the_stock_pipelines_images(folder, noise):
    """decode(x / scale), whose gradient flows; encode is its inverse in latents."""
    pipeline, around = stock(folder), open_model(folder).around
    images = torch.from_numpy(stock_latents(pipeline, noise, 1.0, 2, "np")).permute(0, 3, 1, 2)
    x = stock_latents(pipeline, noise, 1.0, 2).clone().requires_grad_()
    ours = around.decode(x)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)
    ours.square().mean().backward()
    assert x.grad is not None and x.grad.any()
    with torch.no_grad():
        mean = pipeline.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(around.encode(images), mean * 0.13025)


def test_parts_are_what_the_stock_constructor_takes(folder, noise):
    """With network and scheduler they are the pipeline again."""
    loaded, theirs = open_model(folder), stock(folder)
    made = PixArtSigmaPipeline(transformer=loaded.module, scheduler=theirs.scheduler, **loaded.around.parts())
    made.set_progress_bar_config(disable=True)
    assert torch.equal(stock_latents(made, noise, 4.5, 2), stock_latents(theirs, noise, 4.5, 2))


# ---- roles


@pytest.mark.parametrize(("width", "layers"), [("default", 2 * 8), ("wide", 2 * 10)])
def test_adapters_reach_the_named_layers(folder, noise, width, layers):
    """Two attentions of 4 layers a block (wide: and 2 that feed forward); without the adapter a role is its base."""
    made = student(folder, tune="lora", lora={"rank": 2, "targets": width}, moved=0.1)
    base, t = denoiser(folder), torch.tensor([0.3, 0.8])
    cond = base.handle.around.prompts(PROMPTS)
    assert len(made.trainable()) == 2 * layers
    with torch.no_grad():
        wanted = base.velocity(noise, t, cond)
        assert torch.equal(with_module(made, made.handle.module).velocity(noise, t, cond), wanted)
        v = made.velocity(noise, t, cond)
        assert off(with_module(made, merged(made.handle)).velocity(noise, t, cond), v) < 1e-5 and off(v, wanted) > 1e-2


def test_features_are_tokens_of_a_square(folder, noise):
    """[rows, patches, width] of the named layers, which the heads of a discriminator read."""
    role, layers = denoiser(folder), tuple(PIXART_SIGMA.facts.feature_layers)
    features = role.features(noise, torch.full((2,), 0.5), role.handle.around.prompts(PROMPTS), layers)
    assert [f.shape for f in features] == [(2, 16, 16)] * 2
    assert Discriminator.reading(role, layers)(features).shape == (2,)


# ---- sizes and folders


def test_the_full_size_has_the_published_parameters():
    """0.611 B, counted without storage; the table is DDPM's, which ends at abar = 4e-5."""
    with torch.device("meta"):
        loaded = open_model("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    assert sum(p.numel() for p in loaded.module.parameters()) / 1e9 == pytest.approx(0.611, abs=5e-4)
    assert PIXART_SIGMA.row_shape(loaded.module) == (4, 128, 128)
    assert loaded.path.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)


def test_a_network_from_sizes_takes_the_size_of_the_data(folder):
    """Parts around it are borrowed, or asked for in one line; without a learned variance all channels are read."""
    built = PIXART_SIGMA.build(size="tiny", sample_size=4, num_layers=3, learned_sigma=False, around=str(folder))
    assert PIXART_SIGMA.row_shape(built.module) == (4, 4, 4) and len(built.module.transformer_blocks) == 3
    assert built.around.key() == open_model(folder).around.key() and built.module.config.out_channels == 4
    PIXART_SIGMA.fit(built.module, (4, 6, 8))
    assert PIXART_SIGMA.row_shape(built.module) == (4, 6, 8)
    role = Denoiser(with_module(denoiser(folder), built.module).handle, PIXART_SIGMA, built.path)
    blank = PIXART_SIGMA.blank(built.module)
    assert role.velocity(torch.randn(1, 4, 6, 8), torch.tensor([0.5]), blank).shape == (1, 4, 6, 8)
    with pytest.raises(UserError, match="load it from a pipeline folder"):
        PIXART_SIGMA.null(built.module, blank)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "xll"}, "unknown size 'xll': did you mean 'xl'"),
        ({"num_layer": 4}, "unknown key 'num_layer': did you mean 'num_layers'"),
        ({"sample_size": 7}, "sample_size=7"),
    ],
)
def test_wrong_sizes_are_named(said, message):
    """One line with the mend."""
    with pytest.raises(UserError, match=message):
        PIXART_SIGMA.build(**said)


def test_pipelines_from_elsewhere_are_recognised(folder):
    """Unless the network is told size and aspect ratio, as one of 128 latents is where the config does not say."""
    assert family_of(folder) == "pixart_sigma"
    config = {"_class_name": "PixArtTransformer2DModel", "sample_size": 128, "use_additional_conditions": False}
    silent = {name: value for name, value in config.items() if name != "use_additional_conditions"}
    assert PIXART_SIGMA.holds(config) and PIXART_SIGMA.holds({**silent, "sample_size": 64})
    assert not PIXART_SIGMA.holds(silent) and not PIXART_SIGMA.holds({**config, "use_additional_conditions": True})


def rewritten(folder: Path, out: Path, file: str, class_name: str) -> Path:
    """A copy of the folder with another class name in one of its configs."""
    shutil.copytree(folder, out)
    said = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps({**said, "_class_name": class_name}))
    return out


def test_configs_by_the_classs_first_name_are_read(folder, noise, tmp_path):
    """Published before PixArtTransformer2DModel was a class; a Transformer2DModel of another sort is no PixArt."""
    older = rewritten(folder, tmp_path / "older", "transformer/config.json", "Transformer2DModel")
    assert family_of(older) == "pixart_sigma" and type(open_model(older).module).__name__ == "PixArtTransformer2DModel"
    assert torch.equal(own(denoiser(older), noise, 1.0, steps=2), own(denoiser(folder), noise, 1.0, steps=2))
    with torch.device("meta"):
        assert open_model(older).module.config.caption_channels == 32
    assert not PIXART_SIGMA.holds({"_class_name": "Transformer2DModel", "norm_type": "layer_norm"})


def test_a_pipeline_of_pixart_alpha_is_refused(folder, tmp_path):
    """Its network may look the same, but it was shown shorter texts."""
    alpha = rewritten(folder, tmp_path / "alpha", "model_index.json", "PixArtAlphaPipeline")
    with pytest.raises(UserError, match="is PixArt-alpha, which reads 120 tokens"):
        open_model(alpha)


# ---- export


@pytest.mark.parametrize("kind", ["ode", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_exported_stock_pipeline_makes_the_solvers_images(folder, tmp_path, kind, steps):
    """Config alone, asked for N steps: labels 999, 749, ...; noise in the sampler's order."""
    out, images = exported(denoiser(folder), tmp_path / "m", kind, steps)
    theirs = load_pipeline(out, device="cpu")
    assert type(theirs).__name__ == "PixArtSigmaPipeline"
    torch.testing.assert_close(drawn(theirs, steps), images, atol=1e-4, rtol=0)
    assert theirs.scheduler.timesteps.tolist() == [round(1000 * (1 - i / steps)) - 1 for i in range(steps)]
    again = open_model(out).path
    assert again.alphas_cumprod == pytest.approx(denoiser(folder).path.alphas_cumprod, rel=1e-9)


def test_guidance_is_said_to_the_exported_pipeline(folder, tmp_path):
    """1 where a student needs none, for the pipeline's default is 4.5; or a student's own, in two passes a step."""
    out, images = exported(denoiser(folder), tmp_path / "m")
    made = generate(out, 2, prompts=PROMPTS)
    assert (made.images / 255 - images).abs().max() <= 0.5 / 255 + 1e-4 and made.nfe == 2
    assert "guidance_scale=1" in (out / "README.md").read_text() and "height=16" in (out / "README.md").read_text()
    own, wanted = exported(denoiser(folder), tmp_path / "own", guidance=3.0)
    assert card(own)["guidance_scale"] == "cfg" and (wanted - images).abs().max() > 1e-2
    assert (drawn(load_pipeline(own, device="cpu"), 2, 3.0) - wanted).abs().max() < 1e-4


def test_an_adapter_is_exported_merged(folder, tmp_path):
    """No stock loader knows the class, so the folder's network has it inside; its file lies beside, in peft's layout."""
    out, images = exported(student(folder, tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1), tmp_path / "m")
    base = stock(folder)
    base.scheduler = load_pipeline(out, device="cpu").scheduler
    assert (drawn(load_pipeline(out, device="cpu"), 2) - images).abs().max() < 1e-4
    assert (drawn(base, 2) - images).abs().max() > 1e-3
    assert (out / LORA_FILE).is_file() and not hasattr(PixArtSigmaPipeline, "load_lora_weights")
    said = (out / "README.md").read_text()
    assert "no loader of PixArtSigmaPipeline reads" in said and "load_lora_weights" not in said


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_images(folder, tmp_path):
    """Only diffusers, without fewstep."""
    out, images = exported(student(folder, moved=0.02), tmp_path / "m", "renoise")
    draw = Draw.for_images(0, range(2))
    start, renoise = draw.normal("rollout.start", *SHAPE), [draw.normal("rollout.0", *SHAPE)]
    assert reload_check(out, 2 * images - 1, start, renoise=renoise, prompts=PROMPTS) < 1e-4
