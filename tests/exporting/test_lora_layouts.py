"""LoRA files of other layouts: read back by the stock pipelines, by peft, and by readers of the outside names.

The names are held to diffusers' own converters of first releases: what the file changes there, converted like a
checkpoint of that release, is what the adapter changes here.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils as first_release
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.exporting.lora import LORA_FILES, check_layout, write_lora
from fewstep.models.registry import FAMILIES
from fewstep.nets.lora import Adapter, use
from tests.models.tiny_flux import TRANSFORMER as FLUX
from tests.models.tiny_qwen_image import TRANSFORMER as QWEN
from tests.models.tiny_sana import TRANSFORMER as SANA
from tests.models.tiny_sd import SDXL, UNET
from tests.models.tiny_sd3 import TRANSFORMER as SD3

SAID = {"schedule": {"kind": "renoise", "u": [1.0, 0.5]}}
# as the released ones are built: no change of size in a block without attention
DEEP = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
}
LUMINA = {  # the widths of the release, which its converter knows by heart
    "hidden_size": 2304,
    "num_attention_heads": 24,
    "num_kv_heads": 8,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "cap_feat_dim": 16,
}
WIDE_FLUX = {**FLUX, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128}
ZIMAGE = {
    "dim": 32,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "axes_dims": [8, 4, 4],
    "axes_lens": [256, 32, 32],
    "cap_feat_dim": 16,
}


def only_named(pipeline: str) -> Any:
    """What the layouts ask of a family."""
    return SimpleNamespace(facts=SimpleNamespace(pipeline=pipeline, component="transformer", lora_prefix="transformer"))


FAMILY: dict[str, Any] = {
    "sd": FAMILIES.get("stable_diffusion"),
    "sdxl": FAMILIES.get("stable_diffusion_xl"),
    "sd3": FAMILIES.get("stable_diffusion_3"),
    "flux": FAMILIES.get("flux"),
    "lumina": only_named("Lumina2Pipeline"),
    "qwen": FAMILIES.get("qwen_image"),
    "zimage": only_named("ZImagePipeline"),
    "sana": FAMILIES.get("sana"),
}


def network(name: str) -> nn.Module:
    """A tiny network of the family; wide ones have no storage."""
    torch.manual_seed(0)
    with torch.device("meta" if name in ("flux wide", "lumina") else "cpu"):
        return {
            "sd": lambda: UNet2DConditionModel(**{**UNET, **DEEP}),
            "sdxl": lambda: UNet2DConditionModel(**{**UNET, **SDXL, **DEEP}),
            "sd3": lambda: SD3Transformer2DModel(**SD3),
            "flux": lambda: FluxTransformer2DModel(**FLUX, guidance_embeds=True),
            "flux wide": lambda: FluxTransformer2DModel(**WIDE_FLUX, guidance_embeds=True),
            "lumina": lambda: Lumina2Transformer2DModel(**LUMINA),
            "qwen": lambda: QwenImageTransformer2DModel(**QWEN),
            "zimage": lambda: ZImageTransformer2DModel(**ZIMAGE),
            "sana": lambda: SanaTransformer2DModel(**SANA),
        }[name]().eval()


def trained(module: nn.Module, targets: tuple[str, ...] = ("*",), rank: int = 6, alpha: float = 9.0) -> Adapter:
    """An adapter whose two sides are random; some layers are too small for rank 6."""
    adapter = Adapter(module, rank, alpha, targets).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return adapter


def probed(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """scale * up @ down of a fixed input, [out, 2], in float64: what a change does, whatever its rank."""
    columns = torch.arange(2 * down[0].numel(), dtype=torch.float64).reshape(-1, 2).cos()
    return scale * (up.flatten(1).double() @ (down.flatten(1).double() @ columns))


def of(adapter: Adapter) -> dict[str, Tensor]:
    """What the adapter does, by layer."""
    return {
        key.replace("/", "."): probed(adapter.down[key].weight, adapter.up[key].weight, adapter.scale)
        for key in adapter.down
    }


def written(adapter: Adapter, module: nn.Module, name: str, layout: str, folder: Path) -> Path:
    """The file, or folder, in that layout."""
    return folder / write_lora(adapter, module, FAMILY[name.split()[0]], folder, SAID, layout)


def outside(file: Path) -> dict[str, Tensor]:
    """What a file of ComfyUI's or kohya's keys does, by outside name: alpha / rank * up @ down."""
    tensors = load_file(file)
    ends = (".lora_down.weight", ".lora_up.weight") if "kohya" in file.name else (".lora_A.weight", ".lora_B.weight")
    names = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
    assert len(tensors) == 3 * len(names)
    pairs = {name: (tensors[name + ends[0]], tensors[name + ends[1]]) for name in names}
    return {name: probed(*pair, tensors[name + ".alpha"].item() / len(pair[0])) for name, pair in pairs.items()}


class Rest(dict):
    """A checkpoint of an adapter's layers: all else that a converter takes out of it are zeros."""

    def pop(self, key: str, *default: Any) -> Any:
        """The layer, or zeros that can be cut in any parts."""
        return super().pop(key, default[0] if default else torch.zeros(7 * 3072, 1))


def converted(name: str, changes: dict[str, Tensor], module: Any) -> dict[str, Tensor]:
    """Changes of a first release's layers, by diffusers' names."""
    checkpoint: dict[str, Any] = Rest({f"{layer}.weight": change for layer, change in changes.items()})
    if name in ("sd", "sdxl"):
        checkpoint |= {f"{layer}.bias": torch.zeros(1) for layer in changes}
        ldm = {first_release.LDM_UNET_KEY + key: change for key, change in checkpoint.items()}
        return first_release.convert_ldm_unet_checkpoint(ldm, dict(module.config))
    convert = {
        "sd3": first_release.convert_sd3_transformer_checkpoint_to_diffusers,
        "flux wide": first_release.convert_flux_transformer_checkpoint_to_diffusers,
        "lumina": first_release.convert_lumina2_to_diffusers,
        "qwen": dict,  # diffusers' network has the first release's names
        "zimage": dict,  # ComfyUI knows both, see its comfy/utils.py
    }[name]
    return convert(checkpoint)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All of ours are among theirs, which add nothing; exact up to the order of a float64 sum."""
    assert ours and ours.keys() <= {key.removesuffix(".weight") for key in theirs}
    for layer, change in ours.items():
        torch.testing.assert_close(theirs[f"{layer}.weight"], change, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux wide", "lumina", "qwen", "zimage"])
def test_comfyui_names_are_those_of_the_first_release(tmp_path, name):
    module = network(name)
    adapter = trained(module)
    file = written(adapter, module, name, "comfyui", tmp_path)
    changes = {key.removeprefix("diffusion_model."): change for key, change in outside(file).items()}
    same(of(adapter), converted(name, changes, module))


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux wide", "lumina", "qwen", "zimage"])
def test_kohya_names_are_comfyui_names_with_underscores(tmp_path, name):
    """And hold the same changes, so that what holds of the one layout holds of the other."""
    module = network(name)
    adapter = trained(module)
    kohya = outside(written(adapter, module, name, "kohya", tmp_path))
    comfyui = outside(written(adapter, module, name, "comfyui", tmp_path))
    flat = {"lora_unet_" + key.removeprefix("diffusion_model.").replace(".", "_"): c for key, c in comfyui.items()}
    assert flat.keys() == kohya.keys()
    assert all(torch.equal(flat[key], kohya[key]) for key in flat)


def stock(name: str, module: nn.Module) -> Any:
    """The stock pipeline around the network, and nothing else in it."""
    kind = getattr(diffusers, FAMILY[name].facts.pipeline)
    parts = inspect.signature(kind.__init__).parameters.values()
    absent = {part.name: None for part in parts if part.default is part.empty and part.name != "self"}
    return kind(**{**absent, FAMILY[name].facts.component: module})


@torch.no_grad()
def answer(name: str, module: nn.Module) -> Tensor:
    """What the network answers to one fixed input."""
    family = FAMILY[name]
    torch.manual_seed(2)
    cond = family.blank(module)
    x, timestep = torch.randn(1, *(16 if s > 16 else s for s in family.row_shape(module))), torch.tensor([500.0])
    cond = cond.with_(prompt_embeds=torch.randn_like(cond["prompt_embeds"].expand(-1, 3, -1)))
    if "mask" in cond:
        cond = cond.with_(mask=torch.ones(1, 3, dtype=torch.long))
    return module(**family.pack(module, x, timestep, cond)).sample


def off(theirs: Tensor, ours: Tensor) -> float:
    """Largest difference, in units of the largest number."""
    return ((theirs - ours).abs().max() / ours.abs().max()).item()


@torch.no_grad()
def adapted(name: str, module: nn.Module, adapter: Adapter) -> Tensor:
    """What the trainer's network answers; merged into a copy, the same."""
    merged = copy.deepcopy(module)
    adapter.merge_into(merged)
    with use(adapter):
        ours = answer(name, module)
    assert off(answer(name, merged), ours) < 2e-6
    assert off(answer(name, module), ours) > 1e-3
    return ours


STOCK = [
    ("sd", "kohya", ("*",)),
    ("sdxl", "kohya", ("*",)),
    ("flux", "kohya", ("transformer_blocks.*",)),  # of the others it knows the release's widths by heart
    ("qwen", "kohya", ("*",)),
    ("qwen", "comfyui", ("*",)),
    ("sd", "diffusers", ("*",)),
    ("flux", "diffusers", ("*",)),
]


@pytest.mark.parametrize(("name", "layout", "targets"), STOCK)
def test_the_stock_pipeline_reads_the_file_and_answers_as_the_trainer(tmp_path, name, layout, targets):
    module = network(name)
    adapter = trained(module, targets)
    file = written(adapter, module, name, layout, tmp_path)
    pipeline = stock(name, copy.deepcopy(module))
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    assert off(answer(name, getattr(pipeline, FAMILY[name].facts.component)), adapted(name, module, adapter)) < 1e-5


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "qwen", "sana"])
def test_peft_reads_its_folder_and_answers_as_the_trainer(tmp_path, name):
    module = network(name)
    adapter = trained(module)
    folder = written(adapter, module, name, "peft", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of keys that are missing
        theirs = PeftModel.from_pretrained(copy.deepcopy(module), folder)
    assert off(answer(name, theirs.base_model.model), adapted(name, module, adapter)) < 1e-5


@pytest.mark.parametrize(
    ("name", "layout", "targets"),
    [  # of FLUX.1 diffusers reads the blocks alone, and leaves out all else without a word
        ("flux wide", "kohya", ("transformer_blocks.*", "single_transformer_blocks.*")),
        ("zimage", "kohya", ("*",)),
        ("zimage", "comfyui", ("*",)),
    ],
)
def test_diffusers_reads_what_the_adapter_changes(tmp_path, name, layout, targets):
    adapter = trained(network(name), targets)
    file = written(adapter, network(name), name, layout, tmp_path)
    kind = getattr(diffusers, FAMILY[name.split()[0]].facts.pipeline)
    state = kind.lora_state_dict(str(tmp_path), weight_name=file.name)
    ours = of(adapter)
    assert {key.split(".lora_")[0] for key in state} == {f"transformer.{layer}" for layer in ours}
    for layer, change in ours.items():
        down, up = (state[f"transformer.{layer}.lora_{end}.weight"] for end in "AB")
        assert off(probed(down, up, 1.0), change) < 1e-5  # it multiplies alpha / rank in, in float32


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_layers_that_are_alone_there_keep_their_numbers(tmp_path, layout):
    module = network("sdxl")
    adapter = trained(module)
    tensors = list(load_file(written(adapter, module, "sdxl", layout, tmp_path)).values())
    parts = [part.weight for parts in (adapter.down, adapter.up) for part in parts.values()]
    assert len(tensors) == len(parts) * 3 // 2
    assert all(any(torch.equal(part, tensor) for tensor in tensors) for part in parts)


def test_rows_of_a_joint_layer_that_have_no_adapter_do_not_change(tmp_path):
    module = network("flux")
    adapter = trained(module, ("transformer_blocks.1.attn.to_k",), rank=4, alpha=2.0)
    ((name, change),) = outside(written(adapter, module, "flux", "comfyui", tmp_path)).items()
    q, k, v = change.chunk(3)
    assert name == "diffusion_model.double_blocks.1.img_attn.qkv"
    assert not q.any() and not v.any()
    assert torch.equal(k, of(adapter)["transformer_blocks.1.attn.to_k"])


def test_stable_diffusion_keeps_diffusers_names_in_kohyas_keys(tmp_path):
    """As kohya's trainers have them; those of XL are of the first release."""
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    names = {}
    for name in ("sd", "sdxl"):
        module = network(name)
        (names[name],) = outside(written(trained(module, (layer,)), module, name, "kohya", tmp_path))
    assert names["sd"] == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert names["sdxl"] == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("layout", LORA_FILES)
def test_every_layout_says_how_the_student_is_sampled(tmp_path, layout):
    module = network("sd")
    place = written(trained(module, ("to_q",), rank=4, alpha=2.0), module, "sd", layout, tmp_path)
    with safe_open(place / "adapter_model.safetensors" if place.is_dir() else place, "pt") as file:
        said = file.metadata()
    assert json.loads(said["fewstep"]) == SAID
    # diffusers reads this key in any file, and would multiply alpha / rank in twice
    assert ("lora_adapter_metadata" in said) == (layout == "diffusers")
    if layout in ("kohya", "comfyui"):
        assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("4", "2.0")


@pytest.mark.parametrize(
    ("name", "layer", "layout", "able"),
    [
        ("sana", "transformer_blocks.0.attn1.to_q", "comfyui", "diffusers or peft"),
        ("sana", "transformer_blocks.0.attn1.to_q", "kohya", "diffusers or peft"),
        ("sd", "time_embedding.cond_proj", "kohya", "diffusers or peft"),
    ],
)
def test_a_layer_without_a_name_is_refused_with_the_layouts_that_have_one(tmp_path, name, layer, layout, able):
    module = network(name)
    if layer.endswith("cond_proj"):
        module = FAMILY[name].upgrade(module, ["guidance"])
    adapter = trained(module, (layer,))
    refused = rf"{layout} has no name for the layer {layer} of \w+: choose {able}$"
    with pytest.raises(UserError, match=refused):
        check_layout(layout, adapter, module, FAMILY[name])
    with pytest.raises(UserError, match=refused):
        written(adapter, module, name, layout, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_layout_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="unknown LoRA layout 'comfy': did you mean 'comfyui'"):
        check_layout("comfy")
