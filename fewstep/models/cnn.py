"""Plain image classifiers of three convolutions: small teachers and students of the vision methods."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import UserError
from .build import parse
from .family import Loaded

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class CNNConfig(BaseModel):
    """Sizes of a `ConvNet`. `width` w gives w, 2w, 2w channels; `batch_norm` off leaves convolution, bias, ReLU."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    width: int = Field(gt=0)
    channels: int = Field(default=1, gt=0, description="of the image")
    classes: int = Field(gt=0)
    batch_norm: bool = True


class ConvNet(nn.Module):
    """conv3x3(w) - conv3x3(2w, stride 2) - conv3x3(2w), each with BatchNorm and ReLU; global average pool; linear.

    Takes images [rows, channels, height, width] of any size and gives logits [rows, classes].
    """

    def __init__(self, config: CNNConfig):
        super().__init__()
        self.config = config
        w = config.width
        self.layers = nn.Sequential(
            _block(config.channels, w, 1, config.batch_norm),
            _block(w, 2 * w, 2, config.batch_norm),
            _block(2 * w, 2 * w, 1, config.batch_norm),
        )
        self.head = nn.Linear(2 * w, config.classes)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [rows, 2w]."""
        return self.layers(x).mean((-2, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [rows, classes]."""
        return self.head(self.features(x))


def _block(channels: int, out: int, stride: int, batch_norm: bool) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=not batch_norm)
    return nn.Sequential(convolution, nn.BatchNorm2d(out) if batch_norm else nn.Identity(), nn.ReLU())


class CNNFamily:
    """`ConvNet`s on disk: model.safetensors beside a config.json with the sizes."""

    name = "cnn"

    def build(self, **config: Any) -> Loaded:
        """A ConvNet with random weights; unknown keys and missing sizes raise UserError."""
        return Loaded(ConvNet(parse(CNNConfig, config, "cnn build")), self.name)

    def load(self, folder: Path) -> Loaded:
        """The ConvNet in `folder`. UserError when a file is missing or the weights do not fit the sizes."""
        from safetensors.torch import load_file

        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise UserError(f"'{folder}' has no {missing[0]}: a cnn folder holds {CONFIG} and {WEIGHTS}")
        module = ConvNet(parse(CNNConfig, json.loads((folder / CONFIG).read_text()), str(folder / CONFIG)))
        try:
            module.load_state_dict(load_file(folder / WEIGHTS))
        except RuntimeError as error:
            raise UserError(
                f"'{folder / WEIGHTS}' does not fit {CONFIG}: {str(error).splitlines()[-1].strip()}"
            ) from None
        return Loaded(module, self.name)

    def save(self, module: nn.Module, folder: Path) -> None:
        """Writes config.json and model.safetensors into `folder`."""
        from safetensors.torch import save_file

        assert isinstance(module, ConvNet)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(module.config.model_dump(), indent=2) + "\n")
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / WEIGHTS)

    def lora_targets(self, width: str) -> Sequence[str]:
        """default: the convolutions; wide and all: the head as well."""
        return ["layers.*.0"] if width == "default" else ["*"]


CNN = CNNFamily()
