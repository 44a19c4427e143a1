"""What a scheduler feeds the network and steps from, read from the object itself, and what a student was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..maths.paths import FlowPath, Path

CARRIED = "fewstep_pipelines"  # whose files folders carry
OWN = f"{CARRIED}:FewStepClassPipeline"
TEXT = ("FewStepSD3Pipeline", "FewStepSanaPipeline", "FewStepQwenImagePipeline")  # for families with text
# Z-Image's since diffusers 0.39
STOCK_SIGMAS = ("QwenImagePipeline", "FluxPipeline", "Lumina2Pipeline", "ZImagePipeline")
HAND_SIGMAS = (OWN.split(":")[1], *TEXT, *STOCK_SIGMAS)
SECOND_TIME = ("target", "last", "rescale")  # words of a schedule that the pipelines which folders carry know
Pairs = list[tuple[float, float]]


def passes_sigmas(pipeline: str, scheduler: Any) -> bool:
    """Whether the pipeline (its class name) hands the scheduler sigmas 1, 1-1/N, ... (times its start), not N alone."""
    return pipeline in HAND_SIGMAS and type(scheduler).__name__.startswith("FlowMatch")


def start_of(path: Path) -> float:
    """Clock value at which the pipeline that folders carry begins: 1, or where a path without signal does."""
    return path.clock(path.t_max) if isinstance(path, FlowPath) and path.zero_signal else 1.0


def grid(scheduler: Any, pipeline: str, steps: int, start: float = 1.0) -> Pairs:
    """[(label fed, flow time stepped from)] of a `steps`-step run, read from the scheduler after `set_timesteps`.

    ValueError when the scheduler refuses so many, or steps to other levels than it goes on from.
    """
    if type(scheduler).__name__ == "SCMScheduler":
        return _by_angle(scheduler, steps)
    if passes_sigmas(pipeline, scheduler):
        scheduler.set_timesteps(sigmas=[start * (1 - i / steps) for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    labels = scheduler.timesteps
    if is_flow(scheduler):
        return list(zip(labels.tolist(), scheduler.sigmas[: len(labels)].tolist()))
    if type(scheduler).__name__ == "DDIMScheduler" and len(scheduler.alphas_cumprod) % steps:
        raise ValueError(f"{steps} steps do not divide the table of {len(scheduler.alphas_cumprod)}")
    abar = scheduler.alphas_cumprod.double()[labels.long()]
    return list(zip(labels.tolist(), torch.sigmoid((torch.log1p(-abar) - torch.log(abar)) / 2).tolist()))


def _by_angle(scheduler: Any, steps: int) -> Pairs:
    """Of SCMScheduler, whose timesteps are angles a: the network is fed t = sin a / (sin a + cos a) itself."""
    # It refuses its own default, a second angle of two steps, for any other number; see `fresh.images_of`.
    scheduler.set_timesteps(steps, **({} if steps == 2 else {"intermediate_timesteps": None}))
    angles = scheduler.timesteps[:-1].double()
    times = (angles.sin() / (angles.sin() + angles.cos())).clamp(max=1).tolist()  # the first angle is rounded up
    return list(zip(times, times))


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler object (or its config's class) steps in flow times."""
    return type(scheduler).__name__.startswith("Flow") or bool(scheduler.config.get("use_flow_sigmas"))


def trained_pairs(path: Path, u: Sequence[float]) -> Pairs:
    """[(label fed, flow time)] at clock values u, as rollouts feed them."""
    return [(path.timestep(path.time(level)), path.time(level)) for level in u]


def same_pairs(ours: Pairs, theirs: Pairs) -> bool:
    """Equal up to float32: labels to 1e-3 of 1000, flow times to 1e-5."""
    close = (abs(a[0] - b[0]) < 1e-3 and abs(a[1] - b[1]) < 1e-5 for a, b in zip(ours, theirs))
    return len(ours) == len(theirs) and all(close)
