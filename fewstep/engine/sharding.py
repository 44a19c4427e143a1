"""Networks cut over processes (FSDP2): each holds a part of every parameter, its gradient, moments and average.

    train: {shard: true}

`fully_shard` gathers a block's parameters when it runs and adds its gradients up when it is done. Adapters are small and
stay whole on every process. Everything that is written is whole again, so checkpoints know nothing of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..roles import Handle
from . import distributed

ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "accelerate's FSDP"}  # set by launch files


def refuse_engines() -> None:
    """UserError for launch files of engines that own the loop of one network, where here several step in turn."""
    for name, engine in ENGINES.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"{engine} takes a loop over one network: launch with configs/accelerate/gpu_8.yaml, and write "
                "train.shard=true where networks have to be cut over processes"
            )


def shard(handles: Mapping[str, Handle], device: torch.device) -> None:
    """Cuts every role's network over all processes, block by block. UserError with a single process."""
    from torch.distributed.device_mesh import init_device_mesh

    if distributed.world() == 1:
        raise UserError("train.shard cuts networks over processes, but there is one: start with `accelerate launch`")
    eight = [name for name, handle in handles.items() if handle.spec.optimizer.name == "adamw8bit"]
    if eight:
        raise UserError(f"train.shard does not go with {eight[0]}.optimizer.name=adamw8bit: write adamw")
    mesh = init_device_mesh(device.type, (distributed.world(),))
    for module in {id(handle.module): handle.module for handle in handles.values()}.values():
        for block in _blocks(module):
            _cut(block, mesh)
        _cut(module, mesh)
    for handle in handles.values():
        handle.renew()


def _blocks(module: nn.Module) -> Iterable[nn.Module]:
    """The members of its lists of layers, outermost lists alone, but the first: DiT calls a part of it from outside."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child[1:] if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def _cut(module: nn.Module, mesh: object) -> None:
    from torch.distributed.fsdp import fully_shard

    # sums, as the trainer's losses are divided by all rows already; what is gathered is dropped after each call, so
    # that no call sees weights from before a step or an average from before a block of `averaged`
    cut = fully_shard(module, mesh=mesh, reshard_after_forward=True)  # type: ignore[call-overload]
    cut.set_gradient_divide_factor(1.0)
    cut.set_force_sum_reduction_for_comms(True)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts gathered from all processes, which all have to ask; anything else as it is."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
