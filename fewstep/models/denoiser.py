"""A role shown as a flow network, whatever its own parameterisation is on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from ..maths.paths import Path, add_noise, eps_from_velocity, score_from_velocity, x0_from_velocity
from ..nets.extra_inputs import feeding
from .registry import FAMILIES

if TYPE_CHECKING:
    from ..roles import Handle
    from .family import DiffusionFamily


class Denoiser:
    """x_t = (1 - t) x0 + t eps; `velocity` predicts eps - x0. All methods take x [rows, ...], t [rows] and a Cond.

    x is the flow state; a variance-preserving network is fed path.scale(t) * x and its own timestep. Answers come back
    in float32 (float64 stays float64), whatever precision the network runs in.
    """

    def __init__(self, handle: Handle, family: DiffusionFamily, path: Path):
        self.handle, self.family, self.path = handle, family, path
        self.row_shape = family.row_shape(handle.module)
        if not handle.role.train_mode:
            handle.module.eval()  # some stock classes drop conditions by themselves in train mode

    @classmethod
    def of(cls, handle: Handle) -> Denoiser:
        """The denoiser of a role whose family and path are known."""
        assert handle.family is not None and handle.path is not None
        return cls(handle, FAMILIES.get(handle.family), handle.path)

    def __getattr__(self, name: str) -> Any:
        if name in ("handle", "__setstate__"):
            raise AttributeError(name)
        return getattr(self.handle, name)  # trainable(), ema, assign(), ... are the handle's

    def output(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's own answer (v, eps, x0, ... as trained) at flow state x, which is projected first."""
        x = self.project(x, cond)
        state = self.path.native(x, t)
        scale = self.path.input_scale(t)
        if isinstance(scale, Tensor) or scale != 1:
            state = state * _expand(scale, state)
        label = shifted_label(self.path, t, cond) if self.handle.shifted else self.path.timestep(t)
        arguments = self.family.pack(self.handle.module, state, label, cond)
        plain = "s" not in cond and "s" not in self.handle.role.adds  # of a two-time network: the flow model at s = t
        with feeding(self.handle.module, cond.with_(s=t) if plain else cond, t):
            answer = self.family.unpack(self.handle.module, self.handle(**arguments), x)
        return self.project(answer if answer.dtype == torch.float64 else answer.float(), cond)

    def shape(self, cond: Cond) -> tuple[int, ...]:
        """Shape of one row of noise or of a sample for this condition."""
        return self.family.shape(self.handle.module, cond)

    def project(self, x: Tensor, cond: Cond) -> Tensor:
        """x without padding and whatever else is no part of a sample; images as they are."""
        return self.family.project(x, cond)

    def velocity(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v(x, t, cond), eps - x0 in expectation; told a second time `cond.s`, the mean velocity from t down to s."""
        return self.path.velocity(self.output(x, t, cond), self.project(x, cond), t)

    def x0(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicted clean sample, x - t v."""
        return x0_from_velocity(self.project(x, cond), self.velocity(x, t, cond), t)

    def eps(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predicted noise, x + (1 - t) v."""
        return eps_from_velocity(self.project(x, cond), self.velocity(x, t, cond), t)

    def score(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Gradient of log p_t, -eps / t."""
        return score_from_velocity(self.project(x, cond), self.velocity(x, t, cond), t)

    def denoising_loss(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Mean squared error a row [rows], in the network's own parameterisation (each weighs noise levels its own way)."""
        x0, eps = self.project(x0, cond), self.project(eps, cond)
        error = self.output(add_noise(x0, eps, t), t, cond) - self.path.target(x0, eps, t)
        return self.family.mean_rows(error**2, cond)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the base was trained with guidance as an input. Of one that gained it here, its method takes care."""
        return "guidance" not in self.handle.role.adds and self.family.embeds_guidance(self.handle.module)

    def told(self, cond: Cond, scale: Tensor | float) -> Cond:
        """`cond` with guidance as an input: a number, or one a row [rows]."""
        some = next(iter(cond.values()))
        return cond.with_(guidance=torch.as_tensor(scale, dtype=torch.float32, device=some.device).expand(len(some)))

    def null(self, cond: Cond) -> Cond:
        """The unconditional condition with the rows of `cond`."""
        around = self.handle.around
        return self.family.null(self.handle.module, cond) if around is None else around.null(cond)

    def dropped(self, cond: Cond, drop: Tensor) -> Cond:
        """`cond` with the null condition in the rows where `drop` [rows] is true; an empty condition stays empty."""
        if not len(cond):
            return cond
        null = self.null(cond)
        return Cond(**{n: torch.where(drop.reshape(-1, *[1] * (c.ndim - 1)), null[n], c) for n, c in cond.items()})

    def decode(self, x0: Tensor) -> Tensor:
        """Images in [-1, 1] of clean samples; pixel networks make images themselves. Gradients flow through."""
        return x0 if self.handle.around is None else self.handle.around.decode(x0)

    def features(self, x: Tensor, t: Tensor, cond: Cond, layers: tuple[str, ...] | None = None) -> list[Tensor]:
        """Activations of the named submodules (default: the family's deepest) at x; what lies behind the last is not run."""
        names = layers or tuple(self.family.facts.feature_layers[:1])
        kept: dict[str, Tensor] = {}
        hooks = [self.handle.module.get_submodule(n).register_forward_hook(_keep(kept, n, len(names))) for n in names]
        try:
            self.output(x, t, cond)
        except _AllSeen:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [kept[name] for name in names]


def shifted_label(path: Path, t: Tensor, cond: Cond) -> Tensor:
    """Label of a network without a place for a second time: sign * timestep(t - s / 2) (TwinFlow, arXiv 2512.05150).

    An adapter learns it. At s = 0 it is the ordinary label, so a stock pipeline calls such a student unchanged; at s = t
    it is that of t / 2, and different pairs (t, s) may share one. UserError when `cond` says no `s`.
    """
    if "s" not in cond:
        raise UserError(f"this network reads 's', which its condition lacks: it has {sorted(cond)}")
    label = path.timestep(t - cond["s"] / 2)
    return cond["sign"] * label if "sign" in cond else label


class _AllSeen(Exception):
    """Leaves a forward pass whose rest nobody needs."""


def _keep(kept: dict[str, Tensor], name: str, wanted: int) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        kept[name] = output[0] if isinstance(output, tuple) else output
        if len(kept) == wanted:
            raise _AllSeen

    return hook


def _expand(scale: Any, like: Tensor) -> Any:
    return scale.reshape(-1, *[1] * (like.ndim - 1)) if isinstance(scale, Tensor) else scale
