"""Proteina's network (arXiv 2503.00710) as a family of its own, and its released weights as a network of this family.

Released weights, of Proteina and of distilled Proteina, are non-commercial; they are never fetched. What is read is a
safetensors file that the user made of them. The names and the order of features are those of the public code; they were
tried on files made with the same names, not on the released ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..errors import UserError
from ..maths.log_path import LogFlowPath
from .build import parse
from .family import Loaded
from .flow_sizes import preset
from .protein_flow import ProteinFlowFamily

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "width": 64,
        "num_layers": 2,
        "num_heads": 2,
        "pair_width": 32,
        "registers": 2,
        "index_width": 32,
        "time_width": 32,
        "fold_width": 32,
        "cond_width": 64,
    },
    "60m": {"width": 512, "num_layers": 10, "num_heads": 8, "pair_width": 256},
    "200m": {},
}


class ProteinaConfig(BaseModel):
    """Sizes of the network; `size` names a row of SIZES that the rest default to."""

    model_config = ConfigDict(extra="forbid")
    size: str = "tiny"
    width: int = Field(default=768, gt=0)
    num_layers: int = Field(default=15, gt=0)
    num_heads: int = Field(default=12, gt=0)
    pair_width: int = Field(default=512, gt=0)
    registers: int = Field(default=10, ge=0)
    index_width: int = Field(default=128, gt=2)
    time_width: int = Field(default=256, gt=2)
    fold_width: int = Field(default=256, gt=0)
    cond_width: int = Field(default=512, gt=0)
    cath_classes: tuple[int, ...] = ()
    self_conditioning: bool = True


class ProteinaFamily(ProteinFlowFamily):
    """ProteinaTransformer: called and read as `protein_flow` is."""

    name = "proteina"
    facts = replace(
        ProteinFlowFamily.facts,
        network="fewstep_pipelines:ProteinaTransformer",
        lora={"default": ("qkv", "out"), "wide": ("qkv", "out", "gate", "up", "down", "pair_bias")},
    )

    def build(self, **config: Any) -> Loaded:
        """A network with random weights that answers 0."""
        from fewstep_pipelines import ProteinaTransformer

        where = "proteina build"
        c = parse(ProteinaConfig, preset(SIZES, config, where), where)
        module: Any = ProteinaTransformer(**c.model_dump(exclude={"size"}))
        return Loaded(module, self.name, LogFlowPath())


PROTEINA = ProteinaFamily()

# Released name -> ours, first match; what follows the name (.weight, .bias) stays.
_NAMES: Sequence[tuple[str, str]] = (
    (r"registers$", "register_tokens"),
    (r"linear_3d_embed\.", "coordinates."),
    (r"init_repr_factory\.linear_out\.", "sequence."),
    (r"cond_factory\.linear_out\.", "condition.0."),
    (r"cond_factory\.feat_creators\.\d+\.embedding_C\.", "folds.0."),
    (r"cond_factory\.feat_creators\.\d+\.embedding_A\.", "folds.1."),
    (r"cond_factory\.feat_creators\.\d+\.embedding_T\.", "folds.2."),
    (r"transition_c_(\d)\.swish_linear\.0\.", r"condition.\1.up."),
    (r"transition_c_(\d)\.linear_out\.", r"condition.\1.down."),
    (r"pair_repr_builder\.init_repr_factory\.linear_out\.", "pairs.features."),
    (r"pair_repr_builder\.init_repr_factory\.ln_out\.", "pairs.norm."),
    (r"pair_repr_builder\.cond_factory\.linear_out\.", "pairs.time.0."),
    (r"pair_repr_builder\.cond_factory\.ln_out\.", "pairs.time.1."),
    (r"pair_repr_builder\.adaln\.", "pairs.modulated."),
    (r"transformer_layers\.(\d+)\.mhba\.adaln\.", r"layers.\1.norm_attention."),
    (r"transformer_layers\.(\d+)\.mhba\.scale_output\.to_adaln_zero_gamma\.0\.", r"layers.\1.scale_attention."),
    (r"transformer_layers\.(\d+)\.mhba\.mha\.node_norm\.", r"layers.\1.attention.norm."),
    (r"transformer_layers\.(\d+)\.mhba\.mha\.pair_norm\.", r"layers.\1.attention.norm_pair."),
    (r"transformer_layers\.(\d+)\.mhba\.mha\.q_layer_norm\.", r"layers.\1.attention.norm_q."),
    (r"transformer_layers\.(\d+)\.mhba\.mha\.k_layer_norm\.", r"layers.\1.attention.norm_k."),
    (r"transformer_layers\.(\d+)\.mhba\.mha\.to_qkv\.", r"layers.\1.attention.qkv."),
    (r"transformer_layers\.(\d+)\.mhba\.mha\.to_g\.", r"layers.\1.attention.gate."),
    (r"transformer_layers\.(\d+)\.mhba\.mha\.to_bias\.", r"layers.\1.attention.pair_bias."),
    (r"transformer_layers\.(\d+)\.mhba\.mha\.to_out_node\.", r"layers.\1.attention.out."),
    (r"transformer_layers\.(\d+)\.transition\.adaln\.", r"layers.\1.norm_transition."),
    (r"transformer_layers\.(\d+)\.transition\.scale_output\.to_adaln_zero_gamma\.0\.", r"layers.\1.scale_transition."),
    (r"transformer_layers\.(\d+)\.transition\.transition\.swish_linear\.0\.", r"layers.\1.transition.up."),
    (r"transformer_layers\.(\d+)\.transition\.transition\.linear_out\.", r"layers.\1.transition.down."),
    (r"coors_3d_decoder\.0\.", "norm."),
    (r"coors_3d_decoder\.1\.", "output."),
)
_INSIDE = ((".to_gamma.0.", ".gain."), (".to_beta.", ".shift."))  # of every adaptive norm
_LEFT_OUT = ("disc_head.",)  # of SiDA, not part of the sampler
# What `sequence` reads, in the order of its columns, differs between the released networks; our order is the 200 M one's.
_ORDERS: Mapping[int, Sequence[str]] = {768: ("index", "x_self", "broken"), 512: ("index", "broken", "x_self")}
_ANCHOR = "linear_3d_embed.weight"  # every such network has it


def load_proteina(file: FilePath, prefix: str | None = None, order: Sequence[str] | None = None) -> Loaded:
    """The network in a safetensors file with the names of Proteina's code; its sizes are read off the weights.

    prefix: of the names, for files that hold several networks; by itself the one that is there, e.g. "nn.".
    order: of the features "index", "x_self" and "broken" (the code's feats_init_seq: res_seq_pdb_idx, x_sc and
    chain_break_per_res); by itself that of the released networks of 768 or 512 channels.
    Raises UserError for other files, for networks with triangle layers, and for names or shapes that do not fit.
    """
    weights = _renamed(_of_network(_read(file), prefix, file), file)
    sizes = _sizes(weights, file)
    weights["sequence.weight"] = _in_our_order(weights["sequence.weight"], order or _order(sizes["width"], file))
    loaded = PROTEINA.build(size="200m", **sizes)
    wanted = loaded.module.state_dict()
    _refuse_differences(wanted, weights, file)
    loaded.module.load_state_dict({name: value.float() for name, value in weights.items()})
    return loaded


def _read(file: FilePath) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        raise UserError(
            f"'{file}' is no safetensors file, and pickles are never loaded: where you trust it, write its "
            '`torch.load(...)["state_dict"]` with safetensors.torch.save_file'
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read '{file}': {str(error).splitlines()[0]}") from error


def _of_network(weights: Mapping[str, Tensor], prefix: str | None, file: FilePath) -> dict[str, Tensor]:
    found = [name.removesuffix(_ANCHOR) for name in weights if name.endswith(_ANCHOR)]
    if not found or (prefix is not None and prefix not in found):
        said = "" if prefix is None else f" with the prefix '{prefix}'"
        raise UserError(f"'{file}' holds no network of Proteina's code{said}: no name ends in {_ANCHOR}")
    if len(found) > 1 and prefix is None:
        raise UserError(f"'{file}' holds several networks: choose one with --prefix, of {', '.join(sorted(found))}")
    start = found[0] if prefix is None else prefix
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def _renamed(weights: Mapping[str, Tensor], file: FilePath) -> dict[str, Tensor]:
    if any(name.startswith("pair_update_layers.") for name in weights):
        raise UserError(
            f"'{file}' is a network whose layers update its pairs (triangle layers), which are not built here: "
            "convert one of those named no_tri"
        )
    kept = {name: value for name, value in weights.items() if not name.startswith(_LEFT_OUT)}
    named = {_our_name(name): value for name, value in kept.items()}
    unknown = [name for name in kept if _our_name(name) is None]
    if unknown:
        raise UserError(f"'{file}' has {len(unknown)} weights that are unknown here, e.g. {', '.join(unknown[:3])}")
    # the label for "not known" is their last row and our first
    return {
        name: value.roll(1, 0) if name.startswith("folds.") else value
        for name, value in named.items()
        if name is not None
    }


def _our_name(name: str) -> str | None:
    for pattern, ours in _NAMES:
        match = re.match(pattern, name)
        if match is not None:
            ours = match.expand(ours) + name[match.end() :]
            for theirs, inside in _INSIDE:
                ours = ours.replace(theirs, inside)
            return ours
    return None


def _sizes(weights: Mapping[str, Tensor], file: FilePath) -> dict[str, Any]:
    try:
        folds = [weights[f"folds.{level}.weight"] for level in range(3) if f"folds.{level}.weight" in weights]
        return {
            "width": weights["coordinates.weight"].shape[0],
            "num_layers": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
            "num_heads": weights["layers.0.attention.pair_bias.weight"].shape[0],
            "pair_width": weights["pairs.norm.weight"].shape[0],
            "registers": weights["register_tokens"].shape[0] if "register_tokens" in weights else 0,
            "index_width": weights["sequence.weight"].shape[1] - 4,  # beside it a predicted chain and breaks
            "time_width": weights["pairs.time.0.weight"].shape[1],
            "fold_width": folds[0].shape[1] if folds else 1,
            "cond_width": weights["condition.0.weight"].shape[0],
            "cath_classes": tuple(len(fold) - 1 for fold in folds),
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"'{file}' is not whole: {error} is missing") from None


def _order(width: int, file: FilePath) -> Sequence[str]:
    if width not in _ORDERS:
        raise UserError(
            f"'{file}' has {width} channels, as no released network: say its --order, e.g. index,x_self,broken"
        )
    return _ORDERS[width]


def _in_our_order(weight: Tensor, order: Sequence[str]) -> Tensor:
    """The columns of `sequence` by feature; an index is as wide as the others leave it."""
    sizes = {"index": weight.shape[1] - 4, "x_self": 3, "broken": 1}
    if sorted(order) != sorted(sizes):
        raise UserError(f"order={','.join(order)}: write index, x_self and broken in the order of the network")
    columns = dict(zip(order, weight.split([sizes[name] for name in order], 1)))
    return torch.cat([columns[name] for name in sizes], 1)


def _refuse_differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], file: FilePath) -> None:
    for what in _differences(wanted, found):
        raise UserError(f"'{file}' does not fit Proteina's network without triangle layers: {what}")


def _differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    for name, value in wanted.items():
        if name not in found and name != "register_tokens":
            yield f"{name} is missing"
        elif name in found and found[name].shape != value.shape:
            yield f"{name} has shape {tuple(found[name].shape)}, not {tuple(value.shape)}"
    yield from (f"{name} is not part of it" for name in found.keys() - wanted.keys())
