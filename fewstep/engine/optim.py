"""One optimiser a trainable role: learning rate, clipping, step, EMA, and the state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..maths.scalars import value
from ..roles import Handle, OptimizerSpec, RoleSpec, part_of

TABLES = ("qmap1", "qmap2")  # of 8-bit moments: the same for all parameters, made anew
BEGUN = "schedule/begun"  # among the optimiser's state: no parameter is called so, since names of layers have dots


def learning_rate(spec: OptimizerSpec, step: int, steps: int, begun: int = 0) -> float:
    """Rate of update `step` (0-based) of `steps`: linear warm-up, then constant, linear or cosine decay to 0.

    With restarts the k-th fall, from rate to floor, takes 2^k restart_every steps, counted from step `begun`.
    """
    if spec.decay == "cosine_restarts":
        step -= begun
    rate = value(spec.lr, step) * min(1.0, (step + 1) / spec.warmup if spec.warmup else 1.0)
    progress = min(step / max(steps, 1), 1.0)
    if spec.decay == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * progress))
    if spec.decay == "cosine_restarts":
        fall = int(math.log2(step / spec.restart_every + 1) + 1e-9)
        progress = step / (spec.restart_every * 2**fall) - (1 - 2.0**-fall)
        return spec.lr_floor + max(rate - spec.lr_floor, 0) * 0.5 * (1 + math.cos(math.pi * progress))
    return rate * (1 - progress) if spec.decay == "linear" else rate


def ema_decay(spec: RoleSpec, step: int, rows: int) -> float | None:
    """Decay of the average at update `step` (0-based) of `rows` samples, when the recipe gives a half-life; else None.

    .5^(rows / H) with H = min(half-life, rampup x samples seen), so that a young average forgets faster (as in EDM).
    """
    if spec.ema_half_life is None:
        return None
    half_life = min(spec.ema_half_life, (spec.ema_rampup or math.inf) * (step + 1) * rows)
    return 0.5 ** (rows / half_life)


class RoleOptimizer:
    """Steps one role. `factor` multiplies the learning rate, `steps` is the stage's length, `rows` a step's samples.

    skip_nan: a step whose gradient is not finite is left out, which costs a look at its norm in every step.
    """

    def __init__(self, handle: Handle, steps: int, factor: float = 1.0, rows: int = 1, skip_nan: bool = False):
        self.handle, self.steps, self.factor, self.rows, self.skip_nan = handle, steps, factor, rows, skip_nan
        self.begun, self.done = 0, 0  # where the learning rate's schedule began; steps up to now
        self.parameters = handle.trainable()
        self.optimizer = _make(handle.spec.optimizer, list(self.parameters.values()))
        handle.forget, handle.rewind = self.optimizer.state.clear, self._rewind

    def _rewind(self) -> None:
        self.begun = self.done

    def step(self, step: int) -> dict[str, Tensor]:
        """Clips, steps, averages; returns the gradient norm before clipping, or that the step was left out."""
        spec, self.done = self.handle.spec.optimizer, step + 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.factor * learning_rate(spec, step, self.steps, self.begun)
        limit = spec.clip if spec.clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        numbers = {f"grad_norm.{self.handle.name}": norm.detach()}
        if self.skip_nan:
            skipped = f"skipped.{self.handle.name}"
            if not norm.isfinite():
                self.optimizer.zero_grad(set_to_none=True)
                return {**dict.fromkeys(numbers, torch.zeros_like(norm)), skipped: torch.ones_like(norm)}
            numbers[skipped] = torch.zeros_like(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.handle.update_ema(ema_decay(self.handle.spec, step, self.rows))
        return {name: number.detach() for name, number in numbers.items()}

    def state(self) -> dict[str, Tensor]:
        """Optimiser state as `<parameter>/<slot>` tensors."""
        slots = self.optimizer.state
        begun = {BEGUN: torch.tensor(self.begun)} if self.begun else {}
        return begun | {
            f"{name}/{slot}": torch.as_tensor(v)
            for name, p in self.parameters.items()
            for slot, v in slots.get(p, {}).items()
            if v is not None and slot not in TABLES
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        state = dict(state)
        self.begun = int(state.pop(BEGUN, 0))
        for key, tensor in state.items():
            name, slot = key.rsplit("/", 1)
            p = self.parameters[name]
            self.optimizer.state[p][slot] = (
                tensor.clone() if slot == "step" else part_of(tensor, p).to(p.device).clone()
            )
        if self.handle.spec.optimizer.name == "adamw8bit":
            self._complete()

    def _complete(self) -> None:
        """What bitsandbytes wants besides: steps as Python's numbers, and the tables that bytes stand for."""
        self.optimizer.fill_qmap()  # type: ignore[attr-defined]
        for p, slots in self.optimizer.state.items():
            slots["step"] = int(slots["step"])
            if slots["state1"].dtype == torch.uint8:
                tables = self.optimizer.name2qmap  # type: ignore[attr-defined]
                slots["qmap1"], slots["qmap2"] = (tables[kind].to(p.device) for kind in ("dynamic", "udynamic"))


def _make(spec: OptimizerSpec, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if spec.name == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, momentum=spec.momentum, weight_decay=spec.weight_decay)
    if spec.name == "adamw8bit":
        return _adamw_8bit(spec, parameters)
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[spec.name]
    # one fused kernel instead of a dozen small ones a parameter; the learning rate is set at each step
    return cls(parameters, lr=1.0, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)


def _adamw_8bit(spec: OptimizerSpec, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    try:
        adamw: Any = import_module("bitsandbytes").optim.AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer.name=adamw8bit needs bitsandbytes, which is not installed: pip install bitsandbytes, or write adamw"
        ) from error
    return adamw(parameters, lr=1.0, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
