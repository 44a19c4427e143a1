"""The number that a pipeline calls guidance_scale, where it is not the usual scale."""

from __future__ import annotations

from ..models.registry import FAMILIES


def guidance_number(pipeline: str, scale: float) -> float:
    """What a pipeline (its class name) is told for a usual guidance scale (1 = off): less `facts.guidance_offset`.

    The pipelines that folders carry are told the usual scale.
    """
    known = (getattr(FAMILIES.get(name), "facts", None) for name in FAMILIES.names())
    return scale - next((facts.guidance_offset for facts in known if facts and facts.pipeline == pipeline), 0.0)
