"""Flow on the clock of TrigFlow's angle: the states and answers of TrigFlow's own path, and SCMScheduler's levels."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import SCMScheduler

from fewstep.exporting.grids import grid, same_pairs, trained_pairs
from fewstep.exporting.path_config import kind_of, path_config
from fewstep.maths.angle_path import AngleFlowPath
from fewstep.maths.paths import FlowPath, TrigFlowPath, add_noise
from fewstep.models.folder import path_from, path_from_scheduler

PATH = AngleFlowPath()


def test_the_clock_is_the_angle_and_the_label_t_itself():
    """t = sin a / (sin a + cos a) at u = a / (pi/2), both ways; TrigFlowPath has the same clock."""
    u = torch.linspace(0, 1, 17, dtype=torch.float64)
    a = u * math.pi / 2
    t = PATH.time(u)
    torch.testing.assert_close(t, a.sin() / (a.sin() + a.cos()))
    torch.testing.assert_close(PATH.clock(t), u)
    torch.testing.assert_close(t, TrigFlowPath().time(u))
    assert torch.equal(PATH.timestep(t), t) and PATH.time(1.0) == 1.0


def test_a_network_that_sana_sprint_calls_trigflow_is_a_flow_network():
    """F = cos a eps - sin a x0 of y = (1-t) x0 + t eps and v = eps - x0, as the pipeline makes it of v (float64)."""
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64)
    a = torch.linspace(0, math.pi / 2, 5, dtype=torch.float64)[:, None]
    t = PATH.time(a[:, 0] / (math.pi / 2))[:, None]
    length = (t**2 + (1 - t) ** 2).sqrt()
    y = (a.cos() * x0 + a.sin() * eps) * length
    torch.testing.assert_close(y, add_noise(x0, eps, t[:, 0]))
    f = ((1 - 2 * t) * y + (1 - 2 * t + 2 * t**2) * PATH.target(x0, eps, t[:, 0])) / length
    torch.testing.assert_close(f, a.cos() * eps - a.sin() * x0)
    torch.testing.assert_close(f, TrigFlowPath().target(x0, eps, t[:, 0]))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_levels_are_those_of_scm_scheduler(steps):
    """Evenly spaced in the angle; of two the second is at 1.3. A plain clock has other ones, but for one step."""
    scheduler = SCMScheduler()
    theirs = grid(scheduler, "SanaSprintPipeline", steps)
    angles = [1.5708, 1.3] if steps == 2 else [1.5708 * (1 - i / steps) for i in range(steps)]
    assert scheduler.timesteps.tolist() == pytest.approx([*angles, 0], abs=1e-6)
    assert same_pairs(trained_pairs(PATH, PATH.grid(steps)), theirs) and max(t for _, t in theirs) <= 1
    plain = FlowPath(num_train_timesteps=1)
    assert same_pairs(trained_pairs(plain, plain.grid(steps)), theirs) == (steps == 1)


def test_written_down_it_is_read_back():
    """In fewstep.json, and from the config of a stock folder's scheduler."""
    assert (
        path_from(path_config(PATH)) == PATH and path_config(PATH)["kind"] == "angle_flow" and kind_of(PATH) == "flow"
    )
    assert path_from_scheduler({**SCMScheduler().config, "_class_name": "SCMScheduler"}) == PATH
    assert path_from(path_config(FlowPath(shift=3.0))) == FlowPath(shift=3.0)
