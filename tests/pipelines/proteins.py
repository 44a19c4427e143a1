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
TABLE = {  # arXiv 2510.03095, noise levels t of distilled Proteina
    2: ".7079 .0100",
    4: ".7079 .1718 .0412 .0100",
    8: ".7079 .3846 .2089 .1135 .0624 .0339 .0184 .0100",
    10: ".7079 .4416 .2754 .1718 .1072 .0661 .0412 .0257 .0160 .0100",
    16: ".7079 .5309 .4027 .3020 .2265 .1718 .1288 .0966 .0733 .0550 .0412 .0313 .0234 .0176 .0133 .0100",
    20: ".7079 .5689 .4519 .3631 .2884 .2317 .1841 .1479 .1175 .0944 .0750 .0603 .0479 .0385 .0305 .0245 .0195 .0157 "
    ".0124 .0100",
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
