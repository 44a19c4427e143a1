"""Pipelines that a distilled checkpoint may carry where no stock diffusers class fits. They need torch and diffusers only."""

from .pipeline_fewstep_class_v1 import FewStepClassPipeline

__all__ = ["FewStepClassPipeline"]
