"""Wan 2.1 shown as a flow network, against the stock pipeline that samples it; prompts and videos; adapters; sizes."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.engine.activations import _as_on_a_gpu
from fewstep.errors import UserError
from fewstep.exporting.grids import same_pairs, trained_pairs
from fewstep.exporting.lora import LORA_FILE, save_lora
from fewstep.exporting.targets import target_for, training_path
from fewstep.maths.guidance import guided
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import family_of, open_model
from fewstep.models.known import KNOWN
from fewstep.models.wan import WAN
from fewstep.nets.discriminator import Discriminator
from fewstep.roles import merged

from .flow_stock import PROMPTS, denoiser, off, pretrained, student, with_module
from .tiny_wan import LENGTH, SHAPE, SHIFT, SIZE, WORDS, tiny_wan

Velocity = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture
def noise() -> Tensor:
    """Two rows."""
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def videos() -> Tensor:
    """Two in [-1, 1]."""
    return 2 * torch.rand(2, 3, 9, 16, 32, generator=torch.Generator().manual_seed(2)) - 1


def stock(folder: Path, scheduler: Any = None, transformer: Any = None) -> Any:
    """diffusers' own pipeline with a scheduler, Euler's unless another is given, maybe with another network."""
    pipeline = copy.copy(pretrained(folder))
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline.register_modules(scheduler=scheduler, transformer=transformer or pipeline.transformer)
    return pipeline


def stock_latents(pipeline: Any, noise: Tensor, guidance: float, steps: int = 4, **said: Any) -> Tensor:
    """What the stock pipeline makes of noise."""
    said = {"num_inference_steps": steps, "output_type": "latent", **SIZE, **said}
    return pipeline(PROMPTS, latents=noise, guidance_scale=guidance, **said).frames


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


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_euler_is_the_stock_pipeline(folder, noise, scale, shift):
    """v as the network says it, fed 1000 t; guided against the pipeline's own default negative prompt."""
    pipeline = stock(folder, FlowMatchEulerDiscreteScheduler(shift=shift))
    theirs = stock_latents(pipeline, noise, scale)
    assert theirs.shape == noise.shape and theirs.std() > 0.3
    assert off(euler(pipeline.scheduler, noise, asked(denoiser(folder), scale)), theirs) < 1e-5


def test_a_wrong_sign_time_text_or_axis_would_show(folder, noise):
    """The parity above can fail: each flip is off by more than .01."""
    pipeline = stock(folder)
    theirs = stock_latents(pipeline, noise, 1.0)
    role = denoiser(folder)
    cond = role.handle.around.prompts(PROMPTS)
    swapped, bare = cond[torch.tensor([1, 0])], role.null(cond)
    wrong: list[Velocity] = [
        lambda x, t: -role.velocity(x, t, cond),
        lambda x, t: role.velocity(x, 1 - t, cond),
        lambda x, t: role.velocity(x, t / 1000, cond),  # fed t itself
        lambda x, t: role.velocity(x, t, swapped),
        lambda x, t: role.velocity(x, t, bare),
        lambda x, t: role.velocity(x.flip(2), t, cond).flip(2),  # backwards in time
        lambda x, t: role.velocity(x.mT, t, cond).mT,
    ]
    assert all(off(euler(pipeline.scheduler, noise, w), theirs) > 1e-2 for w in wrong)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_the_pipeline_visits_the_trained_levels(folder, noise, steps, kind):
    """Labels and sigmas that are left after it ran, told N alone. Renoising so is possible in one and two steps."""
    path = open_model(folder).path

    def on(path: Any) -> Schedule:
        return Schedule(kind, path.grid(steps))

    if kind == "renoise" and steps > 2:
        with pytest.raises(UserError, match=f"no diffusers scheduler makes these {steps} levels"):
            training_path(WAN, path, on, labels=False, latent=True)
        return
    path = training_path(WAN, path, on, labels=False, latent=True)
    target = target_for(WAN, path, on(path), labels=False, latent=True)
    assert target.pipeline_name == "WanPipeline" and not target.carried
    pipeline = stock(folder, target.scheduler_for(path, on(path)))
    stock_latents(pipeline, noise, 1.0, steps)
    scheduler = pipeline.scheduler
    visited = list(zip(scheduler.timesteps.tolist(), scheduler.sigmas[: len(scheduler.timesteps)].tolist()))
    assert same_pairs(trained_pairs(path, on(path).u), visited) and len(visited) == steps
    first = 999 if kind == "ode" else 1000  # of DPM-Solver's whole labels
    assert visited[0][0] == pytest.approx(first, abs=1e-3)


# ---- prompts and videos


def test_prompts_are_the_pipelines_own(folder):
    """512 states a text, zeros after its end."""
    around, theirs = open_model(folder).around, pretrained(folder)
    cond = around.prompts(PROMPTS)
    embeds, _ = theirs.encode_prompt(PROMPTS, None, False, max_sequence_length=LENGTH)
    torch.testing.assert_close(cond["prompt_embeds"], embeds)
    assert embeds.shape == (2, LENGTH, WORDS)
    lengths = [len(theirs.tokenizer(text).input_ids) for text in PROMPTS]
    assert cond["prompt_embeds"].abs().sum(-1).gt(0).sum(1).tolist() == lengths
    assert list(cond) == ["prompt_embeds"]


def test_padding_is_read_like_text(folder, noise):
    """There is no mask, so a text cut to its length is another condition: prompts keep the pipeline's length."""
    role, t = denoiser(folder), torch.tensor([0.3, 0.8])
    cond = role.handle.around.prompts(PROMPTS)
    with torch.no_grad():
        v = role.velocity(noise, t, cond)
        short = role.velocity(noise, t, Cond(prompt_embeds=cond["prompt_embeds"][:, :16]))
    assert off(short, v) > 1e-2


def test_a_text_is_encoded_alike_alone_and_beside_a_longer_one(folder):
    """Padding does not reach into the text encoder."""
    around = open_model(folder).around
    both = around.prompts(["a cat", "two dogs, and a much longer text"])["prompt_embeds"]
    torch.testing.assert_close(both[:1], around.prompts(["a cat"])["prompt_embeds"], atol=1e-5, rtol=1e-5)


def test_no_condition_is_the_pipelines_default_negative(folder):
    """The empty prompt: one token, then zeros; a second time is no text."""
    around, theirs = open_model(folder).around, pretrained(folder)
    null = around.null(around.prompts(PROMPTS).with_(s=torch.tensor([0.2, 0.4])))
    _, embeds = theirs.encode_prompt(PROMPTS, None, True, max_sequence_length=LENGTH)
    torch.testing.assert_close(null["prompt_embeds"], embeds)
    assert torch.equal(null["s"], torch.tensor([0.2, 0.4]))
    assert null["prompt_embeds"].abs().sum(-1).gt(0).sum(1).tolist() == [1, 1]


def test_decoded_latents_are_the_stock_pipelines_frames(folder, noise):
    """decode(x std + mean) by channel, 3 latents to 9 frames; its gradient flows back to every latent."""
    pipeline, around = stock(folder), open_model(folder).around
    made = stock_latents(pipeline, noise, 1.0, 2)
    frames = torch.from_numpy(stock_latents(pipeline, noise, 1.0, 2, output_type="np"))
    x = made.clone().requires_grad_()
    ours = around.decode(x)
    assert ours.shape == (2, 3, 9, 16, 32) and frames.shape == (2, 9, 16, 32, 3)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), frames.movedim(-1, 1), atol=1e-5, rtol=0)
    ours.sum().backward()
    assert x.grad is not None and x.grad.abs().sum((3, 4)).amin() > 0


def test_a_gradient_of_a_video_is_that_of_the_decoder(folder, noise):
    """Activations are made again in the backward pass, with what the decoder keeps of earlier frames."""
    around = open_model(folder).around
    vae = around.part("vae")
    mean, std = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    weights = torch.randn(2, 3, 9, 16, 32, generator=torch.Generator().manual_seed(3))

    def gradient(decode: Callable[[Tensor], Tensor]) -> Tensor:
        x = noise.clone().requires_grad_()
        return torch.autograd.grad((decode(x) * weights).sum(), x)[0]

    theirs = gradient(lambda x: vae.decode(x * std + mean, return_dict=False)[0])
    assert off(gradient(around.decode), theirs) < 1e-4 and theirs.abs().max() > 1e-2


def test_encoding_is_the_inverse_of_scaling_by_channel(folder, videos):
    """(z - mean) / std of the posterior's mean; with noise a draw from the posterior, in the latents' own order."""
    around = open_model(folder).around
    vae = around.part("vae")
    with torch.no_grad():
        posterior = vae.encode(videos).latent_dist
    mean, std = (torch.tensor(vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    x0 = around.encode(videos)
    assert x0.shape == (2, *SHAPE)
    torch.testing.assert_close(x0, (posterior.mean - mean) / std)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(around.encode(videos, noise), (posterior.mean + posterior.std * noise - mean) / std)


def test_an_image_is_a_video_of_one_frame(folder, videos):
    """So that pictures may be trained on too."""
    around = open_model(folder).around
    one = around.encode(videos[:, :, 0])
    assert one.shape == (2, SHAPE[0], 1, 4, 8) and around.factor == 4
    torch.testing.assert_close(one, around.encode(videos)[:, :, :1], atol=1e-5, rtol=1e-5)  # nothing sees the future
    assert around.decode(one).shape == (2, 3, 1, 16, 32)


def test_parts_are_what_the_stock_constructor_takes(folder, noise):
    """With network and scheduler they are the pipeline again."""
    loaded, theirs = open_model(folder), stock(folder)
    made = WanPipeline(transformer=loaded.module, scheduler=theirs.scheduler, **loaded.around.parts())
    made.set_progress_bar_config(disable=True)
    assert torch.equal(stock_latents(made, noise, 5.0, 2), stock_latents(theirs, noise, 5.0, 2))


# ---- roles


def test_what_joins_the_time_embedding_reaches_blocks_and_last_norm(folder, noise):
    """A learnt gap moves the modulation of the blocks and that of the output."""
    role, t = student(folder, ("s",)), torch.tensor([0.5, 0.9])
    torch.nn.init.normal_(role.handle.module.extra_inputs.embeddings["s"][-1].weight)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = role.handle.module.condition_embedder.register_forward_hook(lambda _m, _a, out: seen.append(out[:2]))
    with torch.no_grad():
        for s in (t, t / 2):
            role.velocity(noise, t, role.handle.around.prompts(PROMPTS).with_(s=s))
    hook.remove()
    for equal, half in zip(*seen):
        assert (equal - half).abs().amax(1).min() > 1e-2


@pytest.mark.parametrize(("width", "layers"), [("default", 2 * 8), ("wide", 2 * 10)])
def test_adapters_reach_the_named_layers(folder, width, layers):
    """Two blocks with two attentions of four layers each; wide: and the two of the feed-forward network."""
    made = student(folder, tune="lora", lora={"rank": 2, "targets": width})
    names = {name.split(".")[1] for name in made.trainable()}
    assert len(names) == layers and len(made.trainable()) == 2 * layers
    assert all("/attn" in name or "/ffn/" in name for name in names)


@pytest.mark.parametrize("targets", ["default", "wide"])
def test_the_stock_loader_reads_an_adapter(folder, noise, tmp_path, targets):
    """The adapter's file on the base makes the merged network's latents; unloaded, the base is back to the bit."""
    made = student(folder, tune="lora", lora={"rank": 2, "alpha": 4, "targets": targets}, moved=0.1)
    save_lora(made.handle.adapter, WAN.facts.lora_prefix, tmp_path / LORA_FILE, {})
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT))
    pipeline.set_progress_bar_config(disable=True)
    before = stock_latents(pipeline, noise, 5.0)
    wanted = stock_latents(stock(folder, transformer=merged(made.handle)), noise, 5.0)
    pipeline.load_lora_weights(tmp_path)
    assert off(stock_latents(pipeline, noise, 5.0), wanted) < 1e-5 and off(before, wanted) > 1e-2
    pipeline.unload_lora_weights()
    assert torch.equal(stock_latents(pipeline, noise, 5.0), before)


def test_features_are_tokens_of_all_frames(folder, noise):
    """[rows, frames x height x width / 4, width] of a block; what follows is not run. A mean over places reads them."""
    role, ran = denoiser(folder), []
    WAN.fit(role.handle.module, SHAPE)  # heads ask the network at its own size, which is 81 frames unless it is told
    hook = role.handle.module.proj_out.register_forward_hook(lambda *_: ran.append("out"))
    layers = tuple(WAN.facts.feature_layers)
    features = role.features(noise, torch.full((2,), 0.5), role.handle.around.prompts(PROMPTS), layers)
    heads = Discriminator.reading(role, layers, kind="mean")
    hook.remove()
    assert [f.shape for f in features] == [(2, 3 * 2 * 4, 24)] * 2 and not ran
    assert heads(features).shape == (2,)


def test_time_is_not_rounded_under_autocast(folder, noise):
    """.991 and .993 are one number in bfloat16, and in bfloat16 linear layers the network still tells them apart."""
    role, told, near = denoiser(folder), [], torch.tensor([0.991, 0.993])
    embedder = role.handle.module.condition_embedder
    embedder.timesteps_proj.register_forward_pre_hook(lambda _m, args: told.append(args[0]))
    cond, x = role.handle.around.prompts(PROMPTS[:1] * 2), noise[:1].repeat(2, 1, 1, 1, 1)
    with torch.no_grad():
        exact = role.velocity(x, near, cond)
        role.handle.autocast = torch.bfloat16
        v = role.velocity(x, near, cond)
    assert near.bfloat16()[0] == near.bfloat16()[1] and v.dtype == torch.float32
    torch.testing.assert_close(told[1], 1000 * near, atol=1e-3, rtol=0)
    assert 0 < off(v, exact) < 0.1 and not torch.equal(v[0], v[1])


# ---- sizes and folders


@pytest.mark.parametrize(("name", "billions"), [("1.3B", 1.419), ("14B", 14.288)])
def test_full_sizes_have_the_published_parameters(name, billions):
    """Counted without storage, by the hub's own names; without data they draw 81 frames of 480 x 832."""
    with torch.device("meta"):
        loaded = open_model(f"Wan-AI/Wan2.1-T2V-{name}-Diffusers")
    assert sum(p.numel() for p in loaded.module.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert WAN.row_shape(loaded.module) == (16, 21, 60, 104) and loaded.path.shift == 3
    assert sum(known.family == "wan" for known in KNOWN.values()) == 2


def test_a_plan_runs_the_network_without_numbers():
    """On the meta device."""
    with torch.device("meta"):
        built = WAN.build(size="tiny")
    texts = {name: field.expand(2, 5, *field.shape[2:]) for name, field in WAN.blank(built.module).items()}
    x, label = torch.zeros(2, *SHAPE, device="meta"), torch.zeros(2, device="meta")
    packed = WAN.pack(built.module, x, label, Cond(**texts).to("meta"))
    with _as_on_a_gpu("fp32"):
        assert WAN.unpack(built.module, built.module(**packed), x).shape == x.shape


def test_a_network_from_sizes_takes_the_size_of_the_data(folder):
    """Parts around it are borrowed, or asked for in one line."""
    built = WAN.build(size="tiny", sample_frames=2, num_layers=3, shift=5.0, around=str(folder))
    assert WAN.row_shape(built.module) == (4, 2, 4, 8) and len(built.module.blocks) == 3
    assert built.path == FlowPath(shift=5.0) and built.around.key() == open_model(folder).around.key()
    WAN.fit(built.module, None)
    assert WAN.row_shape(built.module) == (4, 2, 4, 8)
    WAN.fit(built.module, (4, 5, 6, 8))
    assert WAN.row_shape(built.module) == (4, 5, 6, 8)
    role = Denoiser(with_module(denoiser(folder), built.module).handle, WAN, built.path)
    blank = WAN.blank(built.module)
    assert role.velocity(torch.randn(1, 4, 5, 6, 8), torch.tensor([0.5]), blank).shape == (1, 4, 5, 6, 8)
    with pytest.raises(UserError, match="load it from a pipeline folder"):
        WAN.null(built.module, blank)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "14bb"}, "unknown size '14bb': did you mean '14b'"),
        ({"num_layer": 4}, "unknown key 'num_layer': did you mean 'num_layers'"),
        ({"sample_height": 7}, "sample_height=7"),
    ],
)
def test_wrong_sizes_are_named(said, message):
    """One line with the mend."""
    with pytest.raises(UserError, match=message):
        WAN.build(**said)


def test_pipelines_from_elsewhere_are_recognised(folder):
    """Family from the network's class, path from the scheduler's config."""
    loaded = open_model(folder)
    assert family_of(folder) == loaded.family == "wan" and loaded.path == FlowPath(shift=SHIFT)


def test_networks_that_start_from_a_picture_are_none_of_this_family():
    """They read a picture besides, in further channels or by cross attention."""
    plain = dict(WanTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8).config)
    config = {"_class_name": "WanTransformer3DModel", **plain}
    assert WAN.holds(config)
    assert not WAN.holds(config | {"in_channels": 36}) and not WAN.holds(config | {"image_dim": 1280})


@pytest.mark.parametrize("setting", [{"boundary_ratio": 0.875}, {"expand_timesteps": True}])
def test_wan_2_2_is_refused(folder, tmp_path, setting):
    """Its pipelines call a second network at low noise, or tell each token a time: one student is not enough."""
    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | setting))
    with pytest.raises(UserError, match=r"is Wan 2\.2, .*: give a folder of Wan 2\.1"):
        open_model(other)
