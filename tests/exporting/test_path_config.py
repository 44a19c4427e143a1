"""Paths written as data come back equal."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler

from fewstep.errors import UserError
from fewstep.exporting.path_config import kind_of, path_config, vp_config
from fewstep.maths.paths import FlowPath, TrigFlowPath, VPPath
from fewstep.models.folder import path_from

BETAS = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("path", [FlowPath(), FlowPath(3.0, integer_timesteps=True, t_max=0.9997)])
def test_flow_paths_come_back_equal_through_json(path):
    assert path_from(json.loads(json.dumps(path_config(path)))) == path


@pytest.mark.parametrize("said", BETAS, ids=lambda s: s["beta_schedule"])
def test_known_tables_are_written_by_name(said):
    path = VPPath.from_scheduler(said)
    written = path_config(path)
    assert written["beta_schedule"] == said["beta_schedule"] and "trained_betas" not in written
    assert path_from(json.loads(json.dumps(written))) == path


def test_an_unknown_table_is_written_as_betas_that_diffusers_rebuilds():
    path = VPPath.from_scheduler({"beta_schedule": "linear", "beta_start": 0.0003, "beta_end": 0.015})
    written = vp_config(path)
    assert len(written["trained_betas"]) == 1000
    back = torch.tensor(path_from({"kind": "vp", **written}).alphas_cumprod)
    assert torch.allclose(back, torch.tensor(path.alphas_cumprod), rtol=1e-12)
    theirs = DDIMScheduler(**written).alphas_cumprod
    assert torch.allclose(theirs.double(), torch.tensor(path.alphas_cumprod).double(), rtol=1e-4)


def test_a_path_without_a_scheduler_has_no_words():
    assert kind_of(FlowPath()) == "flow"
    with pytest.raises(UserError, match="TrigFlowPath"):
        path_config(TrigFlowPath())
