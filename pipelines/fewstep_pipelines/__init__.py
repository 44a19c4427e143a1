"""Pipelines that a distilled checkpoint carries where no stock diffusers class fits; torch and diffusers only."""

from .pipeline_fewstep_class_v1 import FewStepClassPipeline

__all__ = ["FewStepClassPipeline"]
