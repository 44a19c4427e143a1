"""Tiny pipelines of the text-to-image families, as columns of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.models.tiny_flux import tiny_flux
from tests.models.tiny_lumina2 import tiny_lumina2
from tests.models.tiny_pixart import tiny_pixart
from tests.models.tiny_qwen_image import tiny_qwen_image
from tests.models.tiny_sana import tiny_sana
from tests.models.tiny_sd import tiny_sd
from tests.models.tiny_sd3 import tiny_sd3
from tests.models.tiny_z_image import tiny_z_image


@dataclass(frozen=True)
class Family:
    """A column. tiny: writes the pipeline. stock: its class. name: as errors call it. pixels: side of its pictures.

    sized: whether the network's config says the size; else pictures say it, and prompts alone would mean 1024 pixels.
    """

    title: str
    tiny: Callable[[Path], Path]
    stock: str
    name: str
    pixels: int = 16
    sized: bool = False


FAMILIES = {
    "sd15": Family("SD 1.5", tiny_sd, "StableDiffusionPipeline", "stable_diffusion", sized=True),
    "sdxl": Family(
        "SDXL", partial(tiny_sd, kind="sdxl"), "StableDiffusionXLPipeline", "stable_diffusion_xl", sized=True
    ),
    "sd3": Family("SD3", tiny_sd3, "StableDiffusion3Pipeline", "stable_diffusion_3", sized=True),
    "sana": Family("SANA", tiny_sana, "SanaPipeline", "sana", 32),
    "z_image": Family("Z-Image", tiny_z_image, "ZImagePipeline", "z_image"),
    "qwen_image": Family("Qwen-Image", tiny_qwen_image, "QwenImagePipeline", "qwen_image"),
    "flux_dev": Family("FLUX.1 dev", tiny_flux, "FluxPipeline", "flux"),
    "flux_schnell": Family("FLUX.1 schnell", partial(tiny_flux, kind="schnell"), "FluxPipeline", "flux"),
    "lumina2": Family("Lumina-2", tiny_lumina2, "Lumina2Pipeline", "lumina2", 64),
    "pixart_sigma": Family("PixArt-Σ", tiny_pixart, "PixArtSigmaPipeline", "pixart_sigma"),
}
