"""Inception-v3 features from weights the user has put in place, with the resize chain that is asked for.

The layers are torch-fidelity's `inception-v3-compat`. For speed, batch normalisation is folded into the convolutions and
pixels lie channels last; features move by rounding alone (about 1e-6 of the largest).
"""

from __future__ import annotations

import hashlib
import pickle
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from .features import weights_folder
from .resize import resized

FILE = "weights-inception-2015-12-05-6726825d.pth"
NAMES = {"inception": "torch-fidelity", "inception-clean": "clean", "inception-legacy": "legacy"}


def inception() -> InceptionFeatures:
    """The 2048 pool features, resized as torch-fidelity does."""
    return InceptionFeatures(weights_folder() / FILE, "inception")


def inception_clean() -> InceptionFeatures:
    """The 2048 pool features, resized as clean-fid's mode `clean` does."""
    return InceptionFeatures(weights_folder() / FILE, "inception-clean")


def inception_legacy() -> InceptionFeatures:
    """The 2048 pool features, resized as pytorch-fid does."""
    return InceptionFeatures(weights_folder() / FILE, "inception-legacy")


class InceptionFeatures:
    """2048 features of images of any size, one channel repeated to three.

    name: `inception`, `inception-clean` or `inception-legacy`; scores under two names are not comparable. resize: the
    chain of that name, see `resize`. The weights are the same.
    """

    impl = "torch-fidelity"
    rows = 64

    def __init__(self, file: Path, name: str = "inception"):
        if not file.is_file():
            raise UserError(
                f"inception: no weights '{file}' (about 91 MB): take {FILE} from torch-fidelity's release v0.2.0 "
                "and put it there, or name another folder in FEWSTEP_WEIGHTS"
            )
        self.file, self.name, self.resize = file, name, NAMES[name]
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        if not self.sha256.startswith(file.stem.rsplit("-", 1)[-1]):
            raise UserError(f"inception: '{file}' is damaged: its sha256 begins with {self.sha256[:8]}; fetch it anew")
        _require_torch_fidelity()
        self.version = version("torch-fidelity")

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[n, 2048] on the CPU, of uint8 images [n, 1 or 3, H, W]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"{self.name} takes uint8 images [n, 1 or 3, H, W], not {images.dtype} {list(images.shape)}"
            )
        with torch.backends.cudnn.flags(allow_tf32=False):
            return torch.cat([self._features(part) for part in images.expand(-1, 3, -1, -1).split(self.rows)])

    def _features(self, images: Tensor) -> Tensor:
        device = next(self._layers.parameters()).device
        pixels = resized(images.to(device), self.resize)
        return self._layers(pixels.contiguous(memory_format=torch.channels_last)).cpu()

    def logits(self, images: Tensor) -> Tensor | None:
        """None: ImageNet's classes are not those of the data."""

    @torch.no_grad()
    def class_scores(self, features: Tensor) -> Tensor:
        """Logits [n, 1008] over ImageNet's classes, without the bias, as the Inception Score takes them."""
        return features @ self._head.cpu().T

    @property
    def _layers(self) -> nn.Sequential:
        return self._network[0]

    @property
    def _head(self) -> Tensor:
        return self._network[1]

    @cached_property
    def _network(self) -> tuple[nn.Sequential, Tensor]:
        """The layers up to the pool, and the weights of the last one."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # the extractor unpickles freely, so the file is first shown to hold nothing but tensors
        try:
            torch.load(self.file, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(
                f"inception: '{self.file}' holds more than tensors and is not loaded; fetch it anew"
            ) from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        extractor = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=str(self.file))
        *layers, head = extractor.to(device).children()  # listed in the order they are applied in
        body = nn.Sequential(*layers, nn.Flatten())
        fold(body)
        return body.to(memory_format=torch.channels_last), head.weight


def fold(network: nn.Module) -> None:
    """Makes each pair `conv`, `bn` of a block of `network`, which is in eval mode, one convolution."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for block in network.modules():
        conv, bn = getattr(block, "conv", None), getattr(block, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
            block.add_module("conv", fuse_conv_bn_eval(conv, bn))
            block.add_module("bn", nn.Identity())


def _require_torch_fidelity() -> None:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        raise UserError('inception needs torch-fidelity: pip install "fewstep[eval]"') from None
