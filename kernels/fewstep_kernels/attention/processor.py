"""Sends the attention of a whole network through `attention`: for a block of code, or built into its processors.

Both catch torch's `scaled_dot_product_attention`, in which all of diffusers' processors end, so they hold for every network
class alike.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .functional import attention


class attending(TorchFunctionMode):  # a context manager, named as `torch.no_grad` is
    """Within `with attending(backend):` torch's attention runs on `backend`.

    What `attention` does not know (dropout, three dimensions, a causal call of unequal lengths, a learned mask) stays with
    torch under `auto`, and raises ValueError under a name.
    """

    def __init__(self, backend: str = "auto"):
        super().__init__()
        self.backend = backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with (
            torch._C.DisableTorchFunction()
        ):  # an outer `attending` must not catch the call that a back end makes of torch
            return _attend(self.backend, *args, **(kwargs or {}))


def use_attention(network: nn.Module, backend: str | None = "auto") -> None:
    """Has the attention processors of a diffusers network run on `backend`, also when a checkpointed block runs again.

    Called again it changes the back end; None gives the processors back as they were. Raises ValueError when the network has
    no processors.
    """
    held = [part for part in network.modules() if callable(getattr(part, "processor", None))]
    if not held:
        raise ValueError(
            f"{type(network).__name__} has no attention processors: wrap its calls in attending('{backend}')"
        )
    for part in held:
        processor: Any = part.processor
        kind = type(processor)
        plain = kind.__bases__[0] if hasattr(kind, "fewstep_backend") else kind
        processor.__class__ = plain if backend is None else _routed(plain)
        processor.__dict__.pop("fewstep_backend", None)
        if backend is not None:
            processor.fewstep_backend = backend


@functools.cache
def _routed(kind: type) -> type:
    """A subclass of the same name and signature: diffusers asks processors for both."""
    call: Any = kind.__call__

    @functools.wraps(call)
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with attending(self.fewstep_backend):
            return call(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": routed, "fewstep_backend": "auto", "__module__": kind.__module__})


def _attend(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    strange = _strange(query, key, attn_mask, dropout_p, is_causal)
    if not strange:
        mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.ndim)]
        return attention(query, key, value, mask, is_causal, scale, backend)
    if backend != "auto":
        raise ValueError(f"attention backend '{backend}' does not know {strange}: write auto, which leaves it to torch")
    grouped = {"enable_gqa": True} if enable_gqa else {}
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **grouped)


def _strange(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> str | None:
    """What of torch's attention `attention` does not have."""
    if dropout:
        return "dropout"
    if query.ndim != 4 or key.ndim != 4:
        return f"queries of {query.ndim} dimensions"
    if causal and query.shape[2] != key.shape[2]:
        return "causal attention that aligns the first query and key"
    if mask is not None and mask.is_floating_point():
        learned = mask.requires_grad or forward_ad.unpack_dual(mask).tangent is not None
        return "a mask with a gradient" if learned else None
    return None
