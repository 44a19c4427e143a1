"""The second time of a two-time network on disk: its trained inputs as a component of their own, beside a stock network."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError
from ..nets.extra_inputs import NAME, attach, reads

if TYPE_CHECKING:
    from fewstep_pipelines import FewStepTimes

TIMES = "times"
_TRAINING = "sign"  # adds nothing at +1, which is all that sampling asks for


def times_of(module: nn.Module, time_embedding: str) -> FewStepTimes:
    """The component that adds to a stock network what the extra inputs of `module` add, bit for bit."""
    from fewstep_pipelines import FewStepTimes

    extra: Any = module.get_submodule(NAME)
    names = tuple(name for name in reads(module) if name != _TRAINING)
    width = next(iter(extra.embeddings.values()))[-1].out_features
    times = FewStepTimes(names=names, width=width, time_embedding=time_embedding)
    state = {key: tensor for key, tensor in extra.state_dict().items() if key.split(".")[1] in names}
    nn.Module.to(times, next(extra.parameters()).dtype)  # diffusers' own `to` warns
    times.load_state_dict(state)
    return times.requires_grad_(False)


def write_times(times: FewStepTimes, folder: FilePath) -> None:
    """Weights and config alone, for folders whose pipeline tells no second time: nothing there is code."""
    times.save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()


def read_times(module: nn.Module, folder: FilePath) -> nn.Module:
    """`module` itself, which reads the inputs that `folder` holds; weightless on meta. UserError for a damaged folder."""
    try:
        said = json.loads((folder / "config.json").read_text())
        attach(module, said["names"], said["time_embedding"])
        if torch.get_default_device().type == "meta":
            return module
        extra: Any = module.get_submodule(NAME)
        extra.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the second time from '{folder}': {str(error).strip().splitlines()[0]}") from error
    return module
