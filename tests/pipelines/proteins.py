"""The smallest protein pipeline: random weights, none of them 0, so that all it is told changes its chains."""

from __future__ import annotations

from typing import Any

import torch
from fewstep_pipelines import (
    FewStepProteinPipeline,
    FlowMatchProteinScheduler,
    FlowMatchProteinSDEScheduler,
    ProteinFlowTransformer,
)

SIZES = {
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "pair_width": 8,
    "registers": 1,
    "index_width": 8,
    "time_width": 8,
    "cond_width": 16,
}


def protein_network(seed: int = 0, **config: Any) -> ProteinFlowTransformer:
    """A network of the few-layer sizes; config: what differs."""
    torch.manual_seed(seed)
    network = ProteinFlowTransformer(**{**SIZES, "window": 2, **config}).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


def protein_pipeline(seed: int = 0, sde: bool = False, steps: int = 4, **config: Any) -> FewStepProteinPipeline:
    """That network with the few-step scheduler, or the teacher's."""
    scheduler = FlowMatchProteinSDEScheduler() if sde else FlowMatchProteinScheduler()
    pipeline = FewStepProteinPipeline(protein_network(seed, **config), scheduler, default_steps=steps)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
