"""Lumina-Image 2.0 shown as a flow network, against the stock pipeline that samples it; prompts; adapters; sizes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.engine.activations import _as_on_a_gpu
from fewstep.errors import UserError
from fewstep.exporting.grids import same_pairs, trained_pairs
from fewstep.exporting.lora import LORA_FILE, save_lora
from fewstep.exporting.pipeline import generate, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import target_for
from fewstep.maths.guidance import guided
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import family_of, open_model
from fewstep.models.lumina2 import LUMINA2
from fewstep.nets.discriminator import Discriminator
from fewstep.roles import merged

from .exported import SHAPE, drawn, exported
from .flow_stock import PROMPTS, denoiser, off, pretrained, student, with_module
from .tiny_lumina2 import LENGTH, SHIFT, SYSTEM, tiny_lumina2

SIZE = (64, 64)  # its autoencoder makes 8 pixels of a latent
Velocity = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_lumina2(tmp_path_factory.mktemp("tiny") / "lumina2")


@pytest.fixture
def noise() -> Tensor:
    """Two rows."""
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def stock(folder: Path, transformer: Any = None, shift: float = SHIFT) -> Any:
    """diffusers' own pipeline with a scheduler of its own, maybe with another network."""
    pipeline = copy.copy(pretrained(folder))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline.register_modules(scheduler=scheduler, transformer=transformer or pipeline.transformer)
    return pipeline


def stock_latents(pipeline: Any, noise: Tensor, guidance: float, steps: int = 4, **said: Any) -> Tensor:
    """What the stock pipeline makes of noise, at its own size; guided without its rescaling unless `said`."""
    said = {"cfg_normalization": False, "num_inference_steps": steps, "output_type": "latent", **said}
    return pipeline(PROMPTS, latents=noise, guidance_scale=guidance, **said).images


@torch.no_grad()
def euler(scheduler: Any, x: Tensor, velocity: Velocity) -> Tensor:
    """x <- x + (t' - t) v over the levels that the pipeline left in its scheduler."""
    for t, t_next in itertools.pairwise(scheduler.sigmas.tolist()):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x


def asked(role: Denoiser, scale: float = 1.0) -> Velocity:
    """The role's velocity for the prompts, guided in the usual way."""
    cond = role.handle.around.prompts(PROMPTS)
    return lambda x, t: guided(role, x, t, cond, scale)


# ---- the stock pipeline's samples


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("shift", [SHIFT, 1.0])
def test_euler_is_the_stock_pipeline(folder, noise, scale, shift):
    """v = -output, fed 1 - t; guided against the pipeline's own default negative prompt."""
    pipeline = stock(folder, shift=shift)
    theirs = stock_latents(pipeline, noise, scale)
    assert theirs.std() > 0.3
    assert off(euler(pipeline.scheduler, noise, asked(denoiser(folder), scale)), theirs) < 1e-5


def test_a_wrong_sign_time_or_unit_would_show(folder, noise):
    """The parity above can fail: each flip is off by more than .01."""
    pipeline = stock(folder)
    theirs = stock_latents(pipeline, noise, 1.0)
    role = denoiser(folder)
    cond = role.handle.around.prompts(PROMPTS)
    swapped, bare = cond[torch.tensor([1, 0])], role.null(cond)
    wrong: list[Velocity] = [
        lambda x, t: -role.velocity(x, t, cond),
        lambda x, t: role.velocity(x, 1 - t, cond),
        lambda x, t: role.velocity(x, 1 - 1000 * (1 - t), cond),  # a label of 0 .. 1000
        lambda x, t: role.velocity(x, t, swapped),
        lambda x, t: role.velocity(x, t, bare),
        lambda x, t: role.velocity(x.mT, t, cond).mT,
    ]
    assert all(off(euler(pipeline.scheduler, noise, w), theirs) > 1e-2 for w in wrong)


def test_the_pipelines_own_guidance_is_another_one(folder, noise):
    """Unless it is told, it rescales rows of pixels; cfg_trunc_ratio leaves guidance out of the last steps."""
    role, pipeline, scale = denoiser(folder), stock(folder), 4.0
    cond = role.handle.around.prompts(PROMPTS)
    free = role.null(cond)

    def rescaled(x: Tensor, t: Tensor) -> Tensor:
        tied, both = role.velocity(x, t, cond), guided(role, x, t, cond, scale)
        return both * tied.norm(dim=-1, keepdim=True) / both.norm(dim=-1, keepdim=True)

    def early(x: Tensor, t: Tensor) -> Tensor:
        at = pipeline.scheduler.sigmas.tolist().index(t[0].item())
        tied = role.velocity(x, t, cond)
        return tied if at >= 2 else tied + (scale - 1) * (tied - role.velocity(x, t, free))

    plain = stock_latents(pipeline, noise, scale)
    for said, ours in (({"cfg_normalization": True}, rescaled), ({"cfg_trunc_ratio": 0.5}, early)):
        theirs = stock_latents(pipeline, noise, scale, **said)
        assert off(euler(pipeline.scheduler, noise, ours), theirs) < 1e-5 and off(theirs, plain) > 1e-2
    assert role.family.facts.guidance_rescale == "norm"


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_static_shift_makes_the_pipeline_visit_the_trained_levels(folder, noise, steps):
    """Labels and sigmas after the pipeline ran are the path's own, though it also hands over a shift by size."""
    path = open_model(folder).path
    assert path == FlowPath(shift=SHIFT, num_train_timesteps=1000)
    pipeline = stock(folder, shift=path.shift)
    stock_latents(pipeline, noise, 1.0, steps)
    visited = list(zip(pipeline.scheduler.timesteps.tolist(), pipeline.scheduler.sigmas[:-1].tolist()))
    assert same_pairs(trained_pairs(path, path.grid(steps)), visited)


# ---- prompts and pictures


def test_prompts_are_the_pipelines_own_with_its_system_prompt(folder):
    """Last but one states of 256 tokens; the mask says where there is text, which begins with the system prompt."""
    around, theirs = open_model(folder).around, pretrained(folder)
    cond = around.prompts(PROMPTS)
    embeds, mask, _, _ = theirs.encode_prompt(PROMPTS, False)
    torch.testing.assert_close(cond["prompt_embeds"], embeds)
    assert torch.equal(cond["mask"], mask) and cond["mask"].shape == (2, LENGTH)
    told = [len(theirs.tokenizer(f"{SYSTEM} {text}").input_ids) for text in PROMPTS]
    assert cond["mask"].sum(1).tolist() == told and min(told) > len(SYSTEM.split())
    bare = [len(theirs.tokenizer(text).input_ids) for text in PROMPTS]
    assert [a - b for a, b in zip(told, bare)] == [len(SYSTEM.split())] * 2


def test_no_condition_is_the_pipelines_default_negative(folder):
    """The empty prompt without the system prompt, which is one token; a second time is no text."""
    around, theirs = open_model(folder).around, pretrained(folder)
    null = around.null(around.prompts(PROMPTS).with_(s=torch.tensor([0.2, 0.4])))
    _, _, embeds, mask = theirs.encode_prompt(PROMPTS, True)
    torch.testing.assert_close(null["prompt_embeds"], embeds)
    assert torch.equal(null["mask"], mask) and torch.equal(null["s"], torch.tensor([0.2, 0.4]))
    assert null["mask"].sum(1).tolist() == [1, 1]
    assert (null["prompt_embeds"][0] - around.prompts([""])["prompt_embeds"][0]).abs().max() > 1e-2


def test_padding_is_not_attended_to(folder, noise):
    """A batch of padded texts is each row alone, cut to its text, to 1e-5; what stands in the padding does not count."""
    role, t = denoiser(folder), torch.tensor([0.3, 0.8])
    cond = role.handle.around.prompts(["a red cat", "two dogs, and a much longer text"])
    lengths = cond["mask"].sum(1).tolist()
    assert lengths[0] != lengths[1] and max(lengths) < LENGTH
    padding = (1 - cond["mask"])[..., None].float()
    with torch.no_grad():
        v = role.velocity(noise, t, cond)
        noisy = cond.with_(prompt_embeds=cond["prompt_embeds"] + padding * torch.randn(2, LENGTH, 16))
        torch.testing.assert_close(role.velocity(noise, t, noisy), v, atol=1e-5, rtol=1e-5)
        alone = [Cond(**{n: f[i : i + 1, :length] for n, f in cond.items()}) for i, length in enumerate(lengths)]
        single = [role.velocity(noise[i : i + 1], t[i : i + 1], one) for i, one in enumerate(alone)]
        torch.testing.assert_close(torch.cat(single), v, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(role.velocity(noise, t, Cond.cat(alone)), v, atol=1e-5, rtol=1e-5)
        read = role.velocity(noise, t, cond.with_(mask=torch.ones_like(cond["mask"])))
    assert off(read, v) > 1e-2


def test_decoded_latents_are_the_stock_pipelines_images(folder, noise):
    """decode(x / scale + shift), whose gradient flows; encode is its inverse in latents."""
    pipeline, around = stock(folder), open_model(folder).around
    made = stock_latents(pipeline, noise, 1.0, 2)
    images = torch.from_numpy(stock_latents(pipeline, noise, 1.0, 2, output_type="np")).permute(0, 3, 1, 2)
    x = made.clone().requires_grad_()
    ours = around.decode(x)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)
    ours.square().mean().backward()
    assert x.grad is not None and x.grad.any() and around.factor == 8
    with torch.no_grad():
        mean = pipeline.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(around.encode(images), (mean - 0.1159) * 0.3611)


def test_parts_are_what_the_stock_constructor_takes(folder, noise):
    """With network and scheduler they are the pipeline again."""
    loaded, theirs = open_model(folder), stock(folder)
    made = Lumina2Pipeline(transformer=loaded.module, scheduler=theirs.scheduler, **loaded.around.parts())
    made.set_progress_bar_config(disable=True)
    assert torch.equal(stock_latents(made, noise, 4.0, 2), stock_latents(theirs, noise, 4.0, 2))


# ---- roles


@pytest.mark.parametrize(("width", "layers"), [("default", 6 * 4), ("wide", 6 * 7)])
def test_adapters_reach_the_named_layers(folder, width, layers):
    """Two blocks of text, two of the picture, two of both; of 4 (wide: 7) layers. Never an embedding or a modulation."""
    made = student(folder, tune="lora", lora={"rank": 2, "targets": width})
    names = {name.split(".")[1] for name in made.trainable()}
    assert len(names) == layers and len(made.trainable()) == 2 * layers
    assert all("/attn/" in name or "/feed_forward/" in name for name in names)


@pytest.mark.parametrize("targets", ["default", "wide"])
def test_the_stock_loader_reads_an_adapter(folder, noise, tmp_path, targets):
    """The adapter's file on the base makes the merged network's images; unloaded, the base is back to the bit."""
    made = student(folder, tune="lora", lora={"rank": 2, "alpha": 4, "targets": targets}, moved=0.1)
    save_lora(made.handle.adapter, LUMINA2.facts.lora_prefix, tmp_path / LORA_FILE, {})
    pipeline = Lumina2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    before = stock_latents(pipeline, noise, 4.0)
    wanted = stock_latents(stock(folder, merged(made.handle)), noise, 4.0)
    pipeline.load_lora_weights(tmp_path)
    assert off(stock_latents(pipeline, noise, 4.0), wanted) < 1e-5 and off(before, wanted) > 1e-2
    pipeline.unload_lora_weights()
    assert torch.equal(stock_latents(pipeline, noise, 4.0), before)


def test_features_are_the_pictures_alone(folder, noise):
    """[rows, patches, width] of the layers before text joins; what follows is not run."""
    role, ran = denoiser(folder), []
    hook = role.handle.module.layers[0].register_forward_hook(lambda *_: ran.append("joint"))
    layers = tuple(LUMINA2.facts.feature_layers)
    features = role.features(noise, torch.full((2,), 0.5), role.handle.around.prompts(PROMPTS), layers)
    heads = Discriminator.reading(role, layers)
    hook.remove()
    assert [f.shape for f in features] == [(2, 16, 24)] * 2 and not ran
    assert heads(features).shape == (2,)


def test_time_is_not_rounded_under_autocast(folder, noise):
    """.991 and .993 are one number in bfloat16, and in bfloat16 linear layers the network still tells them apart."""
    role, told, near = denoiser(folder), [], torch.tensor([0.991, 0.993])
    role.handle.module.time_caption_embed.time_proj.register_forward_pre_hook(lambda _m, args: told.append(args[0]))
    cond, x = role.handle.around.prompts(PROMPTS[:1] * 2), noise[:1].repeat(2, 1, 1, 1)
    with torch.no_grad():
        exact = role.velocity(x, near, cond)
        role.handle.autocast = torch.bfloat16
        v = role.velocity(x, near, cond)
    assert near.bfloat16()[0] == near.bfloat16()[1] and v.dtype == torch.float32
    torch.testing.assert_close(told[1], 1 - near, atol=1e-6, rtol=0)
    assert 0 < off(v, exact) < 0.1 and not torch.equal(v[0], v[1])


# ---- sizes and folders


def test_the_full_size_has_the_published_parameters():
    """2.610 B, counted without storage; a known id plans as that."""
    with torch.device("meta"):
        loaded = open_model("Alpha-VLLM/Lumina-Image-2.0")
    assert sum(p.numel() for p in loaded.module.parameters()) / 1e9 == pytest.approx(2.610, abs=5e-4)
    assert LUMINA2.row_shape(loaded.module) == (16, 128, 128) and loaded.path.shift == 6


def test_a_plan_runs_the_network_without_numbers():
    """On the meta device no text can be counted: all are as long as the mask."""
    with torch.device("meta"):
        built = LUMINA2.build(size="tiny")
    texts = {name: field.expand(2, 5, *field.shape[2:]) for name, field in LUMINA2.blank(built.module).items()}
    x, label = torch.zeros(2, *SHAPE, device="meta"), torch.zeros(2, device="meta")
    packed = LUMINA2.pack(built.module, x, label, Cond(**texts).to("meta"))
    with _as_on_a_gpu("fp32"):
        assert LUMINA2.unpack(built.module, built.module(**packed), x).shape == x.shape


def test_a_network_from_sizes_takes_the_size_of_the_data(folder):
    """Parts around it are borrowed, or asked for in one line."""
    built = LUMINA2.build(size="tiny", sample_size=4, num_layers=3, shift=2.0, around=str(folder))
    assert LUMINA2.row_shape(built.module) == (4, 4, 4) and len(built.module.layers) == 3
    assert built.path == FlowPath(shift=2.0) and built.around.key() == open_model(folder).around.key()
    LUMINA2.fit(built.module, None)
    assert LUMINA2.row_shape(built.module) == (4, 4, 4)
    LUMINA2.fit(built.module, (4, 6, 8))
    assert LUMINA2.row_shape(built.module) == (4, 6, 8)
    role = Denoiser(with_module(denoiser(folder), built.module).handle, LUMINA2, built.path)
    blank = LUMINA2.blank(built.module)
    assert role.velocity(torch.randn(1, 4, 6, 8), torch.tensor([0.5]), blank).shape == (1, 4, 6, 8)
    with pytest.raises(UserError, match="load it from a pipeline folder"):
        LUMINA2.null(built.module, blank)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "2bb"}, "unknown size '2bb': did you mean '2b'"),
        ({"num_layer": 4}, "unknown key 'num_layer': did you mean 'num_layers'"),
        ({"sample_size": 7}, "sample_size=7"),
    ],
)
def test_wrong_sizes_are_named(said, message):
    """One line with the mend."""
    with pytest.raises(UserError, match=message):
        LUMINA2.build(**said)


def test_pipelines_from_elsewhere_are_recognised(folder):
    """Family from the network's class, path from the scheduler's config."""
    loaded = open_model(folder)
    assert family_of(folder) == loaded.family == "lumina2" and loaded.path == FlowPath(shift=SHIFT)


# ---- export


@pytest.mark.parametrize("kind", ["ode", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_exported_stock_pipeline_makes_the_solvers_images(folder, tmp_path, kind, steps):
    """Asked for N steps alone it visits the levels that are trained, t = 6 u / (1 + 5 u); noise in the sampler's order."""
    out, images = exported(denoiser(folder), tmp_path / "m", kind, steps, SIZE)
    theirs = load_pipeline(out, device="cpu")
    assert type(theirs).__name__ == "Lumina2Pipeline" and open_model(out).path == FlowPath(shift=SHIFT)
    torch.testing.assert_close(drawn(theirs, steps, size=SIZE), images, atol=1e-4, rtol=0)
    levels = [1000 * 6 * u / (1 + 5 * u) for u in (1 - i / steps for i in range(steps))]
    assert theirs.scheduler.timesteps.tolist() == pytest.approx(levels, abs=1e-3)


def test_sampling_a_folder_turns_the_pipelines_guidance_off(folder, tmp_path):
    """Its default is 4; a student's is 1, which is said in the example too."""
    out, images = exported(denoiser(folder), tmp_path / "m", size=SIZE)
    made = generate(out, 2, prompts=PROMPTS)
    assert (made.images / 255 - images).abs().max() <= 0.5 / 255 + 1e-4 and made.nfe == 2
    guided_ = generate(out, 2, prompts=PROMPTS, guidance=4.0)
    assert guided_.nfe == 4 and (guided_.images - made.images.float()).abs().max() > 2
    assert "guidance_scale=1" in (out / "README.md").read_text()


def test_a_student_of_guidance_finds_no_stock_pipeline():
    """Its own guidance is rescaled, which no schedule means."""
    path = FlowPath(shift=SHIFT)
    with pytest.raises(UserError, match="rescales what it guides"):
        target_for(LUMINA2, path, Schedule("ode", path.grid(2), guidance=3.0), labels=False, latent=True)


def test_exported_student_makes_the_same_images_merged_and_as_an_adapter(folder, tmp_path):
    """The folder in diffusers alone, and its LoRA file on the stock pipeline of the base."""
    role = student(folder, tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1)
    out, images = exported(role, tmp_path / "m", size=SIZE)
    reloaded = Lumina2Pipeline.from_pretrained(out, use_safetensors=True)
    assert (drawn(reloaded, size=SIZE) - images).abs().max() < 1e-4
    adapted = Lumina2Pipeline.from_pretrained(folder)
    adapted.register_modules(scheduler=reloaded.scheduler)
    before = drawn(adapted, size=SIZE)
    adapted.load_lora_weights(out)
    assert (drawn(adapted, size=SIZE) - images).abs().max() < 1e-4 and (before - images).abs().max() > 1e-3
    adapted.unload_lora_weights()
    assert torch.equal(drawn(adapted, size=SIZE), before)


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_images(folder, tmp_path):
    """Only diffusers, without fewstep."""
    out, images = exported(student(folder, moved=0.02), tmp_path / "m", size=SIZE)
    start = Draw.for_images(0, range(2)).normal("rollout.start", *SHAPE)
    assert reload_check(out, 2 * images - 1, start, prompts=PROMPTS) < 1e-4
