"""One role's optimiser: rates, averages, and steps that are left out."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fewstep.engine.optim import RoleOptimizer, ema_decay, learning_rate
from fewstep.errors import UserError
from fewstep.roles import Handle, OptimizerSpec, Role, RoleSpec

RESTARTS = OptimizerSpec(lr=1.0, decay="cosine_restarts", restart_every=10, lr_floor=0.1)


def handle(**spec) -> Handle:
    torch.manual_seed(0)
    return Handle(
        Role("student", "full"), nn.Linear(3, 2), RoleSpec(optimizer={"lr": 0.1, "clip": None}, **spec), "full"
    )


def stepped(optimizer: RoleOptimizer, step: int, gradient: float = 1.0) -> dict[str, torch.Tensor]:
    for p in optimizer.parameters.values():
        p.grad = torch.full_like(p, gradient)
    return optimizer.step(step)


def test_each_fall_of_cosine_restarts_takes_twice_as_long():
    """From 1 to the floor in 10, 20, 40 steps: at the start 1, half way the mean, then 1 again."""
    rates = [learning_rate(RESTARTS, step, 1000) for step in range(71)]
    assert [step for step, rate in enumerate(rates) if rate == pytest.approx(1.0)] == [0, 10, 30, 70]
    assert [rates[5], rates[20], rates[50]] == pytest.approx([0.55] * 3)
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(0.9 * math.pi)))
    assert min(rates) > 0.1


def test_restarts_count_from_where_the_schedule_was_rewound():
    assert learning_rate(RESTARTS, 37, 1000, begun=32) == learning_rate(RESTARTS, 5, 1000)
    plain = OptimizerSpec(lr=1.0, decay="cosine")
    assert learning_rate(plain, 37, 100, begun=32) == learning_rate(plain, 37, 100)  # over the stage, whatever happens


def test_a_role_that_restarts_begins_its_falls_again_also_after_a_resume():
    base = handle()
    role = Handle(Role("fake_score", "full"), nn.Linear(3, 2), RoleSpec(optimizer=RESTARTS), "full")
    optimizer = RoleOptimizer(role, 1000)
    for step in range(7):
        stepped(optimizer, step)
    role.restart(base)
    assert torch.equal(role.module.weight, base.module.weight) and not optimizer.optimizer.state
    stepped(optimizer, 7)
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    again = RoleOptimizer(Handle(Role("fake_score", "full"), nn.Linear(3, 2), role.spec, "full"), 1000)
    again.load_state(optimizer.state())
    assert (again.begun, len(again.optimizer.state)) == (7, 2)


def test_a_half_life_halves_what_an_average_remembers():
    """64 samples a step, half-life 640: after ten steps half of it is gone; ramped up, it is at most 5 % of what was seen."""
    spec = RoleSpec(ema_half_life=640, ema_rampup=None)
    assert ema_decay(spec, 100, 64) ** 10 == pytest.approx(0.5)
    young = RoleSpec(ema_half_life=640)
    assert ema_decay(young, 0, 64) == pytest.approx(0.5**20)  # half-life 3.2 samples
    assert ema_decay(young, 199, 64) == pytest.approx(0.5**0.1)  # 12,800 seen: 640
    assert ema_decay(RoleSpec(ema=0.9), 5, 64) is None


def test_the_average_follows_its_half_life():
    role = handle(ema_half_life=64, ema_rampup=None)
    first = role.module.weight.detach().clone()
    stepped(RoleOptimizer(role, 10, rows=64), 0)
    torch.testing.assert_close(role.ema["weight"], (first + role.module.weight) / 2)


def test_one_of_ema_and_half_life():
    with pytest.raises(ValidationError, match="ema: null"):
        RoleSpec(ema=0.9, ema_half_life=100)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_without_finite_gradient_changes_nothing_and_is_counted(bad):
    role = handle(ema=0.5)
    optimizer = RoleOptimizer(role, 10, skip_nan=True)
    good = stepped(optimizer, 0)
    before = [role.module.weight.detach().clone(), role.ema["weight"].clone()]
    numbers = stepped(optimizer, 1, bad)
    assert (good["skipped.student"], numbers["skipped.student"]) == (0, 1)
    assert torch.equal(role.module.weight, before[0]) and torch.equal(role.ema["weight"], before[1])
    assert numbers["grad_norm.student"] == 0
    stepped(optimizer, 2)
    assert role.module.weight.isfinite().all() and not torch.equal(role.module.weight, before[0])


@pytest.fixture
def bitsandbytes():
    """8-bit optimisers, where they are installed."""
    return pytest.importorskip("bitsandbytes")


def eight_bit(width: int = 128) -> RoleOptimizer:
    """AdamW with moments of a byte each; a network large enough for them."""
    torch.manual_seed(1)
    spec = RoleSpec(optimizer={"name": "adamw8bit", "lr": 0.01, "clip": None})
    return RoleOptimizer(Handle(Role("student", "full"), nn.Linear(width, 64), spec, "full"), 10)


def moved(optimizer: RoleOptimizer, steps: range) -> None:
    """Steps with gradients of their own."""
    for step in steps:
        for i, p in enumerate(optimizer.parameters.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step(step)


def test_eight_bit_moments_step_as_adamw_does(bitsandbytes):
    """To the precision of a byte."""
    optimizer = eight_bit()
    full = RoleOptimizer(
        Handle(
            Role("student", "full"),
            nn.Linear(128, 64),
            RoleSpec(optimizer={"lr": 0.01, "clip": None}),
            "full",
        ),
        10,
    )
    full.handle.module.load_state_dict(optimizer.handle.module.state_dict())
    start = optimizer.handle.module.weight.detach().clone()
    moved(optimizer, range(5))
    moved(full, range(5))
    a, b = (o.handle.module.weight - start for o in (optimizer, full))
    assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99
    held = sum(t.numel() * t.element_size() for name, t in optimizer.state().items() if name.startswith("weight"))
    assert held < 0.3 * sum(
        t.numel() * t.element_size() for name, t in full.state().items() if name.startswith("weight")
    )


def test_eight_bit_moments_resume_bit_for_bit(bitsandbytes):
    """Also those of small parameters, which stay float32."""
    straight, first, second = eight_bit(), eight_bit(), eight_bit()
    moved(straight, range(4))
    moved(first, range(2))
    second.handle.module.load_state_dict(first.handle.module.state_dict())
    second.load_state(first.state())
    moved(second, range(2, 4))
    assert torch.equal(second.handle.module.weight, straight.handle.module.weight)
    assert torch.equal(second.handle.module.bias, straight.handle.module.bias)


def test_eight_bit_without_the_library_names_it(monkeypatch):
    """And what to write instead."""
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes, or write adamw"):
        eight_bit()
