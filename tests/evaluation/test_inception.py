"""Inception with random weights, against the packages that its resize chains are named for."""

import pickle
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fewstep.errors import UserError
from fewstep.evaluation.fid import Moments, frechet_distance
from fewstep.evaluation.inception import NAMES, InceptionFeatures
from fewstep.evaluation.stream import folder_moments, image_batches

from .random_inception import named_by_hash

extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def networks(inception_weights):
    return {name: InceptionFeatures(inception_weights, name) for name in NAMES}


@pytest.fixture(scope="module")
def theirs(inception_weights):
    made = extractor.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_weights))
    return made.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two kinds of blurred noise, 48 x 48."""
    made, rng = [], np.random.default_rng(0)
    for name, side in (("a", 6), ("b", 24)):
        made.append(tmp_path_factory.mktemp(name))
        for i in range(4):
            noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            noise.resize((48, 48), Image.Resampling.BILINEAR).save(made[-1] / f"{i}.png")
    return made


def _images(n=1, channels=3):
    coarse = torch.randint(0, 256, (n, channels, 5, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


@torch.no_grad()
def _layers(network):
    return nn.Sequential(*list(network.children())[:-1], nn.Flatten())


def test_grey_images_are_seen_as_colour_and_features_are_pooled(networks):
    grey, network = _images(channels=1), networks["inception"]
    found = network.features(grey)
    assert (found.shape, found.dtype) == ((1, 2048), torch.float32)
    assert torch.equal(found, network.features(grey.repeat(1, 3, 1, 1)))
    assert network.logits(grey) is None


def test_features_and_class_scores_are_torch_fidelitys(networks, theirs):
    features, logits = theirs(_images())
    found = networks["inception"].features(_images())
    assert (found - features).abs().max() < 1e-5 * features.abs().max()
    assert (networks["inception"].class_scores(found) - logits).abs().max() < 1e-5 * logits.abs().max()


def _clean_fid(mode, theirs):
    """What clean-fid calls a model: features of resized pixels in [0, 255]."""
    if mode == "clean":
        layers = _layers(theirs)
        return lambda x: layers((x - 128) / 128)
    module = pytest.importorskip("cleanfid.inception_pytorch")
    with patch.object(module, "load_state_dict_from_url", lambda *_, **__: theirs.state_dict()):
        network = module.InceptionV3(output_blocks=[3], resize_input=False).eval()
    return lambda x: network(x / 255)[0].flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("inception-clean", "clean"), ("inception-legacy", "legacy_pytorch")])
def test_a_folder_has_clean_fids_features_and_distance(name, mode, networks, theirs, folders):
    """The distance is taken of 3 features: with fewer images than features, clean-fid's root of the product is inexact."""
    clean = pytest.importorskip("cleanfid.fid")
    model, few, ours = _clean_fid(mode, theirs), slice(0, 2048, 700), networks[name]
    options = {"num_workers": 0, "device": torch.device("cpu"), "mode": mode, "verbose": False}
    expected = [clean.get_folder_features(str(folder), model, **options) for folder in folders]
    found = [torch.cat([ours.features(x) for x in image_batches(folder)]) for folder in folders]
    for x, y in zip(found, expected):
        assert np.abs(x.numpy() - y).max() < 1e-5 * np.abs(y).max()
    distance = frechet_distance(*(Moments.of(x[:, few]) for x in found))
    assert distance == pytest.approx(clean.fid_from_feats(*(y[:, few] for y in expected)), abs=1e-3)


@pytest.mark.slow
def test_a_folder_has_torch_fidelitys_distance(networks, folders, inception_weights):
    """1e-3 of about 1500: torch-fidelity's means are float32."""
    import torch_fidelity

    said = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        feature_extractor_weights_path=str(inception_weights),
        cuda=False,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )["frechet_inception_distance"]
    distance = frechet_distance(*(folder_moments(folder, networks["inception"]) for folder in folders))
    assert distance == pytest.approx(said, abs=1e-3)


def test_the_chains_give_different_features(networks):
    found = [network.features(_images()) for network in networks.values()]
    assert [network.resize for network in networks.values()] == ["torch-fidelity", "clean", "legacy"]
    for one in range(3):
        assert (found[one] - found[one - 1]).abs().max() > 1e-2


def test_images_that_do_not_fit_are_refused(networks):
    for wrong in (_images().float(), _images()[0], _images(channels=2)):
        with pytest.raises(UserError, match=r"inception-clean takes uint8 images \[n, 1 or 3, H, W\]"):
            networks["inception-clean"].features(wrong)


def test_a_file_that_would_run_code_is_not_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"fc.weight": Trap()}, protocol=2))
    with pytest.raises(UserError, match="holds more than tensors"):
        InceptionFeatures(named_by_hash(tmp_path / "w.pth")).features(torch.zeros(1, 3, 8, 8).byte())
    assert not (tmp_path / "ran").exists()
