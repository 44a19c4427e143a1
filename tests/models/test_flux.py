"""FLUX.1 shown as a flow network, against the stock pipeline that samples it; guidance as an input; adapters; sizes."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.exporting.grids import same_pairs, trained_pairs
from fewstep.exporting.lora import LORA_FILE, save_lora
from fewstep.maths.guidance import guided
from fewstep.maths.paths import FlowPath
from fewstep.methods.diffusion.decoupled_dmd import DecoupledDMD, Point
from fewstep.models.denoiser import Denoiser
from fewstep.models.flux import FLUX, dynamic_shift
from fewstep.models.folder import family_of, open_model
from fewstep.models.patched import latents, patches
from fewstep.roles import RoleSpec, assemble, merged

from .flow_stock import PROMPTS, denoiser, off, pretrained, student, with_module
from .tiny_flux import SCHEDULER, SIZE, tiny_flux

SHAPE = (4, 8, 8)
KINDS = ("dev", "schnell")
Velocity = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each kind."""
    root = tmp_path_factory.mktemp("tiny")
    return {kind: tiny_flux(root / kind, kind) for kind in KINDS}


@pytest.fixture
def noise() -> Tensor:
    """Two rows."""
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def stock_latents(pipeline: Any, noise: Tensor, guidance: float, scheduler: Any = None, steps: int = 4) -> Tensor:
    """What the stock pipeline makes of noise."""
    if scheduler is not None:
        pipeline.register_modules(scheduler=scheduler)
    said = {"guidance_scale": guidance, "num_inference_steps": steps, "output_type": "latent", **SIZE}
    return latents(pipeline(PROMPTS, latents=patches(noise), **said).images, noise.shape[2:])


@torch.no_grad()
def euler(scheduler: Any, x: Tensor, velocity: Velocity) -> Tensor:
    """x <- x + (t' - t) v over the levels that the pipeline left in its scheduler."""
    for t, t_next in itertools.pairwise(scheduler.sigmas.tolist()):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x


def told(cond: Cond, guidance: float) -> Cond:
    """`cond` with the same guidance in each row."""
    return cond.with_(guidance=torch.full((len(cond["pooled"]),), guidance))


def stock(folder: Path, transformer: Any = None) -> Any:
    """diffusers' own pipeline, for one's own scheduler and maybe another network."""
    pipeline = copy.copy(pretrained(folder))
    pipeline.register_modules(transformer=transformer or pipeline.transformer)
    return pipeline


# ---- the stock pipeline's samples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("shift", [None, 3.0])
def test_euler_is_the_stock_pipeline(folders, noise, kind, guidance, shift):
    """v = output, fed t itself and the guidance; on the folder's own levels and on static ones."""
    own = FlowMatchEulerDiscreteScheduler(**SCHEDULER[kind])
    scheduler = own if shift is None else FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs = stock_latents(stock(folders[kind]), noise, guidance, scheduler)
    role = denoiser(folders[kind])
    cond = told(role.handle.around.prompts(PROMPTS), guidance)
    assert theirs.std() > 0.3
    assert off(euler(scheduler, noise, lambda x, t: role.velocity(x, t, cond)), theirs) < 1e-5


def test_a_wrong_sign_time_unit_or_guidance_would_show(folders, noise):
    """The parity above can fail: each flip is off by more than .01."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    theirs = stock_latents(stock(folders["dev"]), noise, 3.5, scheduler)
    role = denoiser(folders["dev"])
    cond = told(role.handle.around.prompts(PROMPTS), 3.5)
    wrong: list[Velocity] = [
        lambda x, t: -role.velocity(x, t, cond),
        lambda x, t: role.velocity(x, 1 - t, cond),
        lambda x, t: role.velocity(x, 1000 * t, cond),
        lambda x, t: role.velocity(x, t, told(cond, 2.5)),  # the scale minus one
        lambda x, t: role.velocity(x, t, cond.with_(pooled=cond["pooled"].flip(0))),
        lambda x, t: role.velocity(x.mT, t, cond).mT,
    ]
    assert all(off(euler(scheduler, noise, w), theirs) > 1e-2 for w in wrong)
    swapped = cond.with_(prompt_embeds=cond["prompt_embeds"].flip(0))  # of whose 512 tokens some ten differ
    assert off(euler(scheduler, noise, lambda x, t: role.velocity(x, t, swapped)), theirs) > 1e-3


def test_packed_states_and_their_places_are_the_pipelines(folders):
    """2 x 2 latents a token by rows; places (0, row, column), zeros for text; also where height is not width."""
    role, x = denoiser(folders["dev"]), torch.randn(2, 4, 4, 8)
    cond = role.handle.around.prompts(PROMPTS)
    packed = FLUX.pack(role.handle.module, x, torch.tensor([500.0, 900.0]), cond)
    assert torch.equal(packed["hidden_states"], FluxPipeline._pack_latents(x, 2, 4, 4, 8))
    assert torch.equal(packed["img_ids"], FluxPipeline._prepare_latent_image_ids(2, 2, 4, "cpu", torch.float32))
    assert packed["txt_ids"].shape == (512, 3) and not packed["txt_ids"].any()
    assert role.velocity(x, torch.tensor([0.5, 0.9]), cond).shape == x.shape


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_static_shift_makes_the_pipeline_visit_the_trained_levels(folders, noise, steps):
    """Labels and sigmas after the pipeline ran are the path's own, though it also hands over a shift by size."""
    path = open_model(folders["dev"]).path
    scheduler = FlowMatchEulerDiscreteScheduler(shift=path.shift)
    stock_latents(stock(folders["dev"]), noise, 1.0, scheduler, steps)
    visited = list(zip(scheduler.timesteps.tolist(), scheduler.sigmas[:-1].tolist()))
    assert same_pairs(trained_pairs(path, path.grid(steps)), visited)
    by_size = FlowMatchEulerDiscreteScheduler(**SCHEDULER["dev"])
    stock_latents(stock(folders["dev"]), noise, 1.0, by_size, steps)
    assert steps == 1 or abs(by_size.sigmas[1] - scheduler.sigmas[1]) > 1e-2


@pytest.mark.parametrize(("kind", "shift"), [("dev", math.exp(1.15)), ("schnell", 1.0)])
def test_the_clock_has_the_shift_of_the_pipelines_own_size(folders, kind, shift):
    """1024 pixels are 4096 patches: mu = 1.15, S = exp(mu); a scheduler that does not shift by size has its own S."""
    assert open_model(folders[kind]).path == FlowPath(shift=pytest.approx(shift), num_train_timesteps=1000)


@pytest.mark.parametrize("more", [{}, {"time_shift_type": "linear"}, {"base_image_seq_len": 64, "max_shift": 0.9}])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_shift_by_size_is_one_number_for_each_size(more, tokens):
    """S(mu) makes the levels that a stock scheduler makes when it is handed mu."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    said = {**SCHEDULER["dev"], **more}
    keys = {"base_seq_len": "base_image_seq_len", "base_shift": "base_shift", "max_shift": "max_shift"}
    mu = calculate_shift(tokens, **{ours: said[theirs] for ours, theirs in keys.items() if theirs in said})
    scheduler = FlowMatchEulerDiscreteScheduler(**said)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=mu)
    path = FlowPath(shift=dynamic_shift(said, tokens))
    assert scheduler.sigmas[:-1].tolist() == pytest.approx([path.time(u) for u in (1, 0.75, 0.5, 0.25)], abs=1e-6)


def test_time_is_rounded_under_autocast_as_the_pipeline_rounds_it(folders, noise):
    """In bfloat16 857.7 becomes 856, and 858, which lies between two, what the pipeline makes of it; guidance 3.5 3504."""
    levels = [1000.0, 999.0, 857.7, 858.0, 602.2, 501.0, 499.0, 333.3, 9.5, 1.0]
    role, seen = denoiser(folders["dev"]), []
    theirs = stock(folders["dev"], copy.deepcopy(pretrained(folders["dev"]).transformer).bfloat16())
    for network in (role.handle.module, theirs.transformer):
        network.time_text_embed.time_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].float()))
    cond = told(role.handle.around.prompts(PROMPTS)[torch.tensor([0] * len(levels))], 3.5)
    x, label = noise[:1].expand(len(levels), -1, -1, -1), torch.tensor(levels)
    packed = FLUX.pack(role.handle.module, x, label, cond)
    role.handle.autocast = torch.bfloat16
    with torch.no_grad():
        role.handle(**packed)
        cast = {name: value.bfloat16() for name, value in packed.items() if name != "guidance"}
        cast["timestep"] = label.bfloat16() / 1000  # as the pipeline has it
        theirs.transformer(**cast, guidance=packed["guidance"])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert seen[0][2] == 856 and seen[1][0] == 3504
    role.handle.autocast = None
    role.handle(**packed)
    torch.testing.assert_close(seen[4], label)


# ---- prompts and pictures


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_null_are_the_pipelines_own(folders, kind):
    """All 512 tokens, padding and all, and the pooled state; no condition is the empty prompt."""
    around, theirs = open_model(folders[kind]).around, pretrained(folders[kind])
    cond = around.prompts(PROMPTS)
    null = around.null(told(cond, 3.5))
    for ours, texts in ((cond, PROMPTS), (null, ["", ""])):
        embeds, pooled, places = theirs.encode_prompt(texts, device="cpu")
        torch.testing.assert_close(ours["prompt_embeds"], embeds)
        torch.testing.assert_close(ours["pooled"], pooled)
        assert embeds.shape[1] == 512 and not places.any()
    assert set(cond) == {"prompt_embeds", "pooled"} and torch.equal(null["guidance"], torch.full((2,), 3.5))


def test_decoded_latents_are_the_stock_pipelines_images(folders, noise):
    """decode(x / scale + shift), whose gradient flows; encode is its inverse in latents."""
    pipeline, around = stock(folders["dev"]), open_model(folders["dev"]).around
    scheduler = FlowMatchEulerDiscreteScheduler()
    made = stock_latents(pipeline, noise, 3.5, scheduler, 2)
    said: dict[str, Any] = {"latents": patches(noise), "num_inference_steps": 2, "guidance_scale": 3.5, **SIZE}
    images = torch.from_numpy(pipeline(PROMPTS, output_type="np", **said).images).permute(0, 3, 1, 2)
    x = made.clone().requires_grad_()
    ours = around.decode(x)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)
    ours.square().mean().backward()
    assert x.grad is not None and x.grad.any()
    with torch.no_grad():
        mean = pipeline.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(around.encode(images), (mean - 0.0609) * 1.5305)


def test_parts_are_what_the_stock_constructor_takes(folders, noise):
    """With network and scheduler they are the pipeline again."""
    loaded, theirs = open_model(folders["dev"]), stock(folders["dev"])
    made = FluxPipeline(transformer=loaded.module, scheduler=theirs.scheduler, **loaded.around.parts())
    made.set_progress_bar_config(disable=True)
    assert torch.equal(stock_latents(made, noise, 3.5, steps=2), stock_latents(theirs, noise, 3.5, steps=2))


# ---- guidance as an input


def test_a_condition_that_says_no_guidance_means_1(folders, noise):
    """Off, as everywhere; dev's network is never called without, schnell's never with."""
    for kind, matters in (("dev", True), ("schnell", False)):
        role, t = denoiser(folders[kind]), torch.tensor([0.4, 0.8])
        cond = role.handle.around.prompts(PROMPTS)
        assert FLUX.embeds_guidance(role.handle.module) is matters
        with torch.no_grad():
            plain = role.velocity(noise, t, cond)
            assert torch.equal(role.velocity(noise, t, told(cond, 1.0)), plain)
            assert (off(role.velocity(noise, t, told(cond, 3.5)), plain) > 1e-2) is matters


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_teacher_that_is_told_its_guidance_is_guided_by_one_call(folders, noise, kind):
    """dev: the network at this scale, outside an interval at 1; schnell: both conditions and their difference."""
    role, t, calls = denoiser(folders[kind]), torch.tensor([0.4, 0.8]), []
    cond, null = role.handle.around.prompts(PROMPTS), role.null(role.handle.around.prompts(PROMPTS))
    plain = role.velocity(noise, t, cond)
    free = role.velocity(noise, t, null)
    hook = role.handle.module.register_forward_pre_hook(
        lambda module, args, said: calls.append(len(said["hidden_states"])), with_kwargs=True
    )
    found = guided(role, noise, t, cond, 3.5)
    inside = guided(role, noise, t, cond, 3.5, interval=(0.0, 0.5))
    hook.remove()
    at = role.velocity(noise, t, told(cond, 3.5)) if kind == "dev" else free + 3.5 * (plain - free)
    torch.testing.assert_close(found, at, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(inside, torch.stack([at[0], plain[1]]), atol=1e-5, rtol=1e-4)
    assert calls == ([2, 2] if kind == "dev" else [4, 4])


def test_decoupled_dmd_augments_by_what_the_told_guidance_adds(folders, noise):
    """D_CA = x0(3.5) - x0(1) of dev; a factor of the guidance, taken once."""
    method = DecoupledDMD(DecoupledDMD.Config(guidance_scale=3.5, normaliser="none", space="x0", steps=1))
    specs = {"teacher": RoleSpec.model_validate({"from": str(folders["dev"])})}
    specs |= {name: RoleSpec.model_validate({"lora": {"rank": 2}}) for name in ("student", "fake_score")}
    method.bind(assemble(method.roles(), specs, 0), {}, {})
    cond = method.teacher.handle.around.prompts(PROMPTS)
    point = Point(noise, torch.tensor([0.4, 0.8]))
    method.points = lambda *_: {"ca": point}  # type: ignore[method-assign]
    found, _ = method.directions(noise, 1.0, cond, Draw.for_images(0, range(2)))
    with torch.no_grad():
        guided_, plain = (method.teacher.x0(*point, told(cond, scale)) for scale in (3.5, 1.0))
    torch.testing.assert_close(found["ca"], guided_ - plain, atol=1e-5, rtol=1e-4)
    assert found["ca"].abs().max() > 1e-3


def test_a_base_without_guidance_gains_the_stock_classes_own_input(folders, noise, tmp_path):
    """As before to the bit at first, with a gradient; saved and loaded it is the network of dev's sort."""
    role, t = denoiser(folders["schnell"]), torch.tensor([0.4, 0.8])
    cond = role.handle.around.prompts(PROMPTS)
    before = role.velocity(noise, t, cond).detach()
    module = FLUX.upgrade(role.handle.module, ["guidance"])
    after = role.velocity(noise, t, told(cond, 3.5))
    assert module is role.handle.module and torch.equal(after, before)
    last = module.time_text_embed.guidance_embedder.linear_2
    after.square().mean().backward()
    assert last.weight.grad.abs().max() > 0
    torch.nn.init.normal_(last.weight, std=0.3)
    assert FLUX.upgrade(module, ["guidance"]).time_text_embed.guidance_embedder.linear_2 is last
    tiny_flux(tmp_path / "again", "schnell")
    FLUX.save(module, tmp_path / "again")
    again = denoiser(tmp_path / "again")
    assert json.loads((tmp_path / "again/transformer/config.json").read_text())["guidance_embeds"] is True
    with torch.no_grad():
        wanted = role.velocity(noise, t, told(cond, 3.5))
        assert torch.equal(again.velocity(noise, t, told(cond, 3.5)), wanted) and off(wanted, before) > 1e-2
    scheduler = FlowMatchEulerDiscreteScheduler()
    theirs = stock_latents(stock(folders["schnell"], module), noise, 3.5, scheduler)
    assert off(euler(scheduler, noise, lambda x, t: role.velocity(x, t, told(cond, 3.5))), theirs) < 1e-5


def test_dev_keeps_its_trained_input(folders, noise):
    """A student that is told a guidance starts as the teacher at that guidance."""
    base, made, t = denoiser(folders["dev"]), student(folders["dev"], ("guidance",)), torch.tensor([0.4, 0.8])
    cond = told(base.handle.around.prompts(PROMPTS), 3.5)
    assert not hasattr(made.handle.module, "extra_inputs")
    assert torch.equal(made.velocity(noise, t, cond), base.velocity(noise, t, cond))


def test_a_sealed_network_gives_one_image_whatever_guidance_is_asked_for(folders, noise):
    """The stock pipeline's default of 3.5 is fed to an input that always says 1; the student itself is as it was."""
    role = denoiser(folders["dev"])
    sealed = stock(folders["dev"], FLUX.sealed(role.handle.module))
    scheduler = FlowMatchEulerDiscreteScheduler()
    images = [stock_latents(sealed, noise, scale, scheduler) for scale in (1.0, 3.5, 7.0)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[1], images[2])
    plain = stock(folders["dev"], role.handle.module)
    assert off(images[0], stock_latents(plain, noise, 1.0, scheduler)) < 1e-5
    assert off(images[0], stock_latents(plain, noise, 3.5, scheduler)) > 1e-2
    schnell = open_model(folders["schnell"]).module
    assert FLUX.sealed(schnell) is schnell


# ---- roles


def test_a_second_time_and_a_sign_change_nothing_at_first_and_nothing_at_equal_times(folders, noise):
    """To the bit; once learnt, s and sign count."""
    base, made, t = denoiser(folders["dev"]), student(folders["dev"], ("s", "sign")), torch.tensor([0.3, 0.8])
    cond = told(base.handle.around.prompts(PROMPTS), 3.5)
    with torch.no_grad():
        wanted = base.velocity(noise, t, cond)
        for s in (torch.zeros(2), t / 2, t):
            assert torch.equal(made.velocity(noise, t, cond.with_(s=s, sign=torch.tensor([1.0, -1.0]))), wanted)
        for part in made.handle.module.extra_inputs.embeddings.values():
            part[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
        assert torch.equal(made.velocity(noise, t, cond.with_(s=t)), wanted)
        for more in ({"s": t / 2}, {"s": t, "sign": -torch.ones(2)}):
            assert off(made.velocity(noise, t, cond.with_(**more)), wanted) > 1e-2


def test_guidance_beside_another_input_is_told_once(folders, noise):
    """Both go through the added inputs, which fold away on export; the stock class's own then stays at 1."""
    made, t = student(folders["dev"], ("delta", "guidance")), torch.tensor([0.3, 0.8])
    cond = made.handle.around.prompts(PROMPTS)
    with torch.no_grad():
        wanted = denoiser(folders["dev"]).velocity(noise, t, cond)
        assert torch.equal(made.velocity(noise, t, told(cond, 3.5).with_(delta=torch.ones(2))), wanted)


@pytest.mark.parametrize(("width", "layers"), [("default", 2 * 4 + 2 * 3), ("wide", 2 * 12 + 2 * 5)])
def test_adapters_reach_the_named_layers(folders, width, layers):
    """Two blocks of 4 (wide: 12) projections and two single ones of 3 (5); never the network's last layer."""
    made = student(folders["dev"], tune="lora", lora={"rank": 2, "targets": width})
    names = {name.split(".")[1] for name in made.trainable()}
    assert len(names) == layers and len(made.trainable()) == 2 * layers
    single = {name.split("/")[2] for name in names if name.startswith("single")}
    assert single == ({"attn"} if width == "default" else {"attn", "proj_mlp", "proj_out"}) and "proj_out" not in names


@pytest.mark.parametrize("targets", ["default", "wide"])
def test_the_stock_loader_reads_an_adapter(folders, noise, tmp_path, targets):
    """The adapter's file on the base makes the merged network's images; unloaded, the base is back to the bit."""
    made = student(folders["dev"], tune="lora", lora={"rank": 2, "alpha": 4, "targets": targets}, moved=0.1)
    save_lora(made.handle.adapter, FLUX.facts.lora_prefix, tmp_path / LORA_FILE, {})
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline = FluxPipeline.from_pretrained(folders["dev"])
    pipeline.set_progress_bar_config(disable=True)
    before = stock_latents(pipeline, noise, 3.5, scheduler)
    wanted = stock_latents(stock(folders["dev"], merged(made.handle)), noise, 3.5, scheduler)
    pipeline.load_lora_weights(tmp_path)
    assert off(stock_latents(pipeline, noise, 3.5, scheduler), wanted) < 1e-5 and off(before, wanted) > 1e-2
    pipeline.unload_lora_weights()
    assert torch.equal(stock_latents(pipeline, noise, 3.5, scheduler), before)


def test_without_its_adapter_a_role_is_the_base(folders, noise):
    """To the bit; with it, it is the merged network."""
    made = student(folders["dev"], tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1)
    base, t = denoiser(folders["dev"]), torch.tensor([0.3, 0.8])
    cond = told(base.handle.around.prompts(PROMPTS), 3.5)
    with torch.no_grad():
        wanted = base.velocity(noise, t, cond)
        assert torch.equal(with_module(made, made.handle.module).velocity(noise, t, cond), wanted)
        v = made.velocity(noise, t, cond)
        assert off(with_module(made, merged(made.handle)).velocity(noise, t, cond), v) < 1e-5 and off(v, wanted) > 1e-2


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_two_equal_calls_agree_and_checkpointing_changes_no_gradient(folders, noise, tune):
    """Nothing is dropped at random; with an adapter, its forward is made again in the backward pass."""
    answers, gradients = [], []
    for checkpointing in (False, False, True):
        said = {"lora": {"rank": 2, "targets": "wide"}} if tune == "lora" else {}
        made = student(folders["dev"], moved=0.02, tune=tune, gradient_checkpointing=checkpointing, **said)
        assert made.handle.module.gradient_checkpointing == checkpointing
        v = made.velocity(noise, torch.tensor([0.6, 0.9]), told(made.handle.around.prompts(PROMPTS), 3.5))
        answers.append(v.detach())
        gradients.append(torch.autograd.grad(v.square().mean(), list(made.trainable().values()), allow_unused=True))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for first, *others in zip(*gradients):
        assert all(first is None if g is None else torch.allclose(first, g, rtol=1e-4, atol=1e-6) for g in others)
    assert sum(g is not None and bool(g.any()) for g in gradients[0]) > 4


def test_features_are_the_pictures_alone(folders, noise):
    """[rows, patches, width] of the named layers; what follows is not run."""
    role, ran = denoiser(folders["dev"]), []
    hook = role.handle.module.single_transformer_blocks[0].register_forward_hook(lambda *_: ran.append("single"))
    layers = tuple(FLUX.facts.feature_layers)
    features = role.features(noise, torch.full((2,), 0.5), role.handle.around.prompts(PROMPTS), layers)
    hook.remove()
    assert [f.shape for f in features] == [(2, 16, 32)] * 2 and not ran


# ---- sizes and folders


@pytest.mark.parametrize(("name", "billions", "shift"), [("dev", 11.901, 3.158), ("schnell", 11.891, 1.0)])
def test_full_sizes_have_the_published_parameters(name, billions, shift):
    """Counted without storage; schnell lacks dev's guidance layers, 10 M."""
    with torch.device("meta"):
        loaded = open_model(f"black-forest-labs/FLUX.1-{name}")
    assert sum(p.numel() for p in loaded.module.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert FLUX.row_shape(loaded.module) == (16, 128, 128) and FLUX.embeds_guidance(loaded.module) == (name == "dev")
    assert loaded.path.shift == pytest.approx(shift, abs=5e-4)


def test_a_network_from_sizes_takes_the_size_of_the_data(folders):
    """Its config names none; parts around it are borrowed, or asked for in one line."""
    built = FLUX.build(size="tiny", sample_size=4, shift=2.0, guidance_embeds=True, around=str(folders["dev"]))
    assert FLUX.row_shape(built.module) == (4, 4, 4) and built.path == FlowPath(shift=2.0, num_train_timesteps=1000)
    assert built.around.key() == open_model(folders["dev"]).around.key()
    FLUX.fit(built.module, (4, 6, 8))
    assert FLUX.row_shape(built.module) == (4, 6, 8)
    role = Denoiser(with_module(denoiser(folders["dev"]), built.module).handle, FLUX, built.path)
    blank = FLUX.blank(built.module)
    assert role.velocity(torch.randn(1, 4, 6, 8), torch.tensor([0.5]), blank).shape == (1, 4, 6, 8)
    with pytest.raises(UserError, match="load it from a pipeline folder"):
        FLUX.null(built.module, blank)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "shnell"}, "unknown size 'shnell': did you mean 'schnell'"),
        ({"num_single_layer": 4}, "unknown key 'num_single_layer': did you mean 'num_single_layers'"),
        ({"sample_size": 7}, "sample_size=7"),
    ],
)
def test_wrong_sizes_are_named(said, message):
    """One line with the mend."""
    with pytest.raises(UserError, match=message):
        FLUX.build(**said)


def test_pipelines_from_elsewhere_are_recognised(folders):
    """Text to image alone: networks that are shown a picture or a mask share the class, but read more channels."""
    assert all(family_of(folders[kind]) == "flux" for kind in KINDS)
    config = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "out_channels": None}
    assert FLUX.holds(config) and not FLUX.holds({**config, "in_channels": 384, "out_channels": 64})
