"""Feature networks: what they promise, and what is refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewstep.data.images import to_uint8
from fewstep.data.registry import make_source
from fewstep.errors import UserError
from fewstep.evaluation import features as module
from fewstep.evaluation import inception
from fewstep.evaluation.features import ClassifierFeatures, feature_network, reference_features
from fewstep.nets.small_cnn import SmallCNN, weights_digest
from fewstep.resources import asset


def _images(source, n=None, **more):
    made = make_source({"source": source, **more})
    rows = made.fetch(torch.arange(n or len(made)), None)
    return to_uint8(rows["x0"]), rows["cond"]["label"]


@pytest.fixture(scope="module")
def digits():
    return feature_network("digits-cnn")


def test_real_training_images_have_unit_features(digits):
    x = digits.features(_images("digits", 1297)[0])  # the rows it was trained on
    assert x.shape == (1297, 64)
    assert x.dtype == torch.float32
    assert x.square().sum(1).mean().item() == pytest.approx(1, abs=1e-2)
    assert x.mean(0).abs().max() < 1e-4


def test_the_accuracy_in_the_header_is_that_of_the_shipped_weights(digits):
    images, labels = _images("digits")
    right = (digits.logits(images[1297:]).argmax(1) == labels[1297:]).double().mean().item()
    assert right == pytest.approx(float(digits.metadata["accuracy"].split()[0]), abs=1e-4)


@pytest.mark.parametrize("size", [28, 16])
def test_the_garment_classifier_works_at_both_sizes(size):
    images, labels = _images("fashion_mnist", 500, split="test", size=size)
    right = feature_network("fashion-cnn").logits(images).argmax(1) == labels
    assert right.double().mean() > 0.82


def test_features_of_an_image_do_not_depend_on_the_others(digits):
    images = _images("digits", 20)[0]
    assert torch.allclose(digits.features(images)[7:9], digits.features(images[7:9]), atol=1e-6)


def test_the_order_of_pixels_in_memory_changes_no_bit(digits):
    images = _images("digits", 64)[0]
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    strided = strided.as_strided(strided.shape, (64, 1, 8, 1))  # what a picture of one channel looks like after PIL
    assert torch.equal(digits.features(strided), digits.features(images))


def test_the_hash_in_the_header_is_that_of_the_tensors():
    for name in ("digits-cnn", "fashion-cnn"):
        assert weights_digest(load_file(asset(f"features/{name}.safetensors"))) == feature_network(name).sha256


def test_altered_weights_are_refused(tmp_path):
    source, file = asset("features/digits-cnn.safetensors"), tmp_path / "x.safetensors"
    state = load_file(source)
    state["head.bias"][0] += 1e-3
    with safe_open(source, "pt") as opened:
        save_file(state, file, metadata=opened.metadata())
    with pytest.raises(UserError, match="does not have the weights its header names"):
        ClassifierFeatures("x", file).features(_images("digits", 1)[0])


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 8, 8).byte()]
)
def test_images_that_do_not_fit_are_refused(digits, images):
    with pytest.raises(UserError, match=r"digits-cnn takes uint8 images \[n, 1, H, W\]"):
        digits.features(images)


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'digits-cnn'"):
        feature_network("digit-cnn")


def test_inception_says_where_its_weights_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=r"weights-inception-2015-12-05-6726825d\.pth.*91 MB"):
        feature_network("inception")
    (tmp_path / inception.FILE).write_bytes(b"other weights")
    with pytest.raises(UserError, match="is damaged"):
        feature_network("inception")


class _Counting:
    sha256 = "of this test"
    runs = 0

    def features(self, images):
        self.runs += 1
        return images.float().flatten(1)


def test_the_reference_is_run_once_for_equal_images_and_weights(monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED", {})
    network, images = _Counting(), torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2)
    first = reference_features(network, images)
    assert reference_features(network, images.clone()) is first
    assert network.runs == 1
    for step in range(1, 9):
        reference_features(network, images + step)
    assert network.runs == 9
    assert len(module._REMEMBERED) <= 4


@pytest.mark.parametrize("side", [4, 8, 9, 28])
def test_the_small_network_takes_any_size(side):
    torch.manual_seed(0)
    network = SmallCNN(channels=3, width=8, classes=5)
    x = torch.randn(32, 3, side, side)
    network.standardise(x)
    assert network(x).shape == (32, 5)
    f = network.features(x)
    assert f.square().sum(1).mean().item() == pytest.approx(31 / 32, abs=1e-4)  # unbiased std of 32 rows
