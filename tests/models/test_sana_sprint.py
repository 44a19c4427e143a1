"""SANA-Sprint shown as a flow network, against the stock pipeline that samples it; guidance; SANA bases; sizes."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from torch import Tensor

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.exporting.grids import same_pairs, trained_pairs
from fewstep.exporting.lora import LORA_FILE, save_lora
from fewstep.maths.angle_path import AngleFlowPath
from fewstep.maths.guidance import guided
from fewstep.maths.paths import FlowPath, x0_from_velocity
from fewstep.maths.solvers import step
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import family_of, open_model
from fewstep.models.sana_sprint import SANA_SPRINT
from fewstep.roles import Role, RoleSpec, assemble, merged

from .flow_stock import PROMPTS, denoiser, off, pretrained, student, with_module
from .tiny_sana import tiny_sana
from .tiny_sana_sprint import tiny_sana_sprint

SHAPE = (4, 8, 8)
NOISE = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.3, 0.8])
Velocity = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_sana_sprint(tmp_path_factory.mktemp("tiny") / "sprint")


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SANA that is fed t, as SANA-Sprint's teachers are."""
    return tiny_sana(tmp_path_factory.mktemp("tiny") / "sana", timestep_scale=0.001)


def stock_latents(pipeline: Any, guidance: float, steps: int = 2, noise: Tensor = NOISE, **said: Any) -> Tensor:
    """What the stock pipeline makes of noise."""
    size = {"height": 4 * noise.shape[2], "width": 4 * noise.shape[3], "use_resolution_binning": False}
    return pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
        **size,
        **said,
    ).images


def alone(steps: int) -> dict[str, Any]:
    """Numbers of steps other than 2 have no second angle of their own."""
    return {} if steps == 2 else {"intermediate_timesteps": None}


@torch.no_grad()
def renoised(path: AngleFlowPath, velocity: Velocity, steps: int = 2, x: Tensor = NOISE) -> Tensor:
    """x0 = y - t v, noised again to the next of the path's levels."""
    generator = torch.Generator().manual_seed(7)
    for u, u_next in itertools.pairwise((*path.grid(steps), 0.0)):
        t, t_next = x.new_full((len(x),), path.time(u)), path.time(u_next) if u_next else 0.0
        x0 = x0_from_velocity(x, velocity(x, t), t)
        x = step("renoise", x, x0, path.time(u), t_next, torch.randn(x.shape, generator=generator))
    return x


def told(cond: Cond, guidance: float) -> Cond:
    """`cond` with the same guidance in each row."""
    return cond.with_(guidance=torch.full((len(cond["prompt_embeds"]),), guidance))


def asked(role: Denoiser, guidance: float = 4.5) -> Cond:
    """The prompts, with a guidance."""
    return told(role.handle.around.prompts(PROMPTS), guidance)


def stock(folder: Path, transformer: Any = None, scheduler: Any = None) -> Any:
    """diffusers' own pipeline, maybe with another network or scheduler."""
    pipeline = copy.copy(pretrained(folder))
    pipeline.register_modules(
        transformer=transformer or pipeline.transformer, scheduler=scheduler or pipeline.scheduler
    )
    return pipeline


# ---- the stock pipeline's samples


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_renoising_flow_states_is_the_stock_pipeline(folder, steps, guidance):
    """v = output, fed t and a tenth of the guidance, on even angles, or pi/2 and 1.3; no sigma and no F is left."""
    role = denoiser(folder)
    theirs = stock_latents(stock(folder), guidance, steps, **alone(steps))
    cond = asked(role, guidance)
    assert theirs.std() > 0.3 and role.path == AngleFlowPath()
    assert off(renoised(role.path, lambda x, t: role.velocity(x, t, cond), steps), theirs) < 1e-5


def test_a_wrong_sign_time_unit_or_guidance_would_show(folder):
    """The parity above can fail: each flip is off by more than .01."""
    role, theirs = denoiser(folder), stock_latents(stock(folder), 4.5)
    cond = asked(role)
    wrong: list[Velocity] = [
        lambda x, t: -role.velocity(x, t, cond),
        lambda x, t: role.velocity(x, 1 - t, cond),
        lambda x, t: role.velocity(x, 1000 * t, cond),
        lambda x, t: role.velocity(x, role.path.clock(t) * torch.pi / 2, cond),  # the angle
        lambda x, t: role.velocity(x, t, told(cond, 45.0)),  # not in the network's unit
        lambda x, t: role.velocity(x, t, told(cond, 3.5)),  # the scale minus one
        lambda x, t: role.velocity(x, t, cond.with_(prompt_embeds=cond["prompt_embeds"].flip(0))),
        lambda x, t: role.velocity(x.mT, t, cond).mT,
    ]
    assert all(off(renoised(role.path, w), theirs) > 1e-2 for w in wrong)
    even = [1.0, 0.5]  # not the pipeline's own second level
    levels = AngleFlowPath()
    object.__setattr__(levels, "grid", lambda _: even)
    assert off(renoised(levels, lambda x, t: role.velocity(x, t, cond)), theirs) > 1e-2


def test_height_need_not_be_width(folder):
    """Latents of 8 x 16, rows by rows; from pi/2 itself, which the pipeline's default exceeds by 4e-6."""
    role, noise = denoiser(folder), torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(2))
    cond, theirs = asked(role), stock_latents(stock(folder), 4.5, noise=noise, max_timesteps=torch.pi / 2)
    assert off(renoised(role.path, lambda x, t: role.velocity(x, t, cond), x=noise), theirs) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_pipeline_visits_the_trained_levels(folder, steps):
    """Angles in its scheduler after it ran, and times that the network was fed, are the path's own."""
    pipeline, fed = stock(folder, scheduler=SCMScheduler()), []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, said: fed.append(said["timestep"][0].item()), with_kwargs=True
    )
    stock_latents(pipeline, 4.5, steps, **alone(steps))
    hook.remove()
    path = open_model(folder).path
    assert same_pairs(trained_pairs(path, path.grid(steps)), list(zip(fed, fed)))
    angles = [a / (torch.pi / 2) for a in pipeline.scheduler.timesteps.tolist()]
    assert angles == pytest.approx([*path.grid(steps), 0], abs=1e-5)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_the_pipelines_sigma_changes_no_image(folder, sigma_data):
    """It multiplies states, noise and answers alike, so a student needs no scheduler but the default one."""
    pipeline = stock(folder, scheduler=SCMScheduler(sigma_data=sigma_data))
    assert off(stock_latents(pipeline, 4.5), stock_latents(stock(folder), 4.5)) < 1e-5


# ---- prompts and pictures


def test_prompts_and_no_condition_are_the_pipelines_own(folder):
    """With the pipeline's instruction before a prompt; without, the empty one, for which this pipeline has no use."""
    around, theirs = open_model(folder).around, pretrained(folder)
    instruction = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    cond = around.prompts(PROMPTS)
    null = around.null(told(cond, 4.5))
    for ours, texts, said in ((cond, PROMPTS, instruction), (null, ["", ""], None)):
        embeds, mask = theirs.encode_prompt(texts, device="cpu", complex_human_instruction=said)
        torch.testing.assert_close(ours["prompt_embeds"], embeds)
        assert torch.equal(ours["mask"], mask)
    assert set(cond) == {"prompt_embeds", "mask"} and torch.equal(null["guidance"], torch.full((2,), 4.5))


def test_decoded_latents_are_the_stock_pipelines_images(folder):
    """decode(x / scale): the samples are divided by the pipeline's sigma before."""
    made = stock_latents(stock(folder), 4.5)
    said: dict[str, Any] = {"latents": NOISE, "guidance_scale": 4.5, "height": 32, "width": 32, "output_type": "np"}
    images = stock(folder)(PROMPTS, generator=torch.Generator().manual_seed(7), use_resolution_binning=False, **said)
    ours = (open_model(folder).around.decode(made) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, torch.from_numpy(images.images).permute(0, 3, 1, 2), atol=1e-5, rtol=0)


def test_parts_are_what_the_stock_constructor_takes(folder):
    """With network and scheduler they are the pipeline again."""
    loaded = open_model(folder)
    made = SanaSprintPipeline(transformer=loaded.module, scheduler=SCMScheduler(), **loaded.around.parts())
    made.set_progress_bar_config(disable=True)
    assert torch.equal(stock_latents(made, 4.5), stock_latents(stock(folder), 4.5))


# ---- guidance as an input


@torch.no_grad()
def test_a_teacher_that_is_told_its_guidance_is_guided_by_one_call(folder):
    """The network at this scale, outside an interval at 1, which is also what a condition that says none means."""
    role, calls = denoiser(folder), []
    cond = role.handle.around.prompts(PROMPTS)
    at, plain = (role.velocity(NOISE, T, told(cond, scale)) for scale in (4.5, 1.0))
    assert torch.equal(role.velocity(NOISE, T, cond), plain) and off(at, plain) > 1e-2
    hook = role.handle.module.register_forward_pre_hook(
        lambda module, args, said: calls.append(len(said["hidden_states"])), with_kwargs=True
    )
    found, inside = guided(role, NOISE, T, cond, 4.5), guided(role, NOISE, T, cond, 4.5, interval=(0.0, 0.5))
    hook.remove()
    torch.testing.assert_close(found, at)
    torch.testing.assert_close(inside, torch.stack([at[0], plain[1]]))
    assert calls == [2, 2] and role.embeds_guidance


def test_a_student_keeps_the_trained_input(folder):
    """Told a guidance it starts as the teacher at that guidance, and no further input is attached."""
    base, made = denoiser(folder), student(folder, ("guidance",))
    assert not hasattr(made.handle.module, "extra_inputs")
    assert torch.equal(made.velocity(NOISE, T, asked(made)), base.velocity(NOISE, T, asked(base)))


def test_a_sealed_network_gives_one_image_whatever_guidance_is_asked_for(folder):
    """The stock pipeline's default of 4.5 is fed to an input that always says 1; the student itself is as it was."""
    role = denoiser(folder)
    sealed = stock(folder, SANA_SPRINT.sealed(role.handle.module))
    images = [stock_latents(sealed, scale) for scale in (1.0, 4.5, 7.0)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[1], images[2])
    plain = stock(folder, role.handle.module)
    assert off(images[0], stock_latents(plain, 1.0)) < 1e-5 < 1e-2 < off(images[0], stock_latents(plain, 4.5))


def test_a_second_time_and_a_sign_change_nothing_at_first_and_nothing_at_equal_times(folder):
    """To the bit; once learnt, s and sign count."""
    base, made = denoiser(folder), student(folder, ("s", "sign"))
    cond = asked(base)
    with torch.no_grad():
        wanted = base.velocity(NOISE, T, cond)
        for s in (torch.zeros(2), T / 2, T):
            assert torch.equal(made.velocity(NOISE, T, cond.with_(s=s, sign=torch.tensor([1.0, -1.0]))), wanted)
        for part in made.handle.module.extra_inputs.embeddings.values():
            part[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
        assert torch.equal(made.velocity(NOISE, T, cond.with_(s=T)), wanted)
        for more in ({"s": T / 2}, {"s": T, "sign": -torch.ones(2)}):
            assert off(made.velocity(NOISE, T, cond.with_(**more)), wanted) > 1e-2


def test_guidance_beside_another_input_is_told_once(folder):
    """Both go through the added inputs, which fold away on export; the stock class's own then stays at 1."""
    made = student(folder, ("delta", "guidance"))
    cond = made.handle.around.prompts(PROMPTS)
    with torch.no_grad():
        wanted = denoiser(folder).velocity(NOISE, T, cond)
        assert torch.equal(made.velocity(NOISE, T, told(cond, 4.5).with_(delta=torch.ones(2))), wanted)


# ---- from a SANA


def from_base(base: Path) -> Denoiser:
    """A student of this family made from a SANA."""
    spec = RoleSpec.model_validate({"from": "sana_sprint", "build": {"base": str(base)}, "tune": "full"})
    return Denoiser.of(assemble([Role("student", "full", adds=("guidance",))], {"student": spec}, seed=0)["student"])


def test_a_sana_gains_the_input_and_is_at_first_the_same(sana):
    """To the bit, whatever guidance it is told, with a gradient; it is fed t where SANA says 1000 t timestep_scale."""
    teacher, made = denoiser(sana), from_base(sana)
    cond = teacher.handle.around.prompts(PROMPTS)
    with torch.no_grad():
        wanted = teacher.velocity(NOISE, T, cond)
    found = made.velocity(NOISE, T, told(cond, 4.5))
    assert torch.equal(found, wanted) and torch.equal(made.velocity(NOISE, T, told(cond, 1.0)), wanted)
    found.square().mean().backward()
    last = made.handle.module.time_embed.guidance_embedder.linear_2
    assert last.weight.grad.abs().max() > 0
    assert made.family is SANA_SPRINT and made.path == AngleFlowPath()
    assert made.handle.around.key() == teacher.handle.around.key()
    torch.testing.assert_close(dict(made.null(cond)), dict(teacher.null(cond)))


def test_what_came_of_a_sana_is_saved_as_the_stock_class(sana, folder, tmp_path):
    """The stock pipeline reads it, and so does this family; learnt, the guidance counts."""
    made = from_base(sana)
    learnt = made.handle.module.time_embed.guidance_embedder.linear_2.weight
    torch.nn.init.normal_(learnt, generator=torch.Generator().manual_seed(0))
    pipeline = SanaSprintPipeline(
        transformer=made.handle.module, scheduler=SCMScheduler(), **made.handle.around.parts()
    )
    pipeline.save_pretrained(tmp_path / "made", safe_serialization=True)
    assert family_of(tmp_path / "made") == "sana_sprint"
    again = denoiser(tmp_path / "made")
    cond = asked(again)
    theirs = stock_latents(stock(tmp_path / "made"), 4.5)
    assert off(renoised(again.path, lambda x, t: again.velocity(x, t, cond)), theirs) < 1e-5
    with torch.no_grad():
        assert torch.equal(again.velocity(NOISE, T, cond), made.velocity(NOISE, T, cond))
    assert off(theirs, stock_latents(stock(tmp_path / "made"), 1.0)) > 1e-2


def test_a_base_that_is_fed_1000_t_or_is_no_sana_is_refused(folder, tmp_path):
    """The pipeline feeds t: no change of names makes such a network right."""
    with pytest.raises(UserError, match="is fed 1000 t, and SANA-Sprint's pipeline feeds t: name a SANA of"):
        SANA_SPRINT.build(base=str(tiny_sana(tmp_path / "sana")))
    with pytest.raises(UserError, match="is of family sana_sprint: name a SANA"):
        SANA_SPRINT.build(base=str(folder))
    with pytest.raises(UserError, match="unknown key 'size'"):
        SANA_SPRINT.build(base=str(folder), size="tiny")


@torch.no_grad()
def test_what_has_just_gained_its_input_is_guided_by_two_calls_and_learns_it_in_full(sana):
    """As a teacher it is the SANA that it was; an adapter would not reach the new layers."""
    made, teacher = from_base(sana), denoiser(sana)
    assert made.handle.origin == str(sana)  # which the card names
    teacher_too = with_module(made, made.handle.module)
    teacher_too.handle.role = Role("teacher")
    cond = teacher.handle.around.prompts(PROMPTS)
    wanted = guided(teacher, NOISE, T, cond, 4.5)
    assert not teacher_too.embeds_guidance and torch.equal(guided(teacher_too, NOISE, T, cond, 4.5), wanted)
    spec = RoleSpec.model_validate({"from": "sana_sprint", "build": {"base": str(sana)}, "tune": "lora"})
    with pytest.raises(UserError, match=r"gains an input \(guidance\): write tune: full"):
        assemble([Role("student", adds=("guidance",))], {"student": spec}, seed=0)


# ---- roles


@pytest.mark.parametrize(("width", "layers"), [("default", 2 * 8), ("wide", 2 * 10)])
def test_the_stock_loader_reads_an_adapter(folder, tmp_path, width, layers):
    """Two blocks of 8 (wide: 10) layers. On the base, the merged network's images; unloaded, the base to the bit."""
    made = student(folder, tune="lora", lora={"rank": 2, "alpha": 4, "targets": width}, moved=0.1)
    assert len({name.split(".")[1] for name in made.trainable()}) == layers
    save_lora(made.handle.adapter, SANA_SPRINT.facts.lora_prefix, tmp_path / LORA_FILE, {})
    pipeline = SanaSprintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    before = stock_latents(pipeline, 4.5)
    wanted = stock_latents(stock(folder, merged(made.handle)), 4.5)
    pipeline.load_lora_weights(tmp_path)
    assert off(stock_latents(pipeline, 4.5), wanted) < 1e-5 and off(before, wanted) > 1e-2
    pipeline.unload_lora_weights()
    assert torch.equal(stock_latents(pipeline, 4.5), before)


def test_without_its_adapter_a_role_is_the_base(folder):
    """To the bit; with it, it is the merged network."""
    made = student(folder, tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1)
    base, cond = denoiser(folder), asked(made)
    with torch.no_grad():
        wanted, v = base.velocity(NOISE, T, cond), made.velocity(NOISE, T, cond)
        assert torch.equal(with_module(made, made.handle.module).velocity(NOISE, T, cond), wanted)
        assert off(with_module(made, merged(made.handle)).velocity(NOISE, T, cond), v) < 1e-5 and off(v, wanted) > 1e-2


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_two_equal_calls_agree_and_checkpointing_changes_no_gradient(folder, tune):
    """Nothing is dropped at random; with an adapter, its forward is made again in the backward pass."""
    answers, gradients = [], []
    for checkpointing in (False, False, True):
        said = {"lora": {"rank": 2, "targets": "wide"}} if tune == "lora" else {}
        made = student(folder, moved=0.02, tune=tune, gradient_checkpointing=checkpointing, **said)
        assert made.handle.module.gradient_checkpointing == checkpointing
        v = made.velocity(NOISE, T, asked(made))
        answers.append(v.detach())
        gradients.append(torch.autograd.grad(v.square().mean(), list(made.trainable().values()), allow_unused=True))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for first, *others in zip(*gradients):
        assert all(first is None if g is None else torch.allclose(first, g, rtol=1e-4, atol=1e-6) for g in others)
    assert sum(g is not None and bool(g.any()) for g in gradients[0]) > 4


# ---- sizes and folders


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Sana_Sprint_0.6B_1024px_diffusers", 0.594),
        ("Sana_Sprint_1.6B_1024px_diffusers", 1.610),
        ("Sana_Sprint_0.6B_1024px_teacher_diffusers", 0.592),
        ("SANA_Sprint_1.6B_1024px_teacher_diffusers", 1.605),
    ],
)
def test_full_sizes_have_the_published_parameters(name, billions):
    """Counted without storage; a teacher is a SANA that is fed t, from which a student is made."""
    with torch.device("meta"):
        loaded = open_model(f"Efficient-Large-Model/{name}")
    assert parameters(loaded.module) / 1e9 == pytest.approx(billions, abs=5e-4)
    assert SANA_SPRINT.row_shape(loaded.module) == (32, 32, 32)
    own = ("sana", FlowPath(shift=3.0)) if "teacher" in name else ("sana_sprint", AngleFlowPath())
    assert (loaded.family, loaded.path) == own


@pytest.mark.parametrize("size", ["0.6B", "1.6B"])
def test_a_published_teacher_grows_to_the_published_student(size):
    """The same shapes by the same names."""
    with torch.device("meta"):
        name = f"Efficient-Large-Model/{'SANA' if size == '1.6B' else 'Sana'}_Sprint_{size}_1024px_teacher_diffusers"
        made = SANA_SPRINT.build(base=name)
        theirs = open_model(f"Efficient-Large-Model/Sana_Sprint_{size}_1024px_diffusers")
    shapes = [{n: p.shape for n, p in loaded.module.named_parameters()} for loaded in (made, theirs)]
    assert shapes[0] == shapes[1]
    assert dict(made.module.config) == dict(theirs.module.config) | {"_use_default_values": ANY}


def parameters(module: torch.nn.Module) -> int:
    """How many numbers."""
    return sum(p.numel() for p in module.parameters())


def test_a_network_from_sizes_takes_the_size_of_the_data(folder):
    """Parts around it are borrowed, or asked for in one line."""
    built = SANA_SPRINT.build(size="tiny", sample_size=4, around=str(folder))
    assert SANA_SPRINT.row_shape(built.module) == (4, 4, 4)
    assert built.around.key() == open_model(folder).around.key()
    SANA_SPRINT.fit(built.module, (4, 6, 8))
    assert SANA_SPRINT.row_shape(built.module) == (4, 6, 8)
    role = Denoiser(with_module(denoiser(folder), built.module).handle, SANA_SPRINT, built.path)
    blank = SANA_SPRINT.blank(built.module)
    assert role.velocity(torch.randn(1, 4, 6, 8), torch.tensor([0.5]), blank).shape == (1, 4, 6, 8)
    with pytest.raises(UserError, match="load it from a pipeline folder"):
        SANA_SPRINT.null(built.module, blank)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "1600"}, "unknown size '1600': did you mean '1600m'"),
        ({"num_layer": 4}, "unknown key 'num_layer': did you mean 'num_layers'"),
        ({"shift": 3.0}, "shift=3.0"),
        ({"timestep_scale": 1000}, "timestep_scale=1000"),
    ],
)
def test_wrong_sizes_are_named(said, message):
    """One line with the mend; there is neither a shift nor a scale of the label."""
    with pytest.raises(UserError, match=message):
        SANA_SPRINT.build(**said)


def test_pipelines_from_elsewhere_are_recognised(folder, sana):
    """One class, told apart by its guidance."""
    assert (family_of(folder), family_of(sana)) == ("sana_sprint", "sana")
