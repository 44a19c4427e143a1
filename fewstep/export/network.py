"""Facts about the network inside a pipeline: which one it is, how many classes it has, how often it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def network_of(pipeline: Any) -> nn.Module:
    """The denoising network of a diffusers pipeline."""
    for name in ("unet", "transformer"):
        network = getattr(pipeline, name, None)
        if network is not None:
            return network
    raise ValueError(f"{type(pipeline).__name__} has neither unet nor transformer")


def class_count(network: nn.Module) -> int | None:
    """Number of classes that a network is conditioned on, without the null class; None for an unconditional one."""
    config: Any = getattr(network, "config", {})
    if not hasattr(config, "get"):
        return None
    embeddings = config.get("num_class_embeds")
    return embeddings - 1 if embeddings is not None else config.get("num_embeds_ada_norm")


class Calls:
    """Rows that a network was asked about so far."""

    rows = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Calls]:
    """Counts network evaluations: rows of the first tensor of each call, so a guided step counts two an image."""
    calls = Calls()

    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.rows += next(len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1)

    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()
