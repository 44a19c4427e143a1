"""Z-Image shown as a flow network, against the stock pipeline that samples it; texts of any lengths; adapters; sizes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from diffusers.pipelines.z_image import pipeline_z_image
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.exporting.grids import same_pairs, trained_pairs
from fewstep.exporting.lora import LORA_FILE, save_lora
from fewstep.exporting.reload import fresh_samples
from fewstep.maths.guidance import guided
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule, sample
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import family_of, open_model
from fewstep.models.z_image import Z_IMAGE
from fewstep.roles import Role, RoleSpec, assemble, merged

from .flow_stock import denoiser, off, pretrained, student, with_module
from .tiny_z_image import SIZE, tiny_z_image

SHAPE = (4, 8, 8)
TEXTS = ("a red cat", "two dogs and a much longer prompt than that")  # of 28 and 62 tokens, in pieces of 32
SIGMAS = hasattr(pipeline_z_image, "get_default_z_image_sigmas")  # that the stock pipeline makes of N alone
Velocity = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_z_image(tmp_path_factory.mktemp("tiny") / "z_image")


@pytest.fixture
def noise() -> Tensor:
    """Two rows."""
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def stock(folder: Path, transformer: Any = None) -> Any:
    """diffusers' own pipeline, for one's own scheduler and maybe another network."""
    pipeline = copy.copy(pretrained(folder))
    pipeline.register_modules(transformer=transformer or pipeline.transformer)
    return pipeline


def levels(steps: int) -> list[float]:
    """The clock's, as the stock pipeline makes them since diffusers 0.39."""
    return [1 - i / steps for i in range(steps)]


def stock_latents(pipeline: Any, noise: Tensor, scale: float = 1.0, shift: float = 3.0, steps: int = 4) -> Tensor:
    """What the stock pipeline makes of noise, told the usual scale minus one. It writes into the list of prompts."""
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
    said = {"guidance_scale": scale - 1, "num_inference_steps": steps, "sigmas": levels(steps), **SIZE}
    return pipeline(list(TEXTS), latents=noise, output_type="latent", **said).images


@torch.no_grad()
def euler(scheduler: Any, x: Tensor, velocity: Velocity) -> Tensor:
    """x <- x + (t' - t) v over the levels that the pipeline left in its scheduler."""
    for t, t_next in itertools.pairwise(scheduler.sigmas.tolist()):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x


# ---- the stock pipeline's samples


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_euler_is_the_stock_pipeline(folder, noise, scale, shift):
    """v = -output, fed 1 - t; the pipeline's guidance number is the usual scale minus one."""
    pipeline, role = stock(folder), denoiser(folder)
    theirs = stock_latents(pipeline, noise, scale, shift)
    cond = role.handle.around.prompts(TEXTS)
    ours = euler(pipeline.scheduler, noise, lambda x, t: guided(role, x, t, cond, scale))
    assert theirs.std() > 0.3 and pipeline.scheduler.sigmas[1] == pytest.approx(shift * 0.75 / (1 + (shift - 1) * 0.75))
    assert off(ours, theirs) < 1e-5


def test_a_wrong_sign_time_text_or_guidance_would_show(folder, noise):
    """The parity above can fail: each flip is off by more than .01."""
    pipeline, role = stock(folder), denoiser(folder)
    theirs = stock_latents(pipeline, noise, 3.0)
    cond = role.handle.around.prompts(TEXTS)

    def off_by(x_t: Velocity) -> float:
        return off(euler(pipeline.scheduler, noise, x_t), theirs)

    wrong: list[Velocity] = [
        lambda x, t: -guided(role, x, t, cond, 3.0),
        lambda x, t: guided(role, x, 1 - t, cond, 3.0),
        lambda x, t: guided(role, x, 1000 * t, cond, 3.0),
        lambda x, t: guided(role, x, t, cond, 2.0),  # the pipeline's number taken for the usual scale
        lambda x, t: guided(role, x, t, cond[torch.tensor([1, 0])], 3.0),
        lambda x, t: guided(role, x.mT, t, cond, 3.0).mT,
    ]
    assert all(off_by(velocity) > 1e-2 for velocity in wrong)
    assert off_by(lambda x, t: guided(role, x, t, cond, 3.0)) < 1e-5


def test_facts_say_what_pack_and_unpack_do(folder, noise):
    """`time_reversed`, `sign` and `guidance_offset`, of which other rooms read."""
    role, t = denoiser(folder), torch.tensor([0.3, 0.9])
    cond = role.handle.around.prompts(TEXTS)
    packed = Z_IMAGE.pack(role.handle.module, noise, role.path.timestep(t), cond)
    torch.testing.assert_close(packed["t"], 1 - t if Z_IMAGE.facts.time_reversed else t)
    assert [tuple(x.shape) for x in packed["x"]] == [(4, 1, 8, 8)] * 2
    assert [len(text) for text in packed["cap_feats"]] == cond["mask"].sum(1).tolist() == [28, 62]
    with torch.no_grad():
        output = torch.stack(role.handle.module(**packed).sample)[:, :, 0]
        assert torch.equal(role.velocity(noise, t, cond), Z_IMAGE.facts.sign * output)
    assert Z_IMAGE.facts.guidance_offset == 1


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "told", [pytest.param(False, marks=pytest.mark.skipif(not SIGMAS, reason="needs diffusers 0.39")), True]
)
def test_a_static_shift_makes_the_pipeline_visit_the_trained_levels(folder, noise, steps, told):
    """Labels and sigmas after the pipeline ran are the path's own; before 0.39 it has to be told the sigmas."""
    path, pipeline = open_model(folder).path, stock(folder)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=path.shift))
    said = {"num_inference_steps": steps, **({"sigmas": list(path.grid(steps))} if told else {}), **SIZE}
    pipeline(list(TEXTS), latents=noise, guidance_scale=0.0, output_type="latent", **said)
    visited = list(zip(pipeline.scheduler.timesteps.tolist(), pipeline.scheduler.sigmas[:-1].tolist()))
    assert path == FlowPath(shift=3.0) and same_pairs(trained_pairs(path, path.grid(steps)), visited)


@pytest.mark.slow
@pytest.mark.skipif(not SIGMAS, reason="needs diffusers 0.39")
def test_a_fresh_process_makes_the_trainers_images(folder, tmp_path):
    """A student in a stock pipeline, guided by 3, in a process that has only diffusers."""
    role = student(folder, moved=0.02)
    made = ZImagePipeline(
        transformer=role.handle.module,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=role.path.shift),
        **role.handle.around.parts(),
    )
    made.save_pretrained(tmp_path)
    draw = Draw.for_images(0, range(2))
    given, cond = {"noise.0": draw.normal("rollout.start", *SHAPE)}, role.handle.around.prompts(TEXTS)
    schedule = Schedule("ode", role.path.grid(4), guidance=3.0)
    said = {"schedule": {"u": schedule.u, "guidance": 3.0}, "remote_code": [], "prompts": True, "size": [16, 16]}
    said["pipeline"] = "ZImagePipeline"
    with torch.no_grad():
        x0 = sample(role, schedule, cond, Draw.for_images(0, range(2)), SHAPE)
        images = (role.decode(x0) / 2 + 0.5).clamp(0, 1)
    assert (fresh_samples(tmp_path, said, given, TEXTS) - images).abs().max() < 1e-4


# ---- prompts and pictures


def test_prompts_and_null_are_the_pipelines_own(folder):
    """The last but one hidden states of the chat template; no condition is the template of an empty prompt."""
    around, theirs = open_model(folder).around, pretrained(folder)
    cond = around.prompts(TEXTS)
    embeds, negative = theirs.encode_prompt(list(TEXTS), device="cpu")
    for ours, lists in ((cond, embeds), (around.null(cond), negative)):
        assert set(ours) == {"prompt_embeds", "mask"} and ours["prompt_embeds"].shape == cond["prompt_embeds"].shape
        for row, text in enumerate(lists):
            real = ours["mask"][row].bool()
            torch.testing.assert_close(ours["prompt_embeds"][row, real], text)
            assert not ours["prompt_embeds"][row, ~real].any() and 0 < len(text) < 70
    assert len(negative[0]) == len("user\n\nassistant\n") + 3  # bytes and specials: no empty thoughts before the answer


def test_some_rows_may_lose_their_condition(folder):
    """`dropped`: null in the chosen rows alone; also where the texts are as short as the null."""
    role = denoiser(folder)
    for texts in (TEXTS, ("", "")):
        cond = role.handle.around.prompts(texts)
        null, dropped = role.null(cond), role.dropped(cond, torch.tensor([True, False]))
        for name in cond:
            assert torch.equal(dropped[name][1], cond[name][1]) and torch.equal(dropped[name][0], null[name][0])


def test_prompts_of_any_lengths_lie_in_one_batch(folder, noise):
    """A padded row is the row alone, to 1e-5, because padding is cut off; read as text it would show."""
    role = denoiser(folder)
    alone = [role.handle.around.prompts([text]) for text in (*TEXTS, "")]
    cond = Cond.cat(alone)
    x, t = torch.cat([noise, noise[:1]]), torch.tensor([0.2, 0.6, 0.9])
    with torch.no_grad():
        single = torch.cat([role.velocity(x[i : i + 1], t[i : i + 1], one) for i, one in enumerate(alone)])
        torch.testing.assert_close(role.velocity(x, t, cond), single, atol=1e-5, rtol=1e-5)
        unmasked = cond.with_(mask=torch.ones_like(cond["mask"]))
        assert off(role.velocity(x, t, unmasked)[0], single[0]) > 1e-2
    assert len({len(one["mask"][0]) for one in alone}) == 3


def test_decoded_latents_are_the_stock_pipelines_images(folder, noise):
    """decode(x / scale + shift), whose gradient flows; encode is its inverse in latents."""
    pipeline, around = stock(folder), open_model(folder).around
    made = stock_latents(pipeline, noise, steps=2)
    said: dict[str, Any] = {
        "latents": noise,
        "num_inference_steps": 2,
        "sigmas": levels(2),
        "guidance_scale": 0,
        **SIZE,
    }
    images = torch.from_numpy(pipeline(list(TEXTS), output_type="np", **said).images).permute(0, 3, 1, 2)
    x = made.clone().requires_grad_()
    ours = around.decode(x)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)
    ours.square().mean().backward()
    assert x.grad is not None and x.grad.any()
    with torch.no_grad():
        mean = pipeline.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(around.encode(images), (mean - 0.0609) * 1.5305)


def test_parts_are_what_the_stock_constructor_takes(folder, noise):
    """With network and scheduler they are the pipeline again."""
    loaded, theirs = open_model(folder), stock(folder)
    made = ZImagePipeline(transformer=loaded.module, scheduler=theirs.scheduler, **loaded.around.parts())
    made.set_progress_bar_config(disable=True)
    assert torch.equal(stock_latents(made, noise, 2.0, steps=2), stock_latents(theirs, noise, 2.0, steps=2))


def test_time_is_not_rounded_under_autocast(folder, noise):
    """As in the pipeline, which feeds float32 in every precision: .991 and .993 are one number in bfloat16."""
    role, fed, near = denoiser(folder), [], torch.tensor([0.991, 0.993])
    role.handle.module.t_embedder.register_forward_pre_hook(lambda _m, args: fed.append(args[0]))
    cond, x = role.handle.around.prompts([TEXTS[0]] * 2), noise[:1].repeat(2, 1, 1, 1)
    with torch.no_grad():
        exact = role.velocity(x, near, cond)
        role.handle.autocast = torch.bfloat16
        v = role.velocity(x, near, cond)
    assert near.bfloat16()[0] == near.bfloat16()[1] and torch.equal(fed[0], fed[1])
    torch.testing.assert_close(fed[1], 1000 * (1 - near), atol=1e-3, rtol=0)
    assert v.dtype == torch.float32 and 0 < off(v, exact) < 0.1 and not torch.equal(v[0], v[1])


# ---- roles


def test_a_second_time_and_a_sign_change_nothing_at_first_and_nothing_at_equal_times(folder, noise):
    """To the bit; once learnt, s and sign count."""
    base, made, t = denoiser(folder), student(folder, ("s", "sign")), torch.tensor([0.3, 0.8])
    cond = base.handle.around.prompts(TEXTS)
    with torch.no_grad():
        wanted = base.velocity(noise, t, cond)
        for s in (torch.zeros(2), t / 2, t):
            assert torch.equal(made.velocity(noise, t, cond.with_(s=s, sign=torch.tensor([1.0, -1.0]))), wanted)
        for part in made.handle.module.extra_inputs.embeddings.values():
            part[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
        assert torch.equal(made.velocity(noise, t, cond.with_(s=t)), wanted)
        for more in ({"s": t / 2}, {"s": t, "sign": -torch.ones(2)}):
            assert off(made.velocity(noise, t, cond.with_(**more)), wanted) > 1e-2


def test_an_embedded_guidance_changes_nothing_at_first(folder, noise):
    """An input of its own, to the bit, with a gradient; no call is guided by it alone."""
    base, made, t = denoiser(folder), student(folder, ("guidance",)), torch.tensor([0.3, 0.8])
    cond = base.handle.around.prompts(TEXTS)
    v = made.velocity(noise, t, made.told(cond, 4.0))
    assert torch.equal(v, base.velocity(noise, t, cond)) and not base.embeds_guidance
    v.square().mean().backward()
    assert made.handle.module.extra_inputs.embeddings["guidance"][-1].weight.grad.any()


def test_an_adapter_reads_a_second_time_from_the_reversed_label(folder, noise):
    """t - s / 2 for t, its sign for the sign: fed 1 - t / 2 at s = t, and 1 + t / 2 told -1; the base itself at s = 0."""
    base, made, t = (
        denoiser(folder),
        student(folder, ("s", "sign"), tune="lora", lora={"rank": 2}),
        torch.tensor([0.3, 0.8]),
    )
    cond = base.handle.around.prompts(TEXTS)
    with torch.no_grad():
        assert torch.equal(made.velocity(noise, t, cond.with_(s=0 * t)), base.velocity(noise, t, cond))
        for sign in (1, -1):
            told = made.velocity(noise, t, cond.with_(s=t, sign=sign * torch.ones(2)))
            torch.testing.assert_close(told, base.velocity(noise, sign * t / 2, cond), atol=1e-5, rtol=1e-4)
    assert sum("t_embedder" in name for name in made.trainable()) == 4


@pytest.mark.parametrize(("width", "layers"), [("default", 6 * 4), ("wide", 6 * 7)])
def test_adapters_reach_the_named_layers(folder, width, layers):
    """Six blocks, of pictures, of texts and of both, of 4 (wide: 7) projections; no modulation, no embedding."""
    made = student(folder, tune="lora", lora={"rank": 2, "targets": width})
    names = {name.split(".")[1] for name in made.trainable()}
    assert len(names) == layers and len(made.trainable()) == 2 * layers
    assert {name.split("/")[0] for name in names} == {"noise_refiner", "context_refiner", "layers"}


@pytest.mark.parametrize("targets", ["default", "wide"])
def test_the_stock_loader_reads_an_adapter(folder, noise, tmp_path, targets):
    """The adapter's file on the base makes the merged network's images; unloaded, the base is back to the bit."""
    made = student(folder, tune="lora", lora={"rank": 2, "alpha": 4, "targets": targets}, moved=0.1)
    save_lora(made.handle.adapter, Z_IMAGE.facts.lora_prefix, tmp_path / LORA_FILE, {})
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    before = stock_latents(pipeline, noise, 3.0)
    wanted = stock_latents(stock(folder, merged(made.handle)), noise, 3.0)
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    assert off(stock_latents(pipeline, noise, 3.0), wanted) < 1e-5 and off(before, wanted) > 1e-2
    pipeline.unload_lora_weights()
    assert torch.equal(stock_latents(pipeline, noise, 3.0), before)


def test_without_its_adapter_a_role_is_the_base(folder, noise):
    """To the bit; with it, it is the merged network."""
    made = student(folder, tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1)
    base, t = denoiser(folder), torch.tensor([0.3, 0.8])
    cond = base.handle.around.prompts(TEXTS)
    with torch.no_grad():
        wanted = base.velocity(noise, t, cond)
        assert torch.equal(with_module(made, made.handle.module).velocity(noise, t, cond), wanted)
        v = made.velocity(noise, t, cond)
        assert off(with_module(made, merged(made.handle)).velocity(noise, t, cond), v) < 1e-5 and off(v, wanted) > 1e-2


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_two_equal_calls_agree_and_checkpointing_changes_no_gradient(folder, noise, tune, autocast):
    """Nothing is dropped at random; with an adapter, its forward is made again in the backward pass."""
    answers, gradients = [], []
    for checkpointing in (False, False, True):
        said = {"lora": {"rank": 2, "targets": "wide"}} if tune == "lora" else {}
        made = student(folder, moved=0.02, tune=tune, gradient_checkpointing=checkpointing, **said)
        made.handle.autocast = autocast
        assert made.handle.module.gradient_checkpointing == checkpointing
        v = made.velocity(noise, torch.tensor([0.6, 0.9]), made.handle.around.prompts(TEXTS))
        answers.append(v.detach())
        gradients.append(torch.autograd.grad(v.square().mean(), list(made.trainable().values())))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for first, *others in zip(*gradients):
        assert all(torch.allclose(first, g, rtol=1e-4, atol=1e-6) for g in others)
    assert all(g.isfinite().all() for g in gradients[0]) and sum(bool(g.any()) for g in gradients[0]) > 40


def test_features_are_the_pictures_alone(folder, noise):
    """[rows, patches, width] of the named layers, patches filled up to a multiple of 32; what follows is not run."""
    role, ran, t = denoiser(folder), [], torch.full((2,), 0.5)
    layers, around = tuple(Z_IMAGE.facts.feature_layers), role.handle.around
    hook = role.handle.module.layers[0].register_forward_hook(lambda *_: ran.append("both"))
    features = role.features(noise, t, around.prompts(TEXTS), layers)
    wide = torch.randn(2, 4, 16, 16)  # of 64 patches: nothing is filled up, so that no text is seen
    told, swapped = (role.features(wide, t, around.prompts(texts))[0] for texts in (TEXTS, TEXTS[::-1]))
    hook.remove()
    assert [f.shape for f in features] == [(2, 32, 32)] * 2 and not ran
    assert told.shape == (2, 64, 32)
    torch.testing.assert_close(told, swapped, atol=1e-4, rtol=1e-4)


# ---- sizes and folders


@pytest.mark.parametrize(("name", "shift"), [("Z-Image-Turbo", 3.0), ("Z-Image", 6.0)])
def test_the_full_size_has_the_published_parameters(name, shift):
    """6.155 B, counted without storage; a known id plans as that."""
    with torch.device("meta"):
        loaded = open_model(f"Tongyi-MAI/{name}")
    assert sum(p.numel() for p in loaded.module.parameters()) / 1e9 == pytest.approx(6.155, abs=5e-4)
    assert Z_IMAGE.row_shape(loaded.module) == (16, 128, 128) and loaded.path == FlowPath(shift=shift)


def test_a_network_without_storage_tells_its_sizes():
    """What a plan asks: a call on the meta device, where no mask can be read."""
    with torch.device("meta"):
        specs = {"teacher": RoleSpec.model_validate({"from": "z_image"})}
        role = Denoiser.of(assemble([Role("teacher")], specs, 0, "meta")["teacher"])
        blank = Z_IMAGE.blank(role.handle.module)
        v = role.velocity(torch.zeros(1, *role.row_shape), torch.ones(1), blank)
    assert v.is_meta and v.shape == (1, *SHAPE)


def test_a_network_from_sizes_takes_the_size_of_the_data(folder):
    """Its config names none; parts around it are borrowed, or asked for in one line."""
    built = Z_IMAGE.build(size="tiny", sample_size=4, shift=2.0, around=str(folder))
    assert Z_IMAGE.row_shape(built.module) == (4, 4, 4) and built.path == FlowPath(shift=2.0)
    assert built.around.key() == open_model(folder).around.key()
    assert not built.module.x_pad_token.any() and not built.module.cap_pad_token.any()
    Z_IMAGE.fit(built.module, (4, 6, 8))
    assert Z_IMAGE.row_shape(built.module) == (4, 6, 8)
    role = Denoiser(with_module(denoiser(folder), built.module).handle, Z_IMAGE, built.path)
    blank = Z_IMAGE.blank(built.module)
    assert role.velocity(torch.randn(1, 4, 6, 8), torch.tensor([0.5]), blank).shape == (1, 4, 6, 8)
    with pytest.raises(UserError, match="load it from a pipeline folder"):
        Z_IMAGE.null(built.module, blank)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "6bb"}, "unknown size '6bb': did you mean '6b'"),
        ({"n_layer": 4}, "unknown key 'n_layer': did you mean 'n_layers'"),
        ({"sample_size": 7}, "sample_size=7"),
    ],
)
def test_wrong_sizes_are_named(said, message):
    """One line with the mend."""
    with pytest.raises(UserError, match=message):
        Z_IMAGE.build(**said)


def test_pipelines_from_elsewhere_are_recognised(folder):
    """Text to image alone: Omni shares the class, but is shown pictures besides."""
    assert family_of(folder) == "z_image"
    config = {"_class_name": "ZImageTransformer2DModel", "siglip_feat_dim": None}
    assert Z_IMAGE.holds(config) and not Z_IMAGE.holds({**config, "siglip_feat_dim": 1152})


def test_a_saved_network_is_the_same_network(folder, noise, tmp_path):
    """Written in diffusers' form and read again, to the bit."""
    role, t = student(folder, moved=0.02), torch.tensor([0.3, 0.8])
    tiny_z_image(tmp_path, shift=6.0)
    Z_IMAGE.save(role.handle.module, tmp_path)
    again, cond = denoiser(tmp_path), role.handle.around.prompts(TEXTS)
    assert again.path == FlowPath(shift=6.0)
    with torch.no_grad():
        assert torch.equal(again.velocity(noise, t, cond), role.velocity(noise, t, cond))
