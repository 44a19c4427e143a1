"""Inception with random weights whose activations keep a scale: the real weights are too large to travel with tests."""

import hashlib
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn


def random_extractor(seed: int = 0) -> nn.Module:
    """torch-fidelity's extractor, its normalisation fitted to noise; the last block is scaled down to real features' size."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    kind = module.FeatureExtractorInceptionV3
    with (
        patch.object(kind, "load_state_dict", lambda *_: None),
        patch.object(module, "load_state_dict_from_url", lambda *_, **__: {}),
    ):
        network = kind("random", ["2048"])
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.train()
    network(torch.randint(0, 256, (2, 3, 32, 32), generator=generator).to(torch.uint8))
    for name, layer in network.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.mul_(0.1 if name.startswith("Mixed_7c") else 1)
    return network.eval()


def write_weights(network: nn.Module, folder: Path) -> Path:
    """A weights file under a name that ends in the beginning of its sha256, as the published one does."""
    file = folder / "weights.pth"
    torch.save(network.state_dict(), file)
    return named_by_hash(file)


def named_by_hash(file: Path) -> Path:
    """The file under a name that ends in the beginning of its sha256, as that of the published weights does."""
    return file.rename(file.with_name(f"weights-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"))
