"""Counts network evaluations where they happen: a hook on the network, whatever pipeline or scheduler drives it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn


@dataclass
class Calls:
    """calls: forward passes. rows: rows over all passes; guidance in a doubled batch counts twice, as it costs."""

    calls: int = 0
    rows: int = 0

    def per_image(self, images: int) -> float:
        """NFE: network rows spent on one image."""
        return self.rows / images


@contextmanager
def count_calls(module: nn.Module) -> Iterator[Calls]:
    """Within the block every forward pass of `module` is counted.

    with count_calls(pipeline.unet) as calls:
        pipeline(batch_size=4, num_inference_steps=2)
    calls.per_image(4)  # 2.0
    """
    calls = Calls()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.calls += 1
        calls.rows += _rows(args, kwargs)

    hook = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows of the sample: the first tensor with rows and columns, or the first list of tensors (one a row)."""
    for value in chain(args, kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value.shape[0]
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return len(value)
    return 1
