"""Attention with forward-mode derivatives: one entry, back ends by name, and a processor for diffusers' networks."""

from __future__ import annotations

from .functional import attention
from .processor import attending, use_attention

__all__ = ["attending", "attention", "use_attention"]
