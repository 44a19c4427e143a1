"""Training is inference: exported folders make the images of `maths.solvers.sample`, one test a row of the table."""

from __future__ import annotations

import pytest
import torch

from fewstep.draws import Draw
from fewstep.evaluation.nfe import count_calls
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.grids import trained_pairs
from fewstep.exporting.network import network_of
from fewstep.exporting.pipeline import addresses, generate, load_pipeline
from fewstep.exporting.targets import TARGETS

from .students import EPS, FLOW, SHIFTED, VPRED, on_grid, student

ROWS = [  # family, path, kind, guidance, classes -> pipeline, scheduler
    ("unet2d", SHIFTED, "ode", 1.0, 3, "ConsistencyModelPipeline", "DPMSolverMultistepScheduler"),
    ("unet2d", FLOW, "ode", 1.0, None, "ConsistencyModelPipeline", "DPMSolverMultistepScheduler"),
    ("unet2d", EPS, "ode", 1.0, None, "DDIMPipeline", "DDIMScheduler"),
    ("unet2d", VPRED, "ode", 1.0, 3, "ConsistencyModelPipeline", "DDIMScheduler"),
    ("unet2d", EPS, "renoise", 1.0, 3, "ConsistencyModelPipeline", "LCMScheduler"),
    ("unet2d", SHIFTED, "ode", 2.0, 3, "FewStepClassPipeline", "FlowMatchEulerDiscreteScheduler"),
    ("dit", FLOW, "ode", 1.0, 3, "FewStepClassPipeline", "FlowMatchEulerDiscreteScheduler"),
    ("dit", SHIFTED, "renoise", 2.0, 3, "FewStepClassPipeline", "FlowMatchLCMScheduler"),
    ("dit", VPRED, "ode", 1.0, 3, "FewStepClassPipeline", "DDIMScheduler"),
    ("dit", VPRED, "renoise", 2.0, 3, "FewStepClassPipeline", "LCMScheduler"),
]


@pytest.mark.parametrize(("family", "path", "kind", "guidance", "classes", "pipeline", "scheduler"), ROWS)
def test_the_reloaded_pipeline_makes_the_solvers_images(
    tmp_path, family, path, kind, guidance, classes, pipeline, scheduler
):
    s = student(family, path, kind, 4, guidance, classes)
    loaded = load_pipeline(s.export(tmp_path / "m"), device="cpu")
    assert (type(loaded).__name__, type(loaded.scheduler).__name__) == (pipeline, scheduler)

    fed = []
    network_of(loaded).register_forward_pre_hook(lambda _, a, k: fed.append(_timestep(a, k)), with_kwargs=True)
    labels = None if classes is None else s.labels(3).tolist()
    with given_noise(loaded, addresses(Draw.for_images(0, range(3)))), count_calls(network_of(loaded)) as calls:
        images = images_of(loaded, 3, labels, 4, guidance)

    theirs = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert (theirs - s.images(3)).abs().max() < 1e-5
    assert theirs.std() > 0.1
    assert fed == pytest.approx([label for label, _ in trained_pairs(s.path, s.schedule.u)], abs=1e-3)
    assert calls.per_image(3) == (8 if guidance != 1 else 4)


def _timestep(args, kwargs) -> float:
    return float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).reshape(-1)[0])


def test_every_row_of_the_table_without_text_is_held_to_the_solver():
    textless = [t for t in TARGETS if t.serves in ("*", "ConsistencyModelPipeline")]
    rows = {(t.serves == "*", t.path, t.kind, t.pipeline_name, t.scheduler) for t in textless}
    held = {(r[5] == "FewStepClassPipeline", r[1]["kind"], r[2], r[5], r[6]) for r in ROWS}
    assert rows == held


@pytest.mark.parametrize(
    ("path", "origin", "timesteps"), [(EPS, 50, (999, 759, 499, 259)), (SHIFTED, 48, (1000, 900, 750, 500))]
)
def test_levels_picked_from_a_longer_grid_agree_too(tmp_path, path, origin, timesteps):
    s = student("unet2d", path, "renoise", 4, origin=origin)
    folder = s.export(tmp_path / "m")
    made = generate(folder, 3)
    assert made.timesteps == pytest.approx(timesteps, abs=1e-3) and made.nfe == 4
    assert (made.images / 255 - s.images(3)).abs().max() <= 0.5 / 255 + 1e-5
    s.schedule = on_grid("renoise", 2, origin=origin)(s.path)  # a pick of its own, from one and the same folder
    assert (generate(folder, 3, steps=2).images / 255 - s.images(3)).abs().max() <= 0.5 / 255 + 1e-5


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_other_step_counts_agree_too(tmp_path, steps):
    s = student("unet2d", SHIFTED, "ode", steps)
    made = generate(s.export(tmp_path / "m"), 3)
    assert made.nfe == steps
    assert (made.images / 255 - s.images(3)).abs().max() <= 0.5 / 255 + 1e-5
