"""Inception through torch-fidelity, with random weights: the real ones are too large to travel with the tests."""

import hashlib
import pickle

import pytest
import torch

from fewstep.errors import UserError
from fewstep.evaluation.inception import InceptionFeatures

extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


def _named_by_hash(file, folder):
    """The file under a name that ends in the beginning of its sha256, as the published one is."""
    return file.rename(folder / f"weights-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth")


@pytest.fixture
def network(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        state = extractor.FeatureExtractorInceptionV3("random", ["2048"]).state_dict()
    torch.save(state, tmp_path / "w.pth")
    return InceptionFeatures(_named_by_hash(tmp_path / "w.pth", tmp_path))


def test_grey_images_are_seen_as_colour_and_features_are_pooled(network):
    grey = torch.randint(0, 256, (2, 1, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = network.features(grey)
    assert (found.shape, found.dtype) == ((2, 2048), torch.float32)
    assert torch.equal(found, network.features(grey.repeat(1, 3, 1, 1)))
    assert network.logits(grey) is None


def test_a_file_that_would_run_code_is_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"fc.weight": Trap()}, protocol=2))
    with pytest.raises(UserError, match="holds more than tensors"):
        InceptionFeatures(_named_by_hash(tmp_path / "w.pth", tmp_path)).features(torch.zeros(1, 3, 8, 8).byte())
    assert not (tmp_path / "ran").exists()
