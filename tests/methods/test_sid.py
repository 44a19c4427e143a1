"""SiD on a tiny UNet: who gets gradient, guidance, resets, and what SiDA adds."""

from __future__ import annotations

import pytest
import torch

from fewstep.engine.trainer import train
from fewstep.errors import UserError
from fewstep.exporting.doctor import doctor
from fewstep.exporting.pipeline import load_pipeline
from fewstep.methods.base import Event
from fewstep.methods.diffusion.sid import SiD
from fewstep.models.build import parse
from fewstep.models.folder import card
from fewstep.roles import RoleSpec, assemble
from tests.methods.dmd import draw, images
from tests.oracles.harness import backward

SIZES = {"sample_size": 8, "classes": 10, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention": "none"}


def assembled(tune: str = "lora", **config) -> SiD:
    """The method on a tiny UNet, its roles moved off each other."""
    method = SiD(SiD.Config(**config))
    said = {"tune": tune, "lora": {"rank": 2, "targets": "all"}}
    specs = {name: RoleSpec(**said) for name in ("student", "fake_score")}
    specs["teacher"] = RoleSpec(**{"from": "unet2d", "build": SIZES})
    handles = assemble(method.roles(), specs, seed=0)
    torch.manual_seed(1)
    for handle in handles.values():
        for p in handle.trainable().values():
            p.data.add_(0.05 * torch.randn_like(p))
    method.bind(handles, {}, {})
    return method


def steps(method: SiD, step: int = 0, samples: bool = False) -> list:
    """The updates of one step."""
    return list(method.train_step(images(samples=samples), draw(step)))


def gradients(method: SiD, role: str) -> list:
    """Gradients that a role's parameters hold; None where there is none."""
    return [p.grad for p in getattr(method, role).trainable().values()]


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("loss", ["sid", "diff_instruct", "dmd_norm"])
def test_each_update_trains_its_own_role_alone(tune, loss):
    """The student's loss runs through teacher and fake model, and leaves no gradient in either."""
    method = assembled(tune, loss=loss)
    fake, student = steps(method)
    backward(method, student)
    assert all(g is not None for g in gradients(method, "student"))
    assert all(g is None for g in gradients(method, "fake_score"))
    assert not any(p.requires_grad for p in method.teacher.module.parameters())
    for p in method.student.trainable().values():
        p.grad = None
    backward(method, fake)
    assert all(g is not None for g in gradients(method, "fake_score"))
    assert all(g is None for g in gradients(method, "student"))


def test_the_gradient_passes_through_both_networks():
    """Holding the networks' inputs detached gives another gradient: SiD is not its direction alone."""
    through, alone = (assembled(loss=loss) for loss in ("sid", "dmd_norm"))
    found = []
    for method in (through, alone):
        (_, student) = steps(method)
        backward(method, student)
        found.append(torch.cat([g.flatten() for g in gradients(method, "student")]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) < 0.99


def test_the_fake_model_steps_more_often_than_the_student():
    method = assembled(fake_updates=3)
    assert [len(steps(method, step)) for step in range(6)] == [1, 1, 2, 1, 1, 2]


def test_earlier_levels_hold_no_graph(monkeypatch):
    """A sample of level j has graph through call j alone."""
    method = assembled(steps=3)
    seen = []
    x0 = method.student.x0

    def watched(*args):
        seen.append(torch.is_grad_enabled())
        return x0(*args)

    monkeypatch.setattr(method.student, "x0", watched)
    method.generate(images().cond, draw(4), graph=True)
    assert seen[-1] and not any(seen[:-1])


def test_guided_fake_model_equals_unguided_at_scale_one_and_needs_its_null_branch_trained():
    plain, guided = assembled(), assembled(fake_dropout=0.5, fake_train_guidance=1.5)
    assert not torch.equal(steps(plain)[0].losses["denoise"], steps(guided)[0].losses["denoise"])
    with pytest.raises(UserError, match="set fake_dropout"):
        parse(SiD.Config, {"fake_guidance": 1.5}, "config")


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_the_fake_model_restarts_from_the_teacher_after_so_many_samples(tune):
    """At the sample that completes a budget its weights are the teacher's and its optimiser's memory is gone."""
    method = assembled(tune, fake_reset=12)
    forgotten = []
    method.fake_score.handle.forget = lambda: forgotten.append(True)
    x, t, cond = torch.randn(6, 1, 8, 8), torch.full((6,), 0.5), images().cond
    method.on(Event("step_end", "train", 1, rows=6))
    assert not forgotten and not torch.equal(method.fake_score.x0(x, t, cond), method.teacher.x0(x, t, cond))
    method.on(Event("step_end", "train", 2, rows=6))
    assert forgotten and torch.equal(method.fake_score.x0(x, t, cond), method.teacher.x0(x, t, cond))


def test_sida_reads_the_fake_models_encoder_and_adds_no_role():
    method = assembled(adversarial=True)
    assert [r.name for r in method.roles()] == ["teacher", "student", "fake_score"]
    fake, student = steps(method, samples=True)
    assert set(fake.losses) == {"denoise", "discriminator"} and set(student.losses) == {"sid", "gan"}
    for p in method.fake_score.trainable().values():
        p.grad = None
    torch.autograd.backward(fake.losses["discriminator"].sum(), inputs=list(method.fake_score.trainable().values()))
    assert any(g is not None and g.abs().sum() > 0 for g in gradients(method, "fake_score"))


def test_log_uniform_levels_stay_in_range_and_are_spread_by_decades():
    method = assembled(noise="log_uniform")
    t = torch.cat([method.level(draw(step)) for step in range(400)])
    assert t.min() >= 0.02 and t.max() <= 0.98
    middle = ((t > 0.0999) & (t < 0.98)).float().mean()
    assert middle == pytest.approx(0.5, abs=0.03)  # half of the two decades lies above t = .1


def test_weights_name_known_terms():
    with pytest.raises(UserError, match="did you mean 'gan'"):
        parse(SiD.Config, {"weights": {"gann": 1.0}}, "config")


def test_a_start_without_signal_is_that_level_times_noise_and_the_rest_keeps_its_range():
    """x_1 = t_1 e with t_1 = .708, the papers' noise ratio of 2.42; both losses still look at levels up to .98."""
    method = assembled(start=0.708, steps=2)
    assert method.schedule().u == pytest.approx((0.708, 0.354))
    noise = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(method.student.path.start(noise), 0.708 * noise)
    assert method.teacher.path.start(noise) is noise
    assert max(method.level(draw(step)).max() for step in range(40)) > 0.9


def test_a_start_without_signal_is_refused_on_ddpm_tables():
    method = SiD(SiD.Config(start=0.7))
    teacher = RoleSpec(**{"from": "unet2d", "build": {**SIZES, "path": {"kind": "vp", "beta_schedule": "linear"}}})
    specs = {"teacher": teacher, **dict.fromkeys(("student", "fake_score"), RoleSpec(tune="full"))}
    handles = assemble(method.roles(), specs, seed=0)
    with pytest.raises(UserError, match="needs a flow teacher"):
        method.bind(handles, {}, {})


def test_a_student_that_starts_without_signal_is_exported_as_it_was_trained(tmp_path):
    """A fresh process with the folder's own pipeline makes the trainer's images, in one step and in two."""
    recipe = {
        "method": "sid",
        "teacher": {"from": "unet2d", "build": SIZES},
        "student": {"tune": "full", "optimizer": {"lr": 1e-3}},
        "fake_score": {"tune": "full"},
        "config": {"start": 0.708, "steps": [1, 2]},
        "data": {"train": {"source": "labels", "classes": 10}},
        "train": {"steps": 2, "batch": 4},
    }
    run = train(recipe, tmp_path / "run", show=False)  # ends with the comparison in a fresh process
    pipeline = load_pipeline(run.model)
    assert pipeline.config["start"] == pytest.approx(0.708) and card(run.model)["path"]["zero_signal"]
    pipeline(class_labels=[0], num_inference_steps=2, output_type="pt")
    assert pipeline.scheduler.timesteps.tolist() == pytest.approx([708, 354])
    assert all(finding.level == "ok" for finding in doctor(run.model))
