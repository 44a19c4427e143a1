"""What a network's config says about classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from fewstep.exporting.network import class_count, network_of

from .students import student


def test_classes_leave_the_null_class_out():
    assert class_count(student("unet2d", classes=3).module) == 3
    assert class_count(student("dit", classes=5).module) == 5
    assert class_count(student("unet2d", classes=None).module) is None
    assert class_count(nn.Linear(1, 1)) is None


def test_the_denoiser_of_a_pipeline_is_found_whatever_its_name():
    network = nn.Linear(1, 1)
    assert network_of(SimpleNamespace(unet=network)) is network
    assert network_of(SimpleNamespace(unet=None, transformer=network)) is network
    with pytest.raises(ValueError, match="neither"):
        network_of(SimpleNamespace())
