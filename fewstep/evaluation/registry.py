"""The table of metrics. A new one is a line here, or an entry point in the group `fewstep.metrics`.

A metric is a function from an `EvaluationSet` to named numbers.
"""

from __future__ import annotations

from ..registry import Registry

METRICS = Registry(
    "metric",
    "fewstep.metrics",
    {
        "fid": "fewstep.evaluation.metrics:fid",
        "kid": "fewstep.evaluation.metrics:kid",
        "inception_score": "fewstep.evaluation.metrics:inception_score",
        "prdc": "fewstep.evaluation.metrics:precision_recall",
        "prc": "fewstep.evaluation.metrics:torch_fidelity_prc",
        "accuracy": "fewstep.evaluation.metrics:accuracy",
        "diversity": "fewstep.evaluation.metrics:diversity",
        "prompt_diversity": "fewstep.evaluation.metrics:prompt_diversity",
        "high_frequency": "fewstep.evaluation.metrics:high_frequency",
        "reward": "fewstep.evaluation.metrics:reward",
    },
)
