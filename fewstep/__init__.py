"""fewstep: distil diffusion, flow and language models into few-step students.

    import fewstep
    run = fewstep.train("configs/decoupled_dmd/digits.yaml", out="runs/digits")
    images = fewstep.sample(run.model, n=16, seed=0)

Importing this package is cheap: torch and diffusers load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_API = {
    "train": "fewstep.engine.trainer",
    "sample": "fewstep.exporting.pipeline",
    "evaluate": "fewstep.evaluation.evaluate",
    "run_protocol": "fewstep.evaluation.protocol_run",
    "compare_runs": "fewstep.evaluation.compare",
    "export": "fewstep.engine.exporting",
    "plan": "fewstep.engine.plan",
    "doctor": "fewstep.exporting.doctor",
    "report": "fewstep.engine.report",
    "demo": "fewstep.engine.demo",
    "load_recipe": "fewstep.recipe",
    "list_methods": "fewstep.methods.listing",
}
__all__ = [*_API, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'fewstep' has no attribute '{name}'")
    return getattr(import_module(_API[name]), name)


def __dir__() -> list[str]:
    return __all__
