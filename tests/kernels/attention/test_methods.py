"""The methods that differentiate a network train alike on every back end, and `chunked` needs less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fewstep_kernels.attention import attending, attention, use_attention
from torch.profiler import ProfilerActivity, profile

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.maths.derivative import derivative
from fewstep.methods.base import Total
from fewstep.methods.diffusion.freeflow import FreeFlow
from fewstep.methods.diffusion.meanflow import MeanFlow
from fewstep.methods.diffusion.scm import SCM
from fewstep.roles import Handle, RoleSpec, assemble

ROWS = 4
SIZES = {"classes": 4, "channels": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
METHODS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "meanflow": (MeanFlow, {"interval_share": 0.5}, ("student",)),
    "scm": (SCM, {"tangent_warmup": 0}, ("teacher",)),
    "freeflow": (FreeFlow, {"guidance_scale": 1.5}, ("teacher",)),
}


def made(name: str, backend: str, size: int) -> tuple[Any, dict[str, Handle]]:
    """The method and its roles on a loud transformer of (size / 2)^2 tokens, all of whose networks attend by `backend`."""
    kind, config, built = METHODS[name]
    method = kind(kind.Config(**config))
    specs = {role: RoleSpec(**{"from": "dit", "build": {"sample_size": size, **SIZES}}) for role in built}
    if name == "freeflow":
        specs["fake_velocity"] = RoleSpec(tune="full")
    handles = assemble(method.roles(), specs, seed=0)
    torch.manual_seed(1)
    for handle in handles.values():
        for p in handle.module.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    for module in {id(h.module): h.module for h in handles.values() if h.role.name != "weight"}.values():
        use_attention(module, backend)
    method.bind(handles, {}, {})
    return method, handles


def batch(size: int) -> Batch:
    ids = torch.arange(ROWS)
    x0 = torch.randn(ROWS, 2, size, size, generator=torch.Generator().manual_seed(0))
    return Batch(ids, {"cond": Cond(label=ids % 4), "x0": x0})


def trained(made: tuple[Any, dict[str, Handle]], size: int, steps: int) -> list[float]:
    """Losses of `steps` steps of plain gradient descent."""
    (method, handles), losses = made, []
    for step in range(steps):
        running, reply = method.train_step(batch(size), Draw(5, step, np.arange(ROWS))), None
        while True:
            try:
                said = running.send(reply)
            except StopIteration:
                break
            reply = dict(said) if isinstance(said, Total) else None
            if not isinstance(said, Total):
                loss = torch.stack([rows.mean() for rows in said.losses.values()]).sum()
                losses.append(loss.item())
                descend(handles, said.roles, loss)
    return losses


def descend(handles: dict[str, Handle], roles: str | tuple[str, ...], loss: torch.Tensor) -> None:
    names = (roles,) if isinstance(roles, str) else roles
    parts = [p for name in names for p in handles[name].trainable().values()]
    for p, g in zip(parts, torch.autograd.grad(loss, parts, allow_unused=True), strict=True):
        if g is not None:
            p.data.sub_(1e-2 * g / (1 + g.norm()))


@pytest.mark.parametrize("name", METHODS)
def test_training_on_reference_and_chunked_gives_the_losses_of_torchs_formula(name):
    right = trained(made(name, "sdpa_math", 8), 8, 3)
    assert len(right) >= 3 and len(set(right)) == len(right)
    for backend in ("reference", "chunked"):
        assert trained(made(name, backend, 8), 8, 3) == pytest.approx(right, rel=1e-5, abs=1e-6)


def peak(run: Callable[[], Any]) -> int:
    """Largest number of bytes that were live at a time while `run` ran, beyond what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    live = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


@pytest.mark.parametrize(
    "name", ["meanflow", pytest.param("scm", marks=pytest.mark.slow), pytest.param("freeflow", marks=pytest.mark.slow)]
)
def test_a_step_on_1024_tokens_takes_less_memory_in_chunks(name):
    method = {backend: made(name, backend, 64) for backend in ("chunked", "sdpa_math")}
    used = {backend: peak(lambda b=backend: trained(method[b], 64, 1)) for backend in method}
    assert used["sdpa_math"] > 3 * used["chunked"]


def test_memory_of_output_tangent_and_gradients_grows_with_the_length_and_not_with_its_square():
    """Beyond the blocks, which are bounded: four times the tokens, hardly more than four times the memory."""

    def step(n: int) -> Callable[[], Any]:
        q, k, v, *t = (torch.randn(1, 1, n, 16).requires_grad_() for _ in range(6))

        def run() -> None:
            o, to = torch.func.jvp(lambda *x: attention(*x, backend="chunked"), (q, k, v), tuple(t))
            torch.autograd.grad(o.square().sum() + to.square().sum(), (q, k, v, *t))

        return run

    small, large = peak(step(1024)), peak(step(4096))
    assert large < 5 * small


def test_the_derivative_alone_takes_less_memory_without_being_asked():
    method, _ = made("meanflow", "sdpa_math", 64)
    x, t = batch(64).x0, torch.linspace(0.2, 0.8, ROWS)
    cond = batch(64).cond.with_(s=t / 2)

    def slope() -> None:
        derivative(lambda s: method.student.velocity(x * s[:, None, None, None], s, cond), t)

    formula = peak(slope)
    use_attention(method.student.module, None)
    assert peak(slope) < 0.6 * formula
    with attending("sdpa_math"):  # `derivative`'s own choice is within, and goes before
        assert peak(slope) < 0.6 * formula
