"""How long one batch of images takes: after a warm-up, and as a median, because the first calls compile and allocate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field


class LatencySpec(BaseModel):
    """`latency: {warmup: 2, runs: 10, batch: 1}` of a protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    warmup: int = Field(default=2, ge=0, description="calls that are not counted")
    runs: int = Field(default=10, ge=2, description="calls that are")
    batch: int = Field(default=1, ge=1, description="images a call")


USUAL = LatencySpec()


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median and quartiles; a call makes `batch` images, texts and decoding included."""

    median_ms: float
    low_ms: float
    high_ms: float
    batch: int
    runs: int
    device: str

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def measure(call: Callable[[int], float], spec: LatencySpec = USUAL) -> Latency:
    """Median and quartiles of `spec.runs` milliseconds that call(batch) gives, after `spec.warmup` that are thrown away."""
    times = [call(spec.batch) for _ in range(spec.warmup + spec.runs)][spec.warmup :]
    low, _, high = quantiles(times, n=4, method="inclusive")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return Latency(median(times), low, high, spec.batch, spec.runs, device)


def latency(
    pipeline: Any,
    spec: LatencySpec = USUAL,
    steps: int | None = None,
    guidance: float | None = None,
    prompts: Sequence[str] | None = None,
) -> Latency:
    """Latency of a loaded pipeline or a model folder; steps, guidance, prompts as in `generate`."""
    from ..exporting.pipeline import generate, load_pipeline

    loaded = load_pipeline(pipeline) if isinstance(pipeline, str) or hasattr(pipeline, "is_dir") else pipeline

    def call(batch: int) -> float:
        # images come back to the CPU, so the clock has waited for the device
        made = generate(loaded, batch, steps=steps, guidance=guidance, batch=batch, prompts=prompts)
        return made.ms_per_image * batch

    return measure(call, spec)
