"""Low-rank adapters whose choice is part of the call.

`with use(adapter): module(x)` computes with the adapter; outside the block, or with `use(None)`, with the base alone.
The base keeps its own parameters, names and class: an adapter reads its inputs and adds to its outputs through forward
hooks that look at a context variable. Module state would be wrong here: activation checkpointing recomputes a block in
the backward pass, when another role's adapter may be the active one (`checkpointed` captures the adapter with the block).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError

_ACTIVE: ContextVar[Adapter | None] = ContextVar("fewstep_adapter", default=None)
Layer = nn.Linear | nn.Conv2d
_HOOKED = "_fewstep_lora_hook"


@contextmanager
def use(adapter: Adapter | None) -> Iterator[None]:
    """Modules called within the block see `adapter` (None: the bare base)."""
    token = _ACTIVE.set(adapter)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class Adapter(nn.Module):
    """alpha / rank * up(down(x)) beside every Linear and Conv2d of `base` whose name matches `targets`.

    targets: names or endings ("to_q", "to_out.0"); "*" takes all. up starts at zero, so the adapted network equals the
    base at step 0. Raises UserError when nothing matches.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, targets: Sequence[str]):
        super().__init__()
        self.rank, self.alpha, self.targets = rank, alpha, list(targets)
        self.scale = alpha / rank
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        self._pairs: dict[nn.Module, tuple[Layer, Layer]] = {}
        for path, module in base.named_modules():
            if _adaptable(module) and _matches(path, targets):
                self._adapt(path, module)
        if not self._pairs:
            raise UserError(f"no layer of {type(base).__name__} matches lora.targets {list(targets)}")

    def _adapt(self, path: str, module: Layer) -> None:
        down, up = _low_rank(module, self.rank)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        nn.init.zeros_(up.weight)
        key = path.replace(".", "/")  # ModuleDict keys hold no dots
        self.down[key], self.up[key] = down, up
        self._pairs[module] = (down, up)
        if not hasattr(module, _HOOKED):
            setattr(module, _HOOKED, module.register_forward_hook(_add_low_rank))

    @torch.no_grad()
    def clear(self) -> None:
        """The adapted network equals the base again: every up-projection is zero, as at the start."""
        for up in self.up.values():
            nn.init.zeros_(cast(Tensor, up.weight))

    def delta(self, key: str) -> Tensor:
        """The change of the weight at `key`, in the base weight's shape."""
        down, up = cast(Tensor, self.down[key].weight), cast(Tensor, self.up[key].weight)
        if down.ndim == 2:
            return self.scale * (up @ down)
        return self.scale * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)

    @torch.no_grad()
    def merge_into(self, module: nn.Module) -> None:
        """Adds every delta to the weights of `module`, a network of the base's class."""
        for key in self.down:
            weight = module.get_parameter(key.replace("/", ".") + ".weight")
            weight.add_(self.delta(key).to(weight.dtype))


def _low_rank(module: Layer, rank: int) -> tuple[Layer, Layer]:
    """Two layers whose product has the module's shape; the rank never exceeds what the weight can have."""
    place, dtype = module.weight.device, torch.float32
    if isinstance(module, nn.Linear):
        rank = min(rank, module.in_features, module.out_features)
        down = nn.Linear(module.in_features, rank, bias=False, device=place, dtype=dtype)
        return down, nn.Linear(rank, module.out_features, bias=False, device=place, dtype=dtype)
    rank = min(rank, module.in_channels * math.prod(module.kernel_size), module.out_channels)
    shape: Any = (module.kernel_size, module.stride, module.padding, module.dilation)
    plain: Any = {"bias": False, "device": place, "dtype": dtype}
    return nn.Conv2d(module.in_channels, rank, *shape, **plain), nn.Conv2d(
        rank, module.out_channels, 1, bias=False, device=place, dtype=dtype
    )


def _add_low_rank(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    adapter = _ACTIVE.get()
    pair = adapter._pairs.get(module) if adapter is not None else None
    if adapter is None or pair is None:
        return output
    down, up = pair
    return output + adapter.scale * up(down(args[0]))


def _adaptable(module: nn.Module) -> TypeGuard[Layer]:
    """Linear and plain Conv2d; grouped convolutions carry too few weights for a low rank to pay."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _matches(path: str, targets: Sequence[str]) -> bool:
    return any(path == t or path.endswith("." + t) or fnmatch.fnmatch(path, t) for t in targets)


def checkpointed(module: Any) -> None:
    """Switches on activation checkpointing in a diffusers or transformers network, with the adapter carried along.

    Raises UserError when the network offers none.
    """
    if hasattr(module, "enable_gradient_checkpointing"):
        module.enable_gradient_checkpointing(gradient_checkpointing_func=_checkpoint)  # diffusers
    elif hasattr(module, "gradient_checkpointing_enable"):
        module.gradient_checkpointing_enable()  # transformers
        for part in module.modules():
            if hasattr(part, "_gradient_checkpointing_func"):
                part._gradient_checkpointing_func = _checkpoint
    else:
        raise UserError(f"{type(module).__name__} has no gradient checkpointing: remove `gradient_checkpointing`")


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    context = copy_context()  # the backward pass runs when, and maybe in a thread where, another adapter is active
    return checkpoint(partial(context.run, function), *args, use_reentrant=False, **kwargs)
