"""Facts about the network inside a pipeline: which one it is, and what it is conditioned on."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


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


def takes_prompts(pipeline: Any) -> bool:
    """Whether a diffusers pipeline draws images from texts."""
    return "prompt" in inspect.signature(pipeline.__call__).parameters


def makes_videos(pipeline: Any) -> bool:
    """Whether a diffusers pipeline makes videos, of as many frames as it is told."""
    return "num_frames" in inspect.signature(pipeline.__call__).parameters


def takes_lengths(pipeline: Any) -> bool:
    """Whether a diffusers pipeline makes protein chains, of lengths that it is told."""
    return "lengths" in inspect.signature(pipeline.__call__).parameters
