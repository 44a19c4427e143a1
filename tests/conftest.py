"""Shared by all tests: one thread a process (two spinning OpenMP pools on two cores run thirty times slower)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

TINY_UNET = {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4, "attention": "none"}


@pytest.fixture
def tiny_unet() -> dict:
    """Sizes of the smallest UNet2DModel that has two resolutions."""
    return dict(TINY_UNET)
