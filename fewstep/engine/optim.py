"""One optimiser a trainable role: learning rate, clipping, step, EMA, and the state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..maths.scalars import value
from ..roles import Handle, OptimizerSpec


def learning_rate(spec: OptimizerSpec, step: int, steps: int) -> float:
    """Rate of update `step` (0-based) of `steps`: linear warm-up, then constant, linear or cosine decay to 0."""
    rate = value(spec.lr, step) * min(1.0, (step + 1) / spec.warmup if spec.warmup else 1.0)
    progress = min(step / max(steps, 1), 1.0)
    if spec.decay == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * progress))
    return rate * (1 - progress) if spec.decay == "linear" else rate


class RoleOptimizer:
    """Steps one role. `factor` multiplies the learning rate, `steps` is the stage's length."""

    def __init__(self, handle: Handle, steps: int, factor: float = 1.0):
        self.handle, self.steps, self.factor = handle, steps, factor
        self.parameters = handle.trainable()
        self.optimizer = _make(handle.spec.optimizer, list(self.parameters.values()))
        handle.forget = self.optimizer.state.clear

    def step(self, step: int) -> dict[str, Tensor]:
        """Clips, steps, averages; returns the gradient norm before clipping."""
        spec = self.handle.spec.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = self.factor * learning_rate(spec, step, self.steps)
        limit = spec.clip if spec.clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.handle.update_ema()
        return {f"grad_norm.{self.handle.name}": norm.detach()}

    def state(self) -> dict[str, Tensor]:
        """Optimiser state as `<parameter>/<slot>` tensors."""
        slots = self.optimizer.state
        return {
            f"{name}/{slot}": torch.as_tensor(v)
            for name, p in self.parameters.items()
            for slot, v in slots.get(p, {}).items()
            if v is not None
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for key, tensor in state.items():
            name, slot = key.rsplit("/", 1)
            p = self.parameters[name]
            self.optimizer.state[p][slot] = tensor.clone() if slot == "step" else tensor.to(p.device, p.dtype).clone()


def _make(spec: OptimizerSpec, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if spec.name == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, momentum=spec.momentum, weight_decay=spec.weight_decay)
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[spec.name]
    # one fused kernel instead of a dozen small ones a parameter; the learning rate is set at each step
    return cls(parameters, lr=1.0, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True)
