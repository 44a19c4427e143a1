"""Inception-v3 features as torch-fidelity computes them, from weights the user has put in place."""

from __future__ import annotations

import hashlib
import pickle
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .features import weights_folder

FILE = "weights-inception-2015-12-05-6726825d.pth"


def inception() -> InceptionFeatures:
    """The 2048 pool features of torch-fidelity's `inception-v3-compat`."""
    return InceptionFeatures(weights_folder() / FILE)


class InceptionFeatures:
    """2048 features; images of any size are resized inside (bilinear as TensorFlow 1 does it, no antialiasing).

    One-channel images are repeated to three. Scores are not comparable with clean-fid's, which resizes differently.
    """

    name = "inception"
    impl = "torch-fidelity"
    resize = "TF1 bilinear to 299, no antialias"
    rows = 64

    def __init__(self, file: Path):
        if not file.is_file():
            raise UserError(
                f"inception: no weights '{file}' (about 91 MB): take {FILE} from torch-fidelity's release v0.2.0 "
                "and put it there, or name another folder in FEWSTEP_WEIGHTS"
            )
        self.file = file
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        if not self.sha256.startswith(file.stem.rsplit("-", 1)[-1]):
            raise UserError(f"inception: '{file}' is damaged: its sha256 begins with {self.sha256[:8]}; fetch it anew")
        _require_torch_fidelity()
        self.version = version("torch-fidelity")

    @cached_property
    def _network(self) -> Any:
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
        return extractor.to(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[n, 2048] on the CPU."""
        device = next(self._network.parameters()).device
        images = images.expand(-1, 3, -1, -1)
        with torch.backends.cudnn.flags(allow_tf32=False):
            return torch.cat([self._network(part.to(device))[0].float().cpu() for part in images.split(self.rows)])

    def logits(self, images: Tensor) -> Tensor | None:
        """None: ImageNet's classes are not those of the data."""


def _require_torch_fidelity() -> None:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        raise UserError('inception needs torch-fidelity: pip install "fewstep[eval]"') from None
