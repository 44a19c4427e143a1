"""How a loaded pipeline computes: which attention its network uses, and where weights wait until they are needed.

Both are diffusers' own; what this adds is that nothing asked for is silently left out.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError, nearest
from .network import network_of

OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}
SDPA = "native"  # diffusers' name of torch's scaled_dot_product_attention


def set_attention(pipeline: Any, name: str, trust_remote_code: bool = False) -> None:
    """Has the network of a pipeline attend by `sdpa`, `xformers`, or any of diffusers' attention backends.

    Backends ending in _hub run code that diffusers fetches, and take `trust_remote_code`. Raises UserError for an
    unknown name, a missing package, or a network that does not let itself be told.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = {backend.value for backend in AttentionBackendName} | {"sdpa"}
    if name not in known:
        raise UserError(f"unknown attention '{name}': {nearest(name, known)}")
    if name.endswith("_hub") and not trust_remote_code:
        raise UserError(
            f"attention '{name}' runs code that diffusers fetches from the hub: it takes --trust-remote-code"
        )
    network: Any = network_of(pipeline)
    choose = _choice(pipeline, network, SDPA if name == "sdpa" else name)
    try:
        choose()
    except (RuntimeError, ValueError, ImportError) as error:
        raise UserError(f"attention '{name}' cannot be had here: {str(error).strip().splitlines()[0]}") from error


def _choice(pipeline: Any, network: Any, name: str) -> Any:
    """What switches the attention. Networks with older attention classes know torch's, their default, and xformers."""
    if any(hasattr(getattr(part, "processor", None), "_attention_backend") for part in network.modules()):
        return lambda: network.set_attention_backend(name)
    if name == "xformers":
        return pipeline.enable_xformers_memory_efficient_attention
    if name != SDPA:
        raise UserError(f"{type(network).__name__} has no attention backends: choose sdpa or xformers")
    return lambda: None


def set_offload(pipeline: Any, how: str, device: torch.device | str | None = None) -> None:
    """Keeps the weights on the CPU, and on `device` (default: the GPU) what is computing.

    how: `model`, a whole network at a time, or `sequential`, a layer at a time, slower and smaller. Raises UserError
    without accelerate or a GPU, and for a pipeline that does not say its order.
    """
    if how not in OFFLOADS:
        raise UserError(f"unknown offload '{how}': {nearest(how, OFFLOADS)}")
    if device is None and not torch.cuda.is_available():
        raise UserError(f"offload '{how}' moves weights to a GPU and back, and there is none (no CUDA): leave it out")
    try:
        getattr(pipeline, OFFLOADS[how])(**({} if device is None else {"device": device}))
    except ImportError as error:
        raise UserError(f"offload '{how}' needs accelerate: pip install accelerate") from error
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{type(pipeline).__name__} refuses offload '{how}': {reason}") from error
