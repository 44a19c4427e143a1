"""The table of families. A new one is a line here, or an entry point in the group `fewstep.families`."""

from __future__ import annotations

from ..registry import Registry

FAMILIES = Registry(
    "family",
    "fewstep.families",
    {
        "unet2d": "fewstep.models.unet2d:UNET2D",
        "dit": "fewstep.models.dit:DIT",
        "stable_diffusion": "fewstep.models.stable_diffusion:SD",
        "stable_diffusion_xl": "fewstep.models.stable_diffusion:SDXL",
        "stable_diffusion_3": "fewstep.models.stable_diffusion_3:SD3",
        "sana": "fewstep.models.sana:SANA",
        "sana_sprint": "fewstep.models.sana_sprint:SANA_SPRINT",
        "qwen_image": "fewstep.models.qwen_image:QWEN_IMAGE",
        "flux": "fewstep.models.flux:FLUX",
        "z_image": "fewstep.models.z_image:Z_IMAGE",
        "lumina2": "fewstep.models.lumina2:LUMINA2",
        "pixart_sigma": "fewstep.models.pixart_sigma:PIXART_SIGMA",
        "wan": "fewstep.models.wan:WAN",
        "protein_flow": "fewstep.models.protein_flow:PROTEIN_FLOW",
        "proteina": "fewstep.models.proteina:PROTEINA",
        "gaussian": "fewstep.models.oracle:GAUSSIAN",
        "gaussian_mixture": "fewstep.models.oracle:GAUSSIAN_MIXTURE",
        "mlp": "fewstep.models.oracle:MLP",
        "cnn": "fewstep.models.cnn:CNN",
        "text_encoder": "fewstep.models.text_encoder:TEXT_ENCODER",
    },
)
