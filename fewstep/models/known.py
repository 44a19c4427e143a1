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
    "stabilityai/stable-diffusion-3-medium-diffusers": Known("stable_diffusion_3", {"size": "sd3_medium"}),
    "stabilityai/stable-diffusion-3.5-medium": Known("stable_diffusion_3", {"size": "sd35_medium"}),
    "stabilityai/stable-diffusion-3.5-large": Known("stable_diffusion_3", {"size": "sd35_large"}),
    "Efficient-Large-Model/Sana_600M_512px_diffusers": Known("sana", {"size": "600m"}),
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": Known("sana", {"size": "600m", "sample_size": 32}),
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": Known("sana", {"size": "1600m", "sample_size": 16}),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": Known("sana", {"size": "1600m"}),
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers": Known("sana_sprint", {"size": "600m"}),
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": Known("sana_sprint", {"size": "1600m"}),
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers": Known(
        "sana", {"size": "600m", "sample_size": 32, "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
    ),
    "Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers": Known(
        "sana", {"size": "1600m", "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
    ),
    "Qwen/Qwen-Image": Known("qwen_image", {"size": "20b"}),
    "black-forest-labs/FLUX.1-dev": Known("flux", {"size": "dev"}),
    "black-forest-labs/FLUX.1-schnell": Known("flux", {"size": "schnell"}),
    "Tongyi-MAI/Z-Image": Known("z_image", {"size": "6b", "shift": 6.0}),
    "Tongyi-MAI/Z-Image-Turbo": Known("z_image", {"size": "6b"}),
    "Alpha-VLLM/Lumina-Image-2.0": Known("lumina2", {"size": "2b"}),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": Known("pixart_sigma", {"size": "xl"}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": Known("wan", {"size": "1.3b"}),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": Known("wan", {"size": "14b"}),
}
