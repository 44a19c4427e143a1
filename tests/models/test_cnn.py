"""The cnn family: sizes, disk, errors, adapters."""

from __future__ import annotations

import json

import pytest
import torch

from fewstep.errors import UserError
from fewstep.models.cnn import CNN
from fewstep.models.folder import CARD, open_model
from fewstep.nets.lora import Adapter, use


def test_a_network_has_the_layers_its_sizes_ask_for():
    """conv3x3(w), conv3x3(2w, stride 2), conv3x3(2w), BatchNorm each, linear: parameters counted by hand for w = 6."""
    loaded = CNN.build(width=6, channels=1, classes=10)
    convolutions = 1 * 6 * 9 + 6 * 12 * 9 + 12 * 12 * 9
    norms, head = 2 * (6 + 12 + 12), 12 * 10 + 10
    assert sum(p.numel() for p in loaded.module.parameters()) == convolutions + norms + head
    assert (loaded.family, loaded.path) == ("cnn", None)
    plain = CNN.build(width=6, channels=1, classes=10, batch_norm=False).module
    assert sum(p.numel() for p in plain.parameters()) == convolutions + 30 + head


@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (20, 14))])
def test_images_of_any_size_become_logits(channels, size):
    module = CNN.build(width=4, channels=channels, classes=7).module
    assert module(torch.zeros(2, channels, *size)).shape == (2, 7)
    assert module.features(torch.zeros(2, channels, *size)).shape == (2, 8)


def test_without_batch_norm_rows_do_not_see_each_other():
    module = CNN.build(width=4, classes=3, batch_norm=False).module.train()
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(module(x)[:2], module(x[:2]))


def test_a_saved_network_comes_back_with_its_running_statistics(tmp_path):
    module = CNN.build(width=4, channels=3, classes=5).module
    module(torch.randn(16, 3, 8, 8))  # moves the running statistics off their initial values
    CNN.save(module, tmp_path)
    (tmp_path / CARD).write_text(json.dumps({"family": "cnn"}))
    loaded, x = open_model(tmp_path), torch.randn(2, 3, 8, 8)
    assert loaded.family == "cnn"
    assert torch.equal(loaded.module.eval()(x), module.eval()(x))


def test_mistakes_in_sizes_are_named():
    with pytest.raises(UserError, match="unknown key 'widht': did you mean 'width'"):
        CNN.build(widht=6, classes=10)
    with pytest.raises(UserError, match="'classes' is missing"):
        CNN.build(width=6)


def test_a_folder_that_is_not_whole_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        CNN.load(tmp_path)
    CNN.save(CNN.build(width=4, classes=5).module, tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "classes": 6}))
    with pytest.raises(UserError, match=r"does not fit config\.json: size mismatch for head"):
        CNN.load(tmp_path)


@pytest.mark.parametrize(("width", "layers"), [("default", 3), ("all", 4)])
def test_adapters_start_as_the_base_and_sit_where_asked(width, layers):
    module, x = CNN.build(width=4, classes=5).module.eval(), torch.randn(2, 1, 8, 8)
    before = module(x)
    adapter = Adapter(module, rank=2, alpha=2.0, targets=CNN.lora_targets(width))
    assert len(adapter.down) == layers
    with use(adapter):
        assert torch.equal(module(x), before)
