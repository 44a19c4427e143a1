"""SANA-Sprint: SANA's network with guidance as an input, fed t itself (arXiv 2503.09641).

Guidance is told by `guidance` [rows] of a condition, the usual scale, 1 where it says none; one call is the guided
field. The pipeline speaks of TrigFlow, but its network is a flow network: see `maths.angle_path`.

A network of this family is made from a SANA that was trained on t (`timestep_scale: 0.001`, as SANA-Sprint's teachers
are) by `student: {from: sana_sprint, build: {base: FOLDER}}`: the input is added, and at first adds nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..data.batch import Cond
from ..errors import UserError
from ..maths.angle_path import AngleFlowPath
from ..nets.extra_inputs import reads
from .build import parse
from .family import Loaded, settings
from .flow_sizes import SANA_SIZES, SanaConfig, preset
from .folder import open_model
from .sana import SanaFamily, SanaSurroundings
from .surroundings import borrowed

SIZES: Mapping[str, Mapping[str, Any]] = {**SANA_SIZES, "600m": {**SANA_SIZES["600m"], "sample_size": 32}}
LABELS = 1000  # of t = 1, in SANA's scheduler


class SanaSprintConfig(SanaConfig):
    """Sizes of a SanaTransformer2DModel that is told guidance. `size` names a row of SIZES that the rest default to."""

    qk_norm: Literal["rms_norm_across_heads"] | None = "rms_norm_across_heads"
    guidance_embeds_scale: float = Field(default=0.1, gt=0, description="of the guidance that the network is fed")
    timestep_scale: float = Field(default=1.0, ge=1, le=1, description="there is none: the network is fed t")
    shift: float = Field(default=1.0, ge=1, le=1, description="there is none: the clock is an angle")

    def arguments(self) -> dict[str, Any]:
        """What SanaTransformer2DModel is made with."""
        return super().arguments() | {"guidance_embeds": True}


class FromBase(BaseModel):
    """What a recipe says in the place of sizes."""

    model_config = ConfigDict(extra="forbid")
    base: str = Field(description="folder or hub id of a SANA that is fed t, whose weights and surroundings are used")


class SanaSprintSurroundings(SanaSurroundings):
    """SANA's; the pipeline itself has no negative prompt, so no condition is that of SANA."""

    pipeline = "SanaSprintPipeline"

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str], instruction: Sequence[str] | None) -> Cond:
        embeds, mask = self.text_pipeline().encode_prompt(
            list(texts), device=self.device, complex_human_instruction=instruction
        )
        return Cond(prompt_embeds=embeds, mask=mask)


class SanaSprintFamily(SanaFamily):
    """SanaTransformer2DModel: called (x, t, guidance, encoder_hidden_states=, encoder_attention_mask=); answers v."""

    name = "sana_sprint"
    facts = replace(
        SanaFamily.facts,
        pipeline="SanaSprintPipeline",
        guidance="embedded",
        scalar_slot="guidance",
        time_embedding="time_embed.timestep_embedder",
    )

    def holds(self, config: Mapping[str, Any]) -> bool:
        """SANA with an embedded guidance."""
        return config.get("_class_name") == "SanaTransformer2DModel" and bool(config.get("guidance_embeds"))

    def build(self, **config: Any) -> Loaded:
        """A network with random weights; around it, what `around` names. Told a `base`, that one with guidance added.

        UserError when the base is no SANA, or one that is fed 1000 t.
        """
        from diffusers import SanaTransformer2DModel

        where = f"{self.name} build"
        if "base" in config:
            return self._from_base(parse(FromBase, config, where).base)
        c = parse(SanaSprintConfig, preset(SIZES, config, where), where)
        module: Any = SanaTransformer2DModel(**c.arguments())
        return self._loaded(module, borrowed(c.around))

    def load(self, folder: FilePath) -> Loaded:
        """Network and path; the autoencoder and the text encoder follow when they are asked for."""
        loaded = super().load(folder)
        return replace(loaded, around=SanaSprintSurroundings(folder, loaded.module))

    def pack(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: Cond) -> dict[str, Any]:
        """Text states with their mask, t, and the guidance in the network's own unit."""
        return {
            "hidden_states": x,
            "timestep": timestep,
            "guidance": _guidance(module, x, cond) * settings(module).guidance_embeds_scale,
            "encoder_hidden_states": cond["prompt_embeds"].to(x),
            "encoder_attention_mask": cond["mask"],
        }

    def upgrade(self, module: nn.Module, inputs: Sequence[str]) -> nn.Module:
        """Guidance alone is there already; all others go through `nets.extra_inputs`."""
        return module if tuple(inputs) == ("guidance",) else super().upgrade(module, inputs)

    def embeds_guidance(self, module: nn.Module) -> bool:
        """Always, but for one that has just gained it."""
        return not getattr(module, "untold", False)

    @torch.no_grad()
    def sealed(self, module: nn.Module) -> nn.Module:
        """A copy whose guidance input always adds what guidance 1 adds: the pipeline feeds it 4.5 unless it is told."""
        copied = copy.deepcopy(module)
        embed: Any = copied.time_embed
        last = embed.guidance_embedder.linear_2
        off = embed.guidance_condition_proj(last.weight.new_full((1,), settings(module).guidance_embeds_scale))
        last.bias.copy_(embed.guidance_embedder(off.to(last.weight))[0])
        nn.init.zeros_(last.weight)
        return copied

    def _from_base(self, base: str) -> Loaded:
        found = open_model(base)
        if found.family != "sana":
            raise UserError(f"{self.name} build: base={base} is of family {found.family}: name a SANA")
        module: Any = found.module
        fed = settings(module).timestep_scale * LABELS
        if abs(fed - 1) > 1e-6:
            raise UserError(
                f"{self.name} build: base={base} is fed {fed:g} t, and SANA-Sprint's pipeline feeds t: name a SANA of "
                "timestep_scale 0.001 (SANA-Sprint's teachers), or write `student: {from: teacher}` for one of sana"
            )
        module.time_embed, module.untold = _with_guidance(module), True
        module.register_to_config(guidance_embeds=True, timestep_scale=1.0)
        return self._loaded(module, getattr(found.around, "folder", None))

    def _loaded(self, module: nn.Module, folder: FilePath | None) -> Loaded:
        return Loaded(module, self.name, AngleFlowPath(), SanaSprintSurroundings(folder, module))


def _guidance(module: nn.Module, x: Tensor, cond: Cond) -> Tensor:
    """[rows]; 1 where the condition says none, or where it goes in beside the stock class's own input."""
    if "guidance" in cond and "guidance" not in reads(module):
        return cond["guidance"].to(x)
    return x.new_ones(len(x))


def _with_guidance(module: nn.Module) -> nn.Module:
    """The time embedding of `module` with a place for guidance that adds nothing yet: its layers by other names."""
    from diffusers.models.transformers.sana_transformer import SanaCombinedTimestepGuidanceEmbeddings

    known: Any = module.time_embed
    weight = known.linear.weight
    made: Any = SanaCombinedTimestepGuidanceEmbeddings(weight.shape[1]).to(weight)
    made.timestep_embedder, made.linear = known.emb.timestep_embedder, known.linear
    nn.init.zeros_(made.guidance_embedder.linear_2.weight)
    nn.init.zeros_(made.guidance_embedder.linear_2.bias)
    return made


SANA_SPRINT = SanaSprintFamily()
