"""What holds of roles in every latent family of prompts alike: further inputs, adapters, repeated and checkpointed calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.nets.extra_inputs import folded
from fewstep.roles import merged

from .flow_stock import PROMPTS, denoiser, off, student, with_module
from .tiny_lumina2 import tiny_lumina2
from .tiny_pixart import tiny_pixart
from .tiny_wan import tiny_wan

TINY = {"lumina2": tiny_lumina2, "pixart_sigma": tiny_pixart, "wan": tiny_wan}
SHAPES = {"lumina2": (4, 8, 8), "pixart_sigma": (4, 8, 8), "wan": (4, 2, 4, 8)}
families = pytest.mark.parametrize("name", TINY)
# On a table of noise a state is scaled by its own level, so the same state at another label is no velocity to compare with.
on_flow_paths = pytest.mark.parametrize("name", ["lumina2", "wan"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each family."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny(root / name) for name, tiny in TINY.items()}


def noise_of(name: str) -> Tensor:
    """Two rows."""
    return torch.randn(2, *SHAPES[name], generator=torch.Generator().manual_seed(1))


@families
@torch.no_grad()
def test_a_second_time_and_a_sign_change_nothing_at_first_and_nothing_at_equal_times(folders, name):
    """To the bit; once learnt, s and sign count."""
    base, made = denoiser(folders[name]), student(folders[name], ("s", "sign"))
    noise, t, cond = noise_of(name), torch.tensor([0.3, 0.8]), base.handle.around.prompts(PROMPTS)
    wanted = base.velocity(noise, t, cond)
    for s in (torch.zeros(2), t / 2, t):
        assert torch.equal(made.velocity(noise, t, cond.with_(s=s, sign=torch.tensor([1.0, -1.0]))), wanted)
    for part in made.handle.module.extra_inputs.embeddings.values():
        part[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.velocity(noise, t, cond.with_(s=t)), wanted)
    for more in ({"s": t / 2}, {"s": t, "sign": -torch.ones(2)}):
        assert off(made.velocity(noise, t, cond.with_(**more)), wanted) > 1e-2


@on_flow_paths
@torch.no_grad()
def test_an_adapter_reads_the_second_time_from_the_label(folders, name):
    """At s = 0 it is told t, at s = t what t / 2 is told, and the negative of it at sign -1."""
    base, made = denoiser(folders[name]), student(folders[name], ("s", "sign"), tune="lora", lora={"rank": 2})
    noise, t, cond = noise_of(name), torch.full((2,), 0.6), base.handle.around.prompts(PROMPTS)
    for label, more in ((t, {"s": 0 * t}), (t / 2, {"s": t}), (-t / 2, {"s": t, "sign": -torch.ones(2)})):
        assert off(made.velocity(noise, t, cond.with_(**more)), base.velocity(noise, label, cond)) < 1e-5


@families
@torch.no_grad()
def test_an_embedded_guidance_folds_into_the_stock_class(folders, name):
    """A constant input is a bias of the time embedding: the exported network has no further input."""
    role, noise, t = student(folders[name], ("guidance",), moved=0.02), noise_of(name), torch.tensor([0.4, 0.7])
    cond = role.handle.around.prompts(PROMPTS)
    plain = with_module(role, folded(role.handle.module, {"guidance": 4.0}))
    wanted = role.velocity(noise, t, cond.with_(guidance=torch.full((2,), 4.0)))
    torch.testing.assert_close(plain.velocity(noise, t, cond), wanted, atol=1e-5, rtol=1e-5)


@families
@torch.no_grad()
def test_without_its_adapter_a_role_is_the_base(folders, name):
    """To the bit; with it, it is the merged network."""
    made = student(folders[name], tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1)
    base, noise, t = denoiser(folders[name]), noise_of(name), torch.tensor([0.3, 0.8])
    cond = base.handle.around.prompts(PROMPTS)
    wanted, v = base.velocity(noise, t, cond), made.velocity(noise, t, cond)
    assert torch.equal(with_module(made, made.handle.module).velocity(noise, t, cond), wanted)
    assert off(with_module(made, merged(made.handle)).velocity(noise, t, cond), v) < 1e-5 and off(v, wanted) > 1e-2


@families
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_two_equal_calls_agree_and_checkpointing_changes_no_gradient(folders, name, tune):
    """Nothing is dropped at random; with an adapter, its forward is made again in the backward pass."""
    answers, gradients = [], []
    for checkpointing in (False, False, True):
        said = {"lora": {"rank": 2, "targets": "wide"}} if tune == "lora" else {}
        made = student(folders[name], moved=0.02, tune=tune, gradient_checkpointing=checkpointing, **said)
        assert made.handle.module.gradient_checkpointing == checkpointing
        v = made.velocity(noise_of(name), torch.tensor([0.6, 0.9]), made.handle.around.prompts(PROMPTS))
        answers.append(v.detach())
        trained, unused = list(made.trainable().values()), name != "wan"  # the others pass over some layers for prompts
        gradients.append(torch.autograd.grad(v.square().mean(), trained, allow_unused=unused))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for first, *others in zip(*gradients):
        assert all(first is None if g is None else torch.allclose(first, g, rtol=1e-4, atol=1e-6) for g in others)
    assert sum(g is not None and bool(g.any()) for g in gradients[0]) > 4
