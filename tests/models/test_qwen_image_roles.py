"""Qwen-Image as a role and as a folder: extra inputs, adapters, sizes, and what stock pipeline an export becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.exporting.pipeline import generate, load_pipeline
from fewstep.exporting.targets import target_for
from fewstep.maths.average_velocity import average_velocity
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import family_of, open_model
from fewstep.models.qwen_image import QWEN_IMAGE
from fewstep.roles import Role, RoleSpec, assemble
from tests.models.exported import SHAPE, drawn, exported
from tests.models.stock import PROMPTS, denoiser
from tests.models.tiny_qwen_image import tiny_qwen_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_qwen_image(tmp_path_factory.mktemp("tiny") / "qwen")


@pytest.fixture
def noise() -> Tensor:
    """Two rows."""
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


# ---- roles


def student(folder: Path, **said: Any) -> Denoiser:
    """A role that reads a second time and a sign, from the folder's network."""
    specs = {"teacher": RoleSpec.model_validate({"from": str(folder)}), "student": RoleSpec.model_validate(said)}
    roles = [Role("teacher"), Role("student", "full", "teacher", adds=("s", "sign"))]
    return Denoiser.of(assemble(roles, specs, seed=0)["student"])


def test_a_second_time_and_a_sign_change_nothing_at_first(folder, noise):
    """Equal to the base to the bit: full at every s and sign; an adapter at s = 0, told nothing else by its label."""
    base, t = denoiser(folder), torch.tensor([0.4, 0.8])
    cond = base.handle.around.prompts(PROMPTS)
    full, lora = student(folder), student(folder, tune="lora", lora={"rank": 2})
    zero, minus = torch.zeros_like(t), -torch.ones_like(t)
    with torch.no_grad():
        v = base.velocity(noise, t, cond)
        for s in (t, t / 3, zero):
            assert torch.equal(average_velocity(full, noise, t, s, cond, minus), v)
        assert torch.equal(average_velocity(lora, noise, t, zero, cond), v)
        half = base.velocity(noise, t / 2, cond)
        torch.testing.assert_close(average_velocity(lora, noise, t, t, cond), half, atol=1e-6, rtol=1e-5)
        negative = base.velocity(noise, -t / 2, cond)
        twin = average_velocity(lora, noise, t, t, cond, minus)
    torch.testing.assert_close(twin, negative, atol=1e-6, rtol=1e-5)
    assert (negative - half).abs().max() > 1e-2


def test_what_a_full_student_reads_reaches_the_network(folder, noise):
    """Once its last layers are moved, s and sign count; s = t and sign +1 remain the ordinary network."""
    base, full, t = denoiser(folder), student(folder), torch.tensor([0.4, 0.8])
    cond = base.handle.around.prompts(PROMPTS)
    with torch.no_grad():
        for part in full.handle.module.extra_inputs.embeddings.values():
            part[-1].weight.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
        v = base.velocity(noise, t, cond)
        assert torch.equal(average_velocity(full, noise, t, t, cond), v)
        assert (average_velocity(full, noise, t, t / 2, cond) - v).abs().max() > 1e-2
        assert (average_velocity(full, noise, t, t, cond, -torch.ones(2)) - v).abs().max() > 1e-2


@pytest.mark.parametrize(("width", "layers"), [("default", 10), ("wide", 26)])
def test_adapters_reach_the_named_layers(folder, width, layers):
    """Two blocks of 4 (wide: 12) projections, and the two layers of the time embedding, whose label means more."""
    made = student(folder, tune="lora", lora={"rank": 2, "targets": width})
    assert len(made.handle.trainable()) == 2 * layers
    assert {n.split(".")[0] for n in made.handle.trainable()} == {"down", "up"}
    assert sum("timestep_embedder" in n for n in made.handle.trainable()) == 4


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_checkpointing_changes_no_gradient(folder, noise, tune):
    """With an adapter, or extra inputs, whose forward is made again in the backward pass; two calls agree to the bit."""
    gradients = []
    for checkpointing in (False, True):
        made = student(folder, tune=tune, lora={"rank": 2}, gradient_checkpointing=checkpointing)
        assert made.handle.module.gradient_checkpointing == checkpointing
        for name, p in made.handle.trainable().items():
            if tune == "lora" or "extra_inputs" in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(3))
        cond, t = made.handle.around.prompts(PROMPTS), torch.full((2,), 0.6)
        v = average_velocity(made, noise, t, t / 3, cond)
        assert torch.equal(v, average_velocity(made, noise, t, t / 3, cond))
        gradients.append(
            torch.autograd.grad(v.square().mean(), list(made.handle.trainable().values()), allow_unused=True)
        )
    pairs = [(a, b) for a, b in zip(*gradients) if a is not None]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs) and any(a.any() for a, _ in pairs)


def test_time_is_not_rounded_under_autocast(folder, noise):
    """.991 and .993 are one number in bfloat16, and in bfloat16 linear layers the network still tells them apart."""
    role, told = denoiser(folder), []
    role.handle.autocast = torch.bfloat16
    role.handle.module.time_text_embed.time_proj.register_forward_pre_hook(lambda _m, args: told.append(args[0]))
    cond, near = role.handle.around.prompts(PROMPTS), torch.tensor([0.991, 0.993])
    with torch.no_grad():
        v = role.velocity(noise[:1].repeat(2, 1, 1, 1), near, cond[torch.tensor([0, 0])])
        role.handle.autocast = None
        exact = role.velocity(noise[:1].repeat(2, 1, 1, 1), near, cond[torch.tensor([0, 0])])
    assert near.bfloat16()[0] == near.bfloat16()[1]
    torch.testing.assert_close(told[0], near)
    assert 0 < (v - exact).abs().max() < 0.1 and not torch.equal(v[0], v[1])


def test_features_are_the_pictures_alone(folder, noise):
    """[rows, patches, width] of the deepest layer; what follows is not run."""
    role = denoiser(folder)
    ran: list[str] = []
    hook = role.handle.module.proj_out.register_forward_hook(lambda *_: ran.append("out"))
    (deepest,) = role.features(noise, torch.full((2,), 0.5), role.handle.around.prompts(PROMPTS))
    hook.remove()
    assert deepest.shape == (2, 16, 32) and not ran


# ---- sizes and folders


def test_the_full_size_has_the_published_parameters():
    """20.430 B, counted without storage; a known id plans as that."""
    with torch.device("meta"):
        module = open_model("Qwen/Qwen-Image").module
    assert sum(p.numel() for p in module.parameters()) / 1e9 == pytest.approx(20.430, abs=5e-4)
    assert QWEN_IMAGE.row_shape(module) == (16, 128, 128)


def test_an_adapter_of_the_papers_rank_has_its_size():
    """Rank 64 on attention and feed-forward layers: 0.42 B and 0.8 M for the time embedding."""
    with torch.device("meta"):
        specs = {
            "student": RoleSpec.model_validate(
                {"from": "Qwen/Qwen-Image", "tune": "lora", "lora": {"rank": 64, "targets": "wide"}}
            )
        }
        made = assemble([Role("student", adds=("s", "sign"))], specs, 0, "meta")["student"]
    assert sum(p.numel() for p in made.trainable().values()) == pytest.approx(0.4247e9 + 0.0006e9, rel=1e-3)


def test_the_network_takes_the_size_of_the_data():
    """Its config names none: without data it is the pipeline's 1024 pixels, or what `build` says."""
    built = QWEN_IMAGE.build(size="tiny", sample_size=4, shift=3.0)
    assert QWEN_IMAGE.row_shape(built.module) == (4, 4, 4)
    assert built.path == FlowPath(shift=3.0)
    QWEN_IMAGE.fit(built.module, (4, 6, 8))
    assert QWEN_IMAGE.row_shape(built.module) == (4, 6, 8)
    role = Denoiser.of(
        assemble([Role("student")], {"student": RoleSpec.model_validate({"from": "qwen_image"})}, 0)["student"]
    )
    assert role.velocity(torch.randn(1, 4, 6, 8), torch.tensor([0.5]), QWEN_IMAGE.blank(role.handle.module)).shape == (
        1,
        4,
        6,
        8,
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "20bb"}, "unknown size '20bb': did you mean '20b'"),
        ({"sample_siez": 4}, "unknown key 'sample_siez': did you mean 'sample_size'"),
        ({"sample_size": 7}, "sample_size=7"),
    ],
)
def test_wrong_sizes_are_named(said, message):
    """One line with the mend."""
    with pytest.raises(UserError, match=message):
        QWEN_IMAGE.build(**said)


def test_pipelines_from_elsewhere_are_recognised(folder):
    """Text to image alone: networks for editing and for layers share the class, but have more inputs."""
    assert family_of(folder) == "qwen_image"
    config = dict(open_model(folder).module.config)
    assert QWEN_IMAGE.holds({**config, "_class_name": "QwenImageTransformer2DModel"})
    assert not QWEN_IMAGE.holds({**config, "_class_name": "QwenImageTransformer2DModel", "zero_cond_t": True})


def test_versions_that_attend_to_padding_are_refused(folder, monkeypatch):
    """diffusers 0.36 takes the mask and does not use it."""
    from diffusers.models.transformers import transformer_qwenimage

    monkeypatch.delattr(transformer_qwenimage, "compute_text_seq_len_from_mask")
    for make in (lambda: QWEN_IMAGE.build(size="tiny"), lambda: open_model(folder)):
        with pytest.raises(UserError, match=r"install diffusers >= 0\.38"):
            make()


# ---- export


@pytest.mark.parametrize("kind", ["ode", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_exported_stock_pipeline_makes_the_solvers_images(folder, tmp_path, kind, steps):
    """Config alone: static shift, no terminal level; noise in the sampler's order; the size is in the card."""
    out, ours = exported(denoiser(folder), tmp_path / "m", kind, steps)
    theirs = load_pipeline(out, device="cpu")
    assert type(theirs).__name__ == "QwenImagePipeline" and open_model(out).path == FlowPath()
    images = drawn(theirs, steps, None)
    torch.testing.assert_close(images, ours, atol=1e-4, rtol=0)
    assert theirs.scheduler.timesteps.tolist() == pytest.approx([1000 * (1 - i / steps) for i in range(steps)])
    made = generate(theirs, 2, prompts=PROMPTS)
    assert (made.images / 255 - images).abs().max() <= 0.5 / 255 + 1e-4 and made.nfe == steps
    assert "height=16, width=16" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("schedule", "reads", "carried"),
    [
        ({"kind": "renoise", "target": "zero"}, (), False),  # an adapter: its label says s = 0
        ({"kind": "ode"}, (), False),
        ({"kind": "ode", "guidance": 3.0}, (), True),  # the stock pipeline rescales what it guides
        ({"kind": "renoise", "target": "zero"}, ("s", "sign"), True),
        ({"kind": "ode", "target": "next"}, ("s",), True),
        ({"kind": "ode", "target": "same"}, ("s",), False),  # an ordinary network
    ],
)
def test_the_stock_pipeline_serves_what_it_can(schedule, reads, carried):
    """Neither a second time nor plain guidance; for those the folder carries a pipeline."""
    path = FlowPath()
    target = target_for(QWEN_IMAGE, path, Schedule(u=path.grid(2), **schedule), labels=False, latent=True, reads=reads)
    assert target.pipeline_name == ("FewStepQwenImagePipeline" if carried else "QwenImagePipeline")
    assert target.carried == carried
