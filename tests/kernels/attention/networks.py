"""One tiny network of each kind of attention that diffusers has, as a function of its time, with what else it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 2


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def unet() -> tuple[nn.Module, dict[str, Any]]:
    """Stable Diffusion's: cross-attention with a mask over text tokens."""
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12, attention_head_dim=2,
    )  # fmt: skip
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return module, {"encoder_hidden_states": _random(ROWS, 5, 12), "encoder_attention_mask": seen}


def dit() -> tuple[nn.Module, dict[str, Any]]:
    """Class labels, self-attention."""
    from diffusers import DiTTransformer2DModel

    module = DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, patch_size=2, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    return module, {"class_labels": torch.tensor([1, 2])}


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """Joint attention of pixels and text."""
    from diffusers import SD3Transformer2DModel

    from tests.models.tiny_sd import WORDS
    from tests.models.tiny_sd3 import JOINT, TRANSFORMER

    module = SD3Transformer2DModel(**TRANSFORMER)
    return module, {"encoder_hidden_states": _random(ROWS, 5, JOINT), "pooled_projections": _random(ROWS, 2 * WORDS)}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """Joint and single blocks with rotations, through diffusers' own dispatch."""
    from diffusers import FluxTransformer2DModel

    from tests.models.tiny_flux import TRANSFORMER

    module = FluxTransformer2DModel(**TRANSFORMER)
    ids = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1)
    given = {
        "encoder_hidden_states": _random(ROWS, 5, TRANSFORMER["joint_attention_dim"]),
        "pooled_projections": _random(ROWS, TRANSFORMER["pooled_projection_dim"]),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": ids,
    }
    return module, given


def sana() -> tuple[nn.Module, dict[str, Any]]:
    """Linear self-attention, and cross-attention with a mask."""
    from diffusers import SanaTransformer2DModel

    from tests.models.tiny_sana import TRANSFORMER

    module = SanaTransformer2DModel(**TRANSFORMER)
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return module, {
        "encoder_hidden_states": _random(ROWS, 5, TRANSFORMER["caption_channels"]),
        "encoder_attention_mask": seen,
    }


BUILT: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "unet": unet, "dit": dit, "sd3": sd3, "flux": flux, "sana": sana,
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A loud random network, and its answer as a function of the time s [rows], by which its input moves too."""
    from tests.models.tiny_sd3 import loud

    torch.manual_seed(0)
    module, given = BUILT[name]()
    loud(module)
    x = _random(ROWS, 16, 16) if name == "flux" else _random(ROWS, 4, 8, 8)

    def answer(s: Tensor) -> Tensor:
        moved = x * (1 + s.reshape(-1, *[1] * (x.ndim - 1)))
        first = {"sample": moved} if name == "unet" else {"hidden_states": moved}
        return module(**first, timestep=s if name == "flux" else 1000 * s, **given).sample

    return module, answer
