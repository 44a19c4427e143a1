"""Scalars that a network learns to read: a second time, a sign, a guidance scale. Their values are part of the call.

    attach(module, ("s", "guidance"), "time_embedding")           # equals what it was, for every value
    with feeding(module, Cond(label=y, s=s, guidance=g), t):      # what a Denoiser does in every call
        module(x, timestep, class_labels=y)
    stock = folded(module, {"delta": 1.0, "guidance": 4.0})       # the values for good, no extra input left

Two inputs hang together with the time t of the call. `s`, the second time of a flow map or an average velocity, is
embedded as the gap t - s, and `sign` (+1 or -1) chooses between two fields at one |t|; both add exactly nothing at s = t
and at +1, before and after training, since their layers have no biases. There the network is an ordinary one.

The network keeps its class: each scalar goes through sinusoids and two layers, and what comes out is added to the output
of the time embedding by a forward hook. The parameters are the submodule `extra_inputs`, so that they train, average
and save with the network.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

_VALUES: ContextVar[Mapping[str, Tensor] | None] = ContextVar("fewstep_extra_inputs", default=None)
NAME = "extra_inputs"
FEATURES, SLOWEST, FASTEST = 256, 0.5, 32.0
SCALE = {"guidance": 0.1}  # brings the usual values of an input to about 0..1
RELATIVE = ("s", "sign")  # read together with t


class ExtraInputs(nn.Module):
    """The sum over inputs of W2 silu(W1 phi + b1) + b2, with W2 = b2 = 0 before training: [rows, width].

    phi(v) = [sin(f v), cos(f v)] of the input's value v; for `s` phi(t - s) - phi(0) and for `sign` phi(t) where it is
    -1 and 0 where it is +1, both with b1 = b2 = 0 for good.

    The 128 frequencies f grow from 0.5 to 32 radians: a network that is differentiated in the scalar wants smooth
    features, and the thousand radians of a timestep embedding would make the derivative the loudest thing in it.
    """

    frequencies: Tensor

    def __init__(self, names: Sequence[str], width: int):
        super().__init__()
        self.embeddings = nn.ModuleDict({name: _embedding(width, name not in RELATIVE) for name in names})
        steps = torch.linspace(0, 1, FEATURES // 2)
        self.register_buffer("frequencies", SLOWEST * (FASTEST / SLOWEST) ** steps, persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs, in the order in which they were attached."""
        return tuple(self.embeddings)

    def gain(self, names: Sequence[str], width: int) -> None:
        """Adds further inputs to those that are there, which keep their weights."""
        weight = next(self.parameters())
        self.embeddings.update({name: _embedding(width, name not in RELATIVE).to(weight) for name in names})

    def forward(self, values: Mapping[str, Tensor]) -> Tensor:
        """values: each input [rows], and the time `t` [rows] of the call where one of `RELATIVE` is among them."""
        return torch.stack([self.embeddings[name](self._features(name, values)) for name in self.names]).sum(0)

    def _features(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        if name == "s":
            return self._waves(values["t"] - values["s"]) - self._waves(torch.zeros_like(values["t"]))
        if name == "sign":
            negative = (1 - values["sign"].to(self.frequencies)) / 2
            return negative[:, None] * self._waves(values["t"])
        return self._waves(SCALE.get(name, 1.0) * values[name])

    def _waves(self, value: Tensor) -> Tensor:
        angle = value.to(self.frequencies.dtype)[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], 1)

    def add(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The forward hook: a method of this module, so that a deep copy of the network hooks its own copy."""
        also = ("t",) if set(self.names) & set(RELATIVE) else ()
        return output + self({name: fed(name) for name in (*self.names, *also)}).to(output.dtype)


def _embedding(width: int, biased: bool) -> nn.Sequential:
    last = nn.Linear(width, width, bias=biased)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(nn.Linear(FEATURES, width, bias=biased), nn.SiLU(), last)


def attach(module: nn.Module, inputs: Sequence[str], time_embedding: str) -> nn.Module:
    """`module` itself, which from now on reads `inputs` from the call; at first they change nothing.

    Inputs that it reads already stay as they are.
    time_embedding: name, or pattern of names, of the submodules whose output the inputs join.
    """
    places = _places(module, time_embedding)
    last = _last_linear(places[0])
    known = getattr(module, NAME, None)
    if known is not None:
        known.gain([name for name in inputs if name not in known.names], last.out_features)
        return module
    extra = ExtraInputs(inputs, last.out_features).to(last.weight)
    module.add_module(NAME, extra)
    for place in places:
        place.register_forward_hook(extra.add)
    return module


@contextmanager
def feeding(module: nn.Module, cond: Mapping[str, Tensor], t: Tensor | None = None) -> Iterator[None]:
    """Within the block `module` reads its inputs from `cond`, in a call at time t [rows].

    `sign` is +1 where `cond` says none; UserError when another input is missing there.
    """
    extra = getattr(module, NAME, None)
    if extra is None:
        yield
        return
    given: dict[str, Tensor] = {name: cond[name] for name in extra.names if name in cond}
    if t is not None:
        given["t"] = t
        given.setdefault("sign", torch.ones_like(t))
    missing = [name for name in extra.names if name not in given]
    if missing:
        raise UserError(f"this network reads '{missing[0]}', which its condition lacks: it has {sorted(cond)}")
    token = _VALUES.set(given)
    try:
        yield
    finally:
        _VALUES.reset(token)


def fed(name: str) -> Tensor:
    """The value [rows] of an input, or of the time `t`, in the call that is running; UserError outside of `feeding`."""
    values = _VALUES.get()
    if values is None or name not in values:
        raise UserError(f"this network reads '{name}': call it through a Denoiser, or export it")
    return values[name]


def reads(module: nn.Module) -> tuple[str, ...]:
    """Names of a network's extra inputs; empty for a stock one."""
    extra = getattr(module, NAME, None)
    return tuple(extra.names) if extra is not None else ()


@torch.no_grad()
def folded(module: nn.Module, values: Mapping[str, float]) -> nn.Module:
    """A copy that answers as `module` does at these constant values, and reads those inputs no more.

    What the inputs add is then a constant vector: it goes into the last bias of the time embedding. `s` and `sign`
    depend on the time of the call and stay inputs: UserError when a value is given for one.
    """
    unfit = [name for name in values if name in RELATIVE]
    if unfit:
        raise UserError(f"the input '{unfit[0]}' changes with the time of a call: it cannot be made a constant")
    plain = copy.deepcopy(module)
    extra = plain.get_submodule(NAME)
    assert isinstance(extra, ExtraInputs)
    constants = {name: extra.frequencies.new_full((1,), value) for name, value in values.items()}
    shift = sum(extra.embeddings[name](extra._features(name, constants))[0] for name in values)
    for place in plain.modules():
        if _hooks(place, extra):
            _last_linear(place).bias.add_(shift)
    for name in values:
        del extra.embeddings[name]
    return plain if extra.names else without(plain)


def without(module: nn.Module) -> nn.Module:
    """`module` itself, which reads no extra inputs any more: the network that it is at s = t."""
    extra = getattr(module, NAME)
    for place in module.modules():
        for key in _hooks(place, extra):
            del place._forward_hooks[key]
    delattr(module, NAME)
    return module


@contextmanager
def weights_aside(module: nn.Module) -> Iterator[None]:
    """Within the block `module.state_dict()` is that of the network without extra inputs; it cannot be called."""
    extra = module._modules.pop(NAME, None)
    try:
        yield
    finally:
        if extra is not None:
            module._modules[NAME] = extra


def time_layers(module: nn.Module, time_embedding: str | None) -> list[str]:
    """Names of the linear layers in a network's time embedding, as `attach` takes its name."""
    inside = [(name, part) for name, part in module.named_modules() if fnmatch.fnmatch(name, time_embedding or "")]
    return [
        f"{name}.{inner}" if inner else name
        for name, part in inside
        for inner, layer in part.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def _hooks(place: nn.Module, extra: ExtraInputs) -> list[int]:
    """Keys of the forward hooks by which `extra` adds to the output of `place`."""
    return [key for key, hook in place._forward_hooks.items() if getattr(hook, "__self__", None) is extra]


def _places(module: nn.Module, pattern: str) -> list[nn.Module]:
    return [part for name, part in module.named_modules() if fnmatch.fnmatch(name, pattern)]


def _last_linear(place: nn.Module) -> nn.Linear:
    return [part for part in place.modules() if isinstance(part, nn.Linear)][-1]
