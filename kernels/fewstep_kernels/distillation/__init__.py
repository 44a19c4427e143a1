"""Distillation loss of language models, fused with the heads that make the logits: [n, V] never lies in memory."""

from __future__ import annotations

from .backends import BACKENDS
from .functional import distillation_loss
from .inputs import Divergence, Head, TopK

__all__ = ["BACKENDS", "Divergence", "Head", "TopK", "distillation_loss"]
