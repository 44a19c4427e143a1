"""Pipelines that a distilled checkpoint carries where no stock diffusers class fits; torch and diffusers only."""

from importlib import import_module
from typing import Any

from .modeling_fewstep_times_v1 import FewStepTimes
from .modeling_protein_flow_v1 import ProteinFlowTransformer
from .modeling_proteina_v1 import ProteinaTransformer
from .pipeline_fewstep_class_v1 import FewStepClassPipeline
from .pipeline_fewstep_protein_v1 import FewStepProteinPipeline, FewStepProteinPipelineOutput, write_chains
from .scheduling_flow_match_protein_v1 import FlowMatchProteinScheduler, FlowMatchProteinSDEScheduler

TEXT = {  # these need transformers as well, so they are imported on first use
    "FewStepQwenImagePipeline": "pipeline_fewstep_qwenimage_v1",
    "FewStepSD3Pipeline": "pipeline_fewstep_sd3_v1",
    "FewStepSanaPipeline": "pipeline_fewstep_sana_v1",
}
__all__ = [
    "FewStepClassPipeline",
    "FewStepProteinPipeline",
    "FewStepProteinPipelineOutput",
    "FewStepQwenImagePipeline",
    "FewStepSD3Pipeline",
    "FewStepSanaPipeline",
    "FewStepTimes",
    "FlowMatchProteinSDEScheduler",
    "FlowMatchProteinScheduler",
    "ProteinFlowTransformer",
    "ProteinaTransformer",
    "write_chains",
]


def __getattr__(name: str) -> Any:
    """A class of `TEXT`."""
    if name not in TEXT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{TEXT[name]}"), name)
