"""Given noise reaches a pipeline in the order in which it draws."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.consistency_models import pipeline_consistency_models
from diffusers.schedulers import scheduling_lcm

from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import load_pipeline

from .students import EPS, student


def test_the_start_is_asked_for_first_and_then_every_renoising(tmp_path):
    pipeline = load_pipeline(student("unet2d", EPS, "renoise", 4).export(tmp_path / "m"), device="cpu")
    asked = []

    def noise(i, shape):
        asked.append((i, shape))
        return torch.zeros(shape)

    before = (pipeline_consistency_models.randn_tensor, scheduling_lcm.randn_tensor)
    with given_noise(pipeline, noise):
        images_of(pipeline, 2, [0, 1], 4, None)
    assert asked == [(i, (2, 1, 8, 8)) for i in range(4)]
    assert (pipeline_consistency_models.randn_tensor, scheduling_lcm.randn_tensor) == before


def test_an_error_inside_gives_the_generators_back(tmp_path):
    pipeline = load_pipeline(student("unet2d").export(tmp_path / "m"), device="cpu")
    before = pipeline_consistency_models.randn_tensor
    with pytest.raises(RuntimeError, match="stop"), given_noise(pipeline, lambda i, shape: torch.zeros(shape)):
        raise RuntimeError("stop")
    assert pipeline_consistency_models.randn_tensor is before
