"""Stable Diffusion networks shown as flow networks, against the stock pipelines that sample them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.maths.losses import mse_rows
from fewstep.maths.paths import VPPath, add_noise
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import family_of, open_model
from fewstep.models.registry import FAMILIES
from fewstep.roles import Handle, Role, RoleSpec, assemble

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


# ---- the stock pipeline's samples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_euler_on_flow_states_is_the_stock_pipeline_with_ddim(folders, noise, kind, guidance):
    """y = x / (alpha + sigma) is exact, and so are conditions, null, and guidance."""
    theirs = latents(stock(folders[kind]), noise, guidance)
    ours = own(denoiser(folders[kind]), noise, guidance)
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_renoising_is_the_stock_pipeline_with_lcm(folders, noise, kind):
    """x <- (1 - t') x0 + t' eps with the pipeline's own eps."""
    theirs = latents(stock(folders[kind], "lcm"), noise, 3.0)
    torch.testing.assert_close(own(denoiser(folders[kind]), noise, 3.0, "renoise"), theirs, atol=1e-4, rtol=1e-5)


def test_the_wrong_parameterisation_would_show(folders, noise):
    """The parity above can fail: v-prediction read as eps is far off."""
    theirs = latents(stock(folders["sd21"]), noise, 1.0)
    path = denoiser(folders["sd21"]).path
    wrong = denoiser(folders["sd21"], VPPath(path.alphas_cumprod, "epsilon"))
    assert (own(wrong, noise, 1.0) - theirs).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "target"), [("sd15", "eps"), ("sd21", "v")])
def test_the_loss_is_measured_in_the_networks_own_output(folders, noise, kind, target):
    """eps, or v = alpha eps - sigma x0 on the native state."""
    role, k = denoiser(folders[kind]), 600
    x0, cond, t = (
        torch.randn_like(noise),
        role.handle.around.prompts(PROMPTS),
        torch.full((2,), role.path.time(k / 1000)),
    )
    abar = torch.tensor(role.path.alphas_cumprod[k])
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    wanted = noise if target == "eps" else alpha * noise - sigma * x0
    with torch.no_grad():
        state = (alpha * x0 + sigma * noise).float()
        answer = role.handle.module(state, k, encoder_hidden_states=cond["prompt_embeds"]).sample
        loss = role.denoising_loss(x0, noise, t, cond)
    torch.testing.assert_close(loss, mse_rows(answer, wanted.float()), rtol=1e-4, atol=0)


# ---- sizes


@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_condition_is_one_that_the_network_takes(folders, noise, kind):
    """Right shapes without a text encoder."""
    role = denoiser(folders[kind])
    blank = role.family.blank(role.handle.module)
    assert role.velocity(noise[:1], torch.tensor([0.5]), blank).shape == (1, 4, 8, 8)


def test_pixel_size_and_channels_of_latents(folders):
    """[channels, height, width], also where a config names both sides."""
    module = open_model(folders["sd15"]).module
    family = FAMILIES.get("stable_diffusion")
    assert family.row_shape(module) == (4, 8, 8)
    module.register_to_config(sample_size=[8, 16])
    assert family.row_shape(module) == (4, 8, 16)


@pytest.mark.parametrize(
    ("family", "size", "billions"),
    [("stable_diffusion", "sd15", 0.860), ("stable_diffusion", "sd21", 0.866), ("stable_diffusion_xl", "sdxl", 2.567)],
)
def test_full_sizes_have_the_published_parameters(family, size, billions):
    """Counted without storage."""
    with torch.device("meta"):
        module = FAMILIES.get(family).build(size=size).module
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_size_may_be_changed_field_by_field(family):
    """What is not said comes from the named size."""
    built = FAMILIES.get(family).build(
        size="tiny", sample_size=4, prediction_type="v_prediction", block_out_channels=[4, 8]
    )
    assert FAMILIES.get(family).row_shape(built.module) == (4, 4, 4)
    assert built.path.prediction_type == "v_prediction" and built.path.t_max == pytest.approx(0.93596, abs=1e-5)
    assert built.module.config.block_out_channels == (4, 8) and built.module.config.layers_per_block == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "sd155"}, "unknown size 'sd155': did you mean 'sd15'"),
        ({"sample_siez": 4}, "unknown key 'sample_siez': did you mean 'sample_size'"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
    ],
)
def test_wrong_sizes_are_named(said, message):
    """One line with the mend."""
    with pytest.raises(UserError, match=message):
        FAMILIES.get("stable_diffusion").build(**said)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_built_network_runs_on_its_condition(family):
    """Random weights of the stock class."""
    built = FAMILIES.get(family).build(size="tiny")
    width = built.module.config.cross_attention_dim
    cond = Cond(prompt_embeds=torch.randn(2, 5, width), pooled=torch.randn(2, 16), time_ids=torch.full((2, 6), 64.0))
    role = Denoiser.of(Handle(Role("teacher"), built.module, RoleSpec(), "frozen", None, family, built.path))
    assert role.velocity(torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9]), cond).shape == (2, 4, 8, 8)
    with pytest.raises(UserError, match="load it from a pipeline folder"):
        role.null(cond)


# ---- folders and roles


@pytest.mark.parametrize(
    ("kind", "family"), [("sd15", "stable_diffusion"), ("sd21", "stable_diffusion"), ("sdxl", "stable_diffusion_xl")]
)
def test_pipelines_from_elsewhere_are_recognised(folders, kind, family):
    """One network class, two families: XL has text_time inputs."""
    assert family_of(folders[kind]) == family == open_model(folders[kind]).family


def test_half_precision_folders_are_loaded_in_float32(folders, tmp_path):
    """Float32 at the door of a network."""
    pipeline = DiffusionPipeline.from_pretrained(folders["sd15"], use_safetensors=True, dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half")
    loaded = open_model(tmp_path / "half")
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32} == {loaded.around.part("vae").dtype}


def roles(folder: Path, **student: Any) -> dict[str, Handle]:
    """A frozen teacher, and a student that starts from it."""
    specs = {"teacher": RoleSpec.model_validate({"from": str(folder)}), "student": RoleSpec.model_validate(student)}
    return assemble([Role("teacher"), Role("student", "full", "teacher", adds=student.pop("adds", ()))], specs, seed=0)


def test_a_student_with_the_input_leaves_its_teacher_as_it_was(folders):
    """The student is a copy; both share what is around them."""
    specs = {"teacher": RoleSpec.model_validate({"from": str(folders["sdxl"])})}
    made = assemble([Role("teacher"), Role("student", "full", "teacher", adds=("guidance",))], specs, seed=0)
    assert made["teacher"].module.time_embedding.cond_proj is None
    assert made["student"].module.time_embedding.cond_proj is not None
    assert made["student"].around is made["teacher"].around


@pytest.mark.parametrize(("width", "layers"), [("default", 32), ("wide", 77)])
def test_adapters_reach_the_named_layers(folders, width, layers):
    """Four transformers of two attentions of four projections; wide: four layers more of each, 29 of eight ResNets."""
    student = roles(folders["sd15"], tune="lora", lora={"rank": 2, "targets": width})["student"]
    assert len(student.trainable()) == 2 * layers


def test_checkpointing_changes_no_gradient(folders, noise):
    """With an adapter, whose forward is made again in the backward pass."""
    gradients = []
    for checkpointing in (False, True):
        made = roles(folders["sdxl"], tune="lora", lora={"rank": 2}, gradient_checkpointing=checkpointing)
        student = Denoiser.of(made["student"])
        for p in student.trainable().values():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(3))
        x0 = student.x0(noise, torch.full((2,), 0.6), student.handle.around.prompts(PROMPTS))
        gradients.append(torch.autograd.grad(x0.square().mean(), list(student.trainable().values())))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients)) and any(g.any() for g in gradients[0])


def test_features_come_from_the_deepest_layers_first(folders, noise):
    """mid_block by default; the up blocks are not run."""
    role, t = denoiser(folders["sd15"]), torch.full((2,), 0.5)
    cond = role.handle.around.prompts(PROMPTS)
    ran: list[str] = []
    hook = role.handle.module.up_blocks[0].register_forward_hook(lambda *_: ran.append("up"))
    (deepest,) = role.features(noise, t, cond)
    several = role.features(noise, t, cond, tuple(role.family.facts.feature_layers))
    hook.remove()
    assert deepest.shape == (2, 16, 4, 4) and not ran
    assert [f.shape[1] for f in several] == [16, 16, 8]


def test_noise_levels_between_table_entries_are_understood(folders, noise):
    """Fractional timesteps go to the network as they are, and v is continuous in t."""
    role = denoiser(folders["sd15"])
    cond, t = role.handle.around.prompts(PROMPTS), role.path.time(torch.tensor([0.5003, 0.5004]))
    with torch.no_grad():
        x = add_noise(torch.zeros_like(noise[:1]), noise[:1], t[:1]).repeat(2, 1, 1, 1)
        near = role.velocity(x, t, cond[torch.tensor([0, 0])])
    assert 0 < (near[0] - near[1]).abs().max() < 1e-2
