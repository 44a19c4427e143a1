"""Scores while training: which metrics fit what a method makes, and that they are those of its samples."""

from __future__ import annotations

import json

import pytest

from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.evaluation.protein.preview import unpadded
from fewstep.evaluation.protein.scores import score_chains
from fewstep.recipe import load_recipe

from . import toy

SIZES = {"width": 16, "num_layers": 1, "num_heads": 2, "pair_width": 8, "index_width": 8, "time_width": 8}
CHAINS = {
    "method": "protein_flow_matching",
    "student": {"from": "protein_flow", "build": SIZES},
    "config": {"steps": 4, "renewal": 0.5, "weights": {"distogram": 0.0}},
    "data": {"train": {"source": "chains", "shortest": 40, "longest": 48}},
    "train": {"steps": 2, "batch": 4},
    "validate": {"every": 2, "n": 3, "metrics": ["protein"], "best": "-clashes"},
}


def test_chains_are_scored_as_a_whole_and_the_best_checkpoint_is_known(tmp_path):
    """The numbers of `score_chains`, of the average's samples, and `best` names one of them."""
    trainer = Trainer(load_recipe(CHAINS), tmp_path / "run", show=False)
    trainer.run()
    (line,) = (
        json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if "validation" in x
    )
    mask = trainer.method.preview_cond(3)["mask"]
    wanted = score_chains(unpadded(trainer.method.samples(3, trainer.recipe.train.seed), mask))
    for name in ("valid", "bond", "clashes", "compactness"):
        assert line[f"validation.{name}"] == pytest.approx(wanted[name])
    assert trainer.best.step == 2 and trainer.best.value == pytest.approx(wanted["clashes"])


@pytest.mark.parametrize(
    ("said", "mend"),
    (
        ({**CHAINS, "validate": {"every": 1, "n": 2, "metrics": ["fid"]}}, "'fid' does not score .* write protein"),
        (
            {**toy.recipe(), "validate": {"every": 1, "n": 2, "metrics": ["protein"]}},
            "'protein' does not .* leave it out",
        ),
        ({**CHAINS, "validate": {"every": 1, "n": 2, "metrics": ["protien"]}}, "unknown 'protien'.*'protein'"),
    ),
)
def test_metrics_that_do_not_fit_are_refused(tmp_path, said, mend):
    """With what to write."""
    with pytest.raises(UserError, match=mend):
        Trainer(load_recipe(said), tmp_path / "run", show=False).run()
