"""Which scheduler serves which student, and that it feeds the network what it was trained on."""

from __future__ import annotations

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.errors import UserError
from fewstep.exporting.grids import OWN, grid, same_pairs, trained_pairs
from fewstep.exporting.targets import TARGETS, offered_steps, row_of, target_for, training_path, training_start
from fewstep.maths.paths import EDMPath, FlowPath, VPPath
from fewstep.maths.solvers import Schedule
from fewstep.models.dit import DIT
from fewstep.models.unet2d import UNET2D

from .students import on_grid

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATHS = [
    FlowPath(),
    FlowPath(shift=3.0),
    FlowPath(num_train_timesteps=1),
    VPPath.from_scheduler({"beta_schedule": "linear"}),
    VPPath.from_scheduler({**SCALED, "prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("path", PATHS, ids=lambda p: f"{type(p).__name__}{getattr(p, 'shift', '')}")
@pytest.mark.parametrize("kind", ["ode", "renoise"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("family", [UNET2D, DIT], ids=lambda f: f.name)
def test_trained_pairs_are_the_exported_pairs(family, guidance, kind, path, steps):
    on = on_grid(kind, steps, guidance)
    trained = training_path(family, path, on)
    schedule = on(trained)
    target = target_for(family, trained, schedule)
    theirs = grid(target.scheduler_for(trained, schedule), target.pipeline_name, steps)
    ours = trained_pairs(trained, schedule.u)
    assert [label for label, _ in ours] == pytest.approx([label for label, _ in theirs], abs=1e-3)
    assert [t for _, t in ours] == pytest.approx([t for _, t in theirs], abs=1e-6)


def test_stock_flow_students_are_trained_from_999_with_whole_labels():
    path = training_path(UNET2D, FlowPath(shift=3.0), on_grid("ode", 4))
    assert path.integer_timesteps
    assert training_start(UNET2D, FlowPath(shift=3.0), on_grid("ode", 4)) == pytest.approx(0.999)
    assert [label for label, _ in trained_pairs(path, path.grid(4))] == [999, 899, 749, 499]
    assert [t for _, t in trained_pairs(path, path.grid(4))] == pytest.approx(
        [0.9997, 0.8996, 0.7496, 0.4997], abs=1e-4
    )


def test_own_pipeline_starts_at_pure_noise_on_the_shifted_grid():
    path = training_path(DIT, FlowPath(shift=3.0), on_grid("ode", 4))
    assert training_start(DIT, FlowPath(shift=3.0), on_grid("ode", 4)) == 1.0
    labels, times = zip(*trained_pairs(path, path.grid(4)))
    assert labels == pytest.approx((1000, 900, 750, 500))
    assert times == pytest.approx((1.0, 0.9, 0.75, 0.5))


def test_flow_match_euler_told_the_number_alone_wastes_its_last_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert grid(scheduler, "StableDiffusion3Pipeline", 4)[-1][1] < 0.01
    assert grid(scheduler, "FewStepClassPipeline", 4)[-1][1] == pytest.approx(0.5)


def test_a_stock_row_whose_labels_fall_off_by_rounding_is_passed_over():
    # at 21 steps 1000 sigma is 665.99999 in DPMSolverMultistep's arithmetic, where 666 was meant
    for steps, own in ((20, False), (21, True)):
        path = training_path(UNET2D, FlowPath(), on_grid("ode", steps))
        assert (target_for(UNET2D, path, _grid(path, steps)).pipeline == OWN) is own


def _grid(path: FlowPath, steps: int) -> Schedule:
    return Schedule("ode", path.grid(steps))


def test_a_student_trained_on_the_ideal_grid_gets_the_scheduler_that_has_it():
    target = target_for(UNET2D, FlowPath(), Schedule("ode", (1.0, 0.75, 0.5, 0.25)))
    assert (target.pipeline, target.scheduler) == (OWN, "FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize(
    ("path", "kind", "labels", "guidance", "pipeline", "scheduler"),
    [
        (PATHS[1], "ode", True, 1, "ConsistencyModelPipeline", "DPMSolverMultistepScheduler"),
        (PATHS[1], "ode", False, 1, "ConsistencyModelPipeline", "DPMSolverMultistepScheduler"),
        (PATHS[1], "ode", True, 3, "FewStepClassPipeline", "FlowMatchEulerDiscreteScheduler"),
        (PATHS[1], "renoise", True, 1, "FewStepClassPipeline", "FlowMatchLCMScheduler"),
        (PATHS[3], "ode", False, 1, "DDIMPipeline", "DDIMScheduler"),
        (PATHS[3], "ode", True, 1, "ConsistencyModelPipeline", "DDIMScheduler"),
        (PATHS[3], "renoise", True, 1, "ConsistencyModelPipeline", "LCMScheduler"),
        (PATHS[3], "renoise", True, 2, "FewStepClassPipeline", "LCMScheduler"),
    ],
)
def test_the_table_prefers_stock_classes(path, kind, labels, guidance, pipeline, scheduler):
    on = on_grid(kind, 4, guidance)
    trained = training_path(UNET2D, path, on, labels)
    target = target_for(UNET2D, trained, on(trained), labels)
    assert (target.pipeline_name, target.scheduler) == (pipeline, scheduler)


def test_latents_need_the_pipeline_that_decodes_them():
    path = training_path(UNET2D, FlowPath(), on_grid("ode", 4), latent=True)
    assert target_for(UNET2D, path, _grid(path, 4), latent=True).pipeline == OWN


@pytest.mark.parametrize(
    ("path", "schedule"),
    [
        (FlowPath(), Schedule("ode", (1.0, 0.9, 0.3))),
        (FlowPath(), Schedule("renoise", (1.0, 0.5), noise="start")),
        (PATHS[3], Schedule("renoise", (0.999, 0.666, 0.332))),
    ],
    ids=["uneven", "start noise", "three of a thousand"],
)
def test_a_schedule_that_no_config_holds_is_refused_with_the_mend(path, schedule):
    with pytest.raises(UserError, match="training_path"):
        target_for(UNET2D, path, schedule)


def test_a_path_that_no_scheduler_knows_is_refused():
    with pytest.raises(UserError, match="EDMPath cannot be exported"):
        target_for(UNET2D, EDMPath(), Schedule("ode", (1.0,)))


def test_offered_steps_are_those_whose_levels_were_all_trained():
    path = training_path(UNET2D, FlowPath(shift=3.0), on_grid("ode", 6))
    target = target_for(UNET2D, path, _grid(path, 6))
    assert offered_steps(target, path, _grid(path, 6)) == [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("steps", "labels"),
    [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259]), (8, [999, 879, 759, 639, 499, 379, 259, 139])],
)
def test_levels_picked_from_50_are_those_of_lcm_scheduler(steps, labels):
    """LCM, arXiv 2310.04378: 50 trailing levels of a table of 1000, of which each step count takes every so-manyth."""
    on = on_grid("renoise", steps, origin=50)
    path = training_path(UNET2D, PATHS[3], on)
    target = target_for(UNET2D, path, on(path))
    scheduler = target.scheduler_for(path, on(path))
    assert (target.pipeline_name, target.scheduler) == ("ConsistencyModelPipeline", "LCMScheduler")
    assert scheduler.config.original_inference_steps == 50
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == labels
    assert offered_steps(target, path, on(path)) == list(range(1, steps + 1))  # every pick of the grid is trained


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_picked_from_48_are_those_of_the_own_pipeline(shift):
    on = on_grid("renoise", 8, origin=48)
    path = training_path(UNET2D, FlowPath(shift=shift), on)
    target = target_for(UNET2D, path, on(path))
    assert (target.pipeline, target.scheduler) == (OWN, "FlowMatchLCMScheduler")
    assert offered_steps(target, path, on(path)) == [1, 2, 3, 4, 6, 8]  # 5 and 7 divide no 48


def test_a_pick_that_lcm_scheduler_does_not_make_is_refused():
    """It counts in whole strides of floor(1000 / levels), so 48 levels would begin at 959."""
    for origin in (48, 2000):
        with pytest.raises(UserError, match="picked from 50"):
            training_path(UNET2D, PATHS[3], on_grid("renoise", 4, origin=origin))


def test_embedded_guidance_needs_a_pipeline_that_feeds_it():
    for family in (UNET2D, DIT):
        with pytest.raises(UserError, match="no diffusers scheduler"):
            training_path(family, PATHS[3], on_grid("renoise", 4, guidance=7.0, embedded=True))


def test_guidance_scale_means_what_the_row_makes_of_it():
    own, stock, text = (
        row_of(*names)
        for names in (
            ("FewStepClassPipeline", "LCMScheduler"),
            ("DDIMPipeline", "DDIMScheduler"),
            ("StableDiffusionPipeline", "LCMScheduler"),
        )
    )
    plain, guided, fed = (
        Schedule("ode", (1.0,)),
        Schedule("ode", (1.0,), 3.0),
        Schedule("ode", (1.0,), 3.0, embedded=True),
    )
    assert (own.guidance(plain), own.guidance(guided), stock.guidance(plain)) == ("cfg", "cfg", "none")
    assert (text.guidance(plain), text.guidance(guided), text.guidance(fed)) == ("baked", "cfg", "embedded")


def test_pairs_differ_when_a_label_or_a_level_or_their_number_does():
    assert same_pairs([(999, 0.999)], [(999, 0.999)])
    assert not same_pairs([(999, 0.999)], [(998, 0.999)])
    assert not same_pairs([(999, 0.999)], [(999, 0.9985)])
    assert not same_pairs([(999, 0.999)], [(999, 0.999), (499, 0.4995)])


def test_a_row_is_found_by_the_names_in_a_folder():
    assert row_of("DDIMPipeline", "DDIMScheduler").labels is False
    with pytest.raises(UserError, match="no DDIMPipeline with a PNDMScheduler"):
        row_of("DDIMPipeline", "PNDMScheduler")
    assert len({(r.serves, r.path, r.kind, r.labels, r.carried) for r in TARGETS}) == len(TARGETS)
