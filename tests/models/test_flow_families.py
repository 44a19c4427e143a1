"""What every text-to-image family on the flow path must get right, against the stock pipelines that sample it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import addresses
from fewstep.maths.paths import FlowPath
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import family_of, open_model
from fewstep.models.known import KNOWN
from fewstep.models.registry import FAMILIES
from fewstep.nets.discriminator import Discriminator
from fewstep.nets.extra_inputs import folded
from fewstep.roles import Handle, Role, RoleSpec, merged

from .flow_stock import PROMPTS, SIDES, TINY, denoiser, euler, latents, off, pretrained, scheduled, student, with_module

NAMES = tuple(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each family."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny(root / name) for name, tiny in TINY.items()}


@pytest.fixture
def noise() -> Tensor:
    """Latent noise for two rows."""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


# ---- the stock pipeline's samples


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_euler_on_the_declaration_is_the_stock_pipeline(folders, noise, name, guidance):
    """Call, label, sign, condition, null and guidance."""
    pipeline = scheduled(folders[name])
    theirs = latents(pipeline, noise, guidance)
    ours = euler(denoiser(folders[name]), pipeline.scheduler, noise, guidance)
    assert theirs.std() > 0.5
    assert off(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [{"sign": -1}, {"reversed_": True}])
def test_the_wrong_sign_or_time_would_show(folders, noise, name, wrong):
    """The parity above can fail."""
    pipeline = scheduled(folders[name])
    theirs = latents(pipeline, noise, 1.0)
    assert off(euler(denoiser(folders[name]), pipeline.scheduler, noise, 1.0, **wrong), theirs) > 1e-2


# ---- conditions and pictures


@pytest.mark.parametrize("name", NAMES)
def test_other_fields_of_a_condition_survive(folders, name):
    """A second time is no text."""
    around = open_model(folders[name]).around
    cond = around.prompts(PROMPTS).with_(s=torch.tensor([0.2, 0.4]))
    null = around.null(cond)
    assert set(null) == set(cond) and torch.equal(null["s"], cond["s"])
    assert all(null[field].dtype == cond[field].dtype for field in cond)


@pytest.mark.parametrize("name", NAMES)
def test_decoded_latents_are_the_stock_pipelines_images(folders, name):
    """decode(x / scale + shift), in [-1, 1]."""
    pipeline, around = pretrained(folders[name]), open_model(folders[name]).around
    with given_noise(pipeline, addresses(Draw.for_images(0, range(2)))):
        images = torch.from_numpy(
            images_of(pipeline, 2, None, 2, 1.0, PROMPTS, SIDES[type(pipeline).__name__])
        ).permute(0, 3, 1, 2)
    side = images.shape[-1]
    start = Draw.for_images(0, range(2)).normal("rollout.start", 4, 8, 8)
    ours = around.decode(latents(pipeline, start, 1.0, 2))
    assert ours.shape == (2, 3, side, side) and side == 8 * around.factor
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_condition_is_one_that_the_network_takes(folders, name):
    """Right shapes without text encoders; the heads of a discriminator read tokens that are a square."""
    role = denoiser(folders[name])
    assert role.row_shape == (4, 8, 8)
    heads = Discriminator.reading(role, tuple(role.family.facts.feature_layers))
    blank = role.family.blank(role.handle.module)
    features = role.features(
        torch.zeros(1, 4, 8, 8), torch.tensor([0.5]), blank, tuple(role.family.facts.feature_layers)
    )
    assert [f.shape for f in features] == [(1, 64, 16)] * 2 and heads(features).shape == (1,)


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_what_the_stock_constructor_takes(folders, noise, name):
    """With network and scheduler they are the pipeline again."""
    loaded, theirs = open_model(folders[name]), pretrained(folders[name])
    made = type(theirs)(transformer=loaded.module, scheduler=theirs.scheduler, **loaded.around.parts())
    made.set_progress_bar_config(disable=True)
    assert torch.equal(latents(made, noise, 2.0, 2), latents(theirs, noise, 2.0, 2))


# ---- folders and sizes


@pytest.mark.parametrize("name", NAMES)
def test_pipelines_from_elsewhere_are_recognised(folders, name):
    """Family from the network's class, path from the scheduler's config."""
    loaded = open_model(folders[name])
    assert family_of(folders[name]) == loaded.family == name
    assert loaded.path == FlowPath(shift=3.0)


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    [
        ("stable_diffusion_3", "sd3_medium", 2.028),
        ("stable_diffusion_3", "sd35_medium", 2.243),
        ("stable_diffusion_3", "sd35_large", 8.057),
        ("sana", "600m", 0.592),
        ("sana", "1600m", 1.604),
    ],
)
def test_full_sizes_have_the_published_parameters(name, size, billions):
    """Counted without storage."""
    with torch.device("meta"):
        module = FAMILIES.get(name).build(size=size).module
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_size_may_be_changed_field_by_field(name):
    """What is not said comes from the named size, and what is wrong is named with the mend."""
    family = FAMILIES.get(name)
    built = family.build(size="tiny", sample_size=4, num_layers=3, shift=2.0)
    assert family.row_shape(built.module) == (4, 4, 4) and len(built.module.transformer_blocks) == 3
    assert built.path == FlowPath(shift=2.0) and built.module.config.attention_head_dim in (4, 8)
    with pytest.raises(UserError, match="unknown size 'tny': did you mean 'tiny'"):
        family.build(size="tny")
    with pytest.raises(UserError, match="unknown key 'num_layer': did you mean 'num_layers'"):
        family.build(num_layer=3)
    cond = family.blank(built.module)
    alone = Denoiser.of(Handle(Role("teacher"), built.module, RoleSpec(), "frozen", None, name, built.path))
    assert alone.velocity(torch.randn(1, 4, 4, 4), torch.tensor([0.3]), cond).shape == (1, 4, 4, 4)
    with pytest.raises(UserError, match="load it from a pipeline folder"):
        alone.null(cond)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_network_borrows_what_is_around_another(folders, name):
    """Trained from scratch it still needs latents and prompts; where only its sizes are asked for, nothing."""
    family, theirs = FAMILIES.get(name), open_model(folders[name])
    built = family.build(size="tiny", around=str(folders[name]))
    assert torch.equal(built.around.prompts(["a"])["prompt_embeds"], theirs.around.prompts(["a"])["prompt_embeds"])
    assert built.around.key() == theirs.around.key()
    with pytest.raises(UserError, match="no model folder 'nobody/nothing', and no such model in the local"):
        family.build(size="tiny", around="nobody/nothing")
    with torch.device("meta"):
        assert family.build(size="tiny", around="nobody/nothing").around.folder is None


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.family in NAMES])
def test_known_pipelines_have_the_size_that_their_name_says(name):
    """Planned without weights: 512 or 1024 pixels."""
    with torch.device("meta"):
        loaded = open_model(name)
    factor = FAMILIES.get(loaded.family).facts.latent.factor
    side = FAMILIES.get(loaded.family).row_shape(loaded.module)[-1] * factor
    assert side == (512 if "512px" in name else 1024)
    size = {
        "600M": 0.592,
        "0.6B": 0.592,
        "1600M": 1.604,
        "1.6B": 1.6045,
        "3-medium": 2.028,
        "3.5-medium": 2.243,
        "3.5-large": 8.057,
    }
    billions = next(count for word, count in reversed(size.items()) if word in name)
    assert sum(p.numel() for p in loaded.module.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


# ---- the training configuration


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_two_equal_calls_agree_and_checkpointing_changes_no_gradient(folders, noise, name, tune):
    """Nothing is dropped at random; with an adapter, its forward is made again in the backward pass."""
    answers, gradients = [], []
    for checkpointing in (False, False, True):
        said = {"lora": {"rank": 2}} if tune == "lora" else {}
        role = student(folders[name], ("s",), moved=0.02, tune=tune, gradient_checkpointing=checkpointing, **said)
        cond = role.handle.around.prompts(PROMPTS).with_(s=torch.tensor([0.1, 0.5]))
        v = role.velocity(noise, torch.tensor([0.6, 0.9]), cond)
        answers.append(v.detach())
        gradients.append(torch.autograd.grad(v.square().mean(), list(role.trainable().values()), allow_unused=True))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for first, *others in zip(*gradients):
        assert all(first is None if g is None else torch.allclose(first, g, atol=1e-6) for g in others)
    assert sum(g is not None and bool(g.any()) for g in gradients[0]) > 4


@pytest.mark.parametrize("name", NAMES)
def test_upgraded_network_is_its_teacher_at_first_and_always_at_equal_times(folders, noise, name):
    """V(x, t, s) = v(x, t) for all s before training; for s = t and sign +1 whatever was learnt."""
    teacher, t = denoiser(folders[name]), torch.tensor([0.3, 0.8])
    cond = teacher.handle.around.prompts(PROMPTS)
    fresh = student(folders[name], ("s", "sign"))
    with torch.no_grad():
        wanted = teacher.velocity(noise, t, cond)
        for s in (torch.zeros(2), t / 2, t):
            told = cond.with_(s=s, sign=torch.tensor([1.0, -1.0]))
            assert torch.equal(fresh.velocity(noise, t, told), wanted)
        for parameter in fresh.handle.module.extra_inputs.parameters():
            parameter.normal_(std=0.1)
        assert torch.equal(fresh.velocity(noise, t, cond.with_(s=t)), wanted)
        for told in ({"s": t / 2}, {"s": t, "sign": -torch.ones(2)}):
            assert (fresh.velocity(noise, t, cond.with_(**told)) - wanted).abs().amin(0).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_what_joins_the_time_embedding_reaches_blocks_and_last_norm(folders, noise, name):
    """A learnt gap moves the modulation of the first block and that of the output."""
    role, t = student(folders[name], ("s",)), torch.tensor([0.5, 0.9])
    torch.nn.init.normal_(role.handle.module.extra_inputs.embeddings["s"][-1].weight)
    block, last = role.handle.module.transformer_blocks[0], role.handle.module.norm_out
    seen: dict[Any, list[Tensor]] = {block: [], last: []}

    def see(module: Any, args: Any, kwargs: Any) -> None:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim == 2 and len(a) == 2]
        seen[module].append(given[0])

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in (block, last)]
    with torch.no_grad():
        for s in (t, t / 2):
            role.velocity(noise, t, role.handle.around.prompts(PROMPTS).with_(s=s))
    for hook in hooks:
        hook.remove()
    assert all((equal - half).abs().amax(1).min() > 1e-2 for equal, half in seen.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_embedded_guidance_folds_into_the_stock_class(folders, noise, name):
    """A constant input is a bias of the time embedding: the exported network has no further input."""
    role = student(folders[name], ("guidance",), moved=0.02)
    cond, t = role.handle.around.prompts(PROMPTS), torch.tensor([0.4, 0.7])
    plain = with_module(role, folded(role.handle.module, {"guidance": 4.0}))
    with torch.no_grad():
        wanted = role.velocity(noise, t, cond.with_(guidance=torch.full((2,), 4.0)))
        torch.testing.assert_close(plain.velocity(noise, t, cond), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_tunes_attention_and_reads_the_second_time_from_the_label(folders, noise, name):
    """Two blocks' projections and the two time layers; without the adapter the base answers bit by bit."""
    layers = {"stable_diffusion_3": 3 * 4, "sana": 4 * 4}[name]  # block 0 of SD3 attends twice
    role = student(folders[name], ("s", "sign"), tune="lora", lora={"rank": 2}, moved=0.1)
    assert role.shifted and len(role.trainable()) == 2 * (layers + 2)
    teacher, t = denoiser(folders[name]), torch.tensor([0.3, 0.8])
    cond = role.handle.around.prompts(PROMPTS)
    with torch.no_grad():
        base = with_module(role, role.handle.module).velocity(noise, t, cond)
        assert torch.equal(base, teacher.velocity(noise, t, cond))
        few = role.velocity(noise, t, cond.with_(s=torch.zeros(2)))
        plain = with_module(role, merged(role.handle)).velocity(noise, t, cond)  # s = 0 is the ordinary label
    torch.testing.assert_close(few, plain, atol=1e-5, rtol=1e-5)
    assert (few - base).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "layers"), [("stable_diffusion_3", 12 + 6 + 1 + 4 + 2), ("sana", 16 + 4)])
def test_wide_adapters_reach_the_feed_forward_layers_too(folders, name, layers):
    """SD3: text projections of two blocks (the last one answers no text), two networks of picture, one of text."""
    role = student(folders[name], tune="lora", lora={"rank": 2, "targets": "wide"})
    assert len(role.trainable()) == 2 * layers
