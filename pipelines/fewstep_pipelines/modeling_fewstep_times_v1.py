"""A second time, and other scalars, for a stock diffusers network: a component of its own, added by hooks in a call.

This file travels inside the checkpoint folder, beside the weights in `times/`, and needs torch and diffusers only. An
incompatible change gets a new file name (v2), so that old folders keep the code they were written with.

    with pipe.times.feeding(pipe.unet, t, s=s):      # flow times [rows], or [1] for all rows
        pipe.unet(x, timestep, class_labels=labels)  # the mean velocity from t down to s

At s = t nothing is added: the network on its own is the plain flow model.
"""

import fnmatch
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

FEATURES, SLOWEST, FASTEST = 256, 0.5, 32.0  # sinusoids of a scalar, and their frequencies in radians
SCALE = {"guidance": 0.1}  # brings the usual values of an input to about 0..1


class FewStepTimes(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The sum over inputs of W2 silu(W1 phi + b1) + b2: [rows, width], added to the network's time embedding.

    phi(v) = [sin(f v), cos(f v)] of the input's value v; for the second time `s` it is phi(t - s) - phi(0), and there are
    no biases.

    Args:
        names: the inputs, among them "s"; "guidance" is the usual scale, 1 = off.
        width: of the network's time embedding.
        time_embedding: name, or pattern of names, of the submodules of the network whose output is added to.
    """

    @register_to_config
    def __init__(self, names: tuple = ("s",), width: int = 128, time_embedding: str = "time_embedding"):
        super().__init__()
        self.embeddings = nn.ModuleDict({name: _embedding(width, name != "s") for name in names})

    def forward(self, t: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """What is added [rows, width] at flow time t [rows], told `inputs` [rows] by name."""
        parts = [part(self._features(name, t, inputs[name])) for name, part in self.embeddings.items()]
        return torch.stack(parts).sum(0)

    @contextmanager
    def feeding(self, network: nn.Module, t: torch.Tensor, **inputs: torch.Tensor) -> Iterator[None]:
        """Within the block `network` is called at flow time t and told `inputs`, all [rows], or [1] for any rows.

        Inputs that this network does not read are left aside. A network of torch.compile must be called within such a
        block first: compiled without, it does not see the hooks. ValueError when an input is missing, or when the
        network has no such time embedding.
        """
        missing = [name for name in self.embeddings if inputs.get(name) is None]
        if missing:
            raise ValueError(f"this network reads '{missing[0]}': say it, as it does {sorted(self.embeddings)}")
        network = getattr(network, "_orig_mod", network)  # of torch.compile, which renames all submodules
        pattern = self.config["time_embedding"]
        places = [part for name, part in network.named_modules() if fnmatch.fnmatch(name, pattern)]
        if not places:
            raise ValueError(f"{type(network).__name__} has no '{pattern}' for the second time to be added to")
        added = self(t, **{name: inputs[name] for name in self.embeddings})

        def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + added.to(output.device, output.dtype)

        hooks = [place.register_forward_hook(add) for place in places]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes config.json and, beside it, this file, so that a saved folder stays loadable."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _features(self, name: str, t: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if name == "s":
            phi = _waves(t - value, self.dtype) - _waves(torch.zeros_like(t), self.dtype)
        else:
            phi = _waves(SCALE.get(name, 1.0) * value, self.dtype)
        return phi.to(self.dtype)


def _waves(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In float32 or wider. The frequencies are computed on the CPU, whose powers are those of training."""
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch.linspace(0, 1, FEATURES // 2, device="cpu", dtype=torch.float32)
    frequencies = (SLOWEST * (FASTEST / SLOWEST) ** steps).to(value.device, wide)
    angle = value.to(wide)[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], 1)


def _embedding(width: int, biased: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, width, bias=biased), nn.SiLU(), nn.Linear(width, width, bias=biased))
