"""Hub ids whose sizes are known, so that a memory plan needs no weights. Loading reads the model's own config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Known(NamedTuple):
    """A family and what its `build` takes to make a network of the same shapes and path."""

    family: str
    build: Mapping[str, Any]


KNOWN: Mapping[str, Known] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Known("stable_diffusion", {"size": "sd15"}),
    "stabilityai/stable-diffusion-2-1": Known("stable_diffusion", {"size": "sd21"}),
    "stabilityai/stable-diffusion-2-1-base": Known(
        "stable_diffusion", {"size": "sd21", "sample_size": 64, "prediction_type": "epsilon"}
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Known("stable_diffusion_xl", {"size": "sdxl"}),
}
