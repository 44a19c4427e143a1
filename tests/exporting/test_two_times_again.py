"""From a two-time folder on: roles that start from it, and runs that write one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.engine.exporting import check_export, export_run
from fewstep.engine.trainer import Trainer
from fewstep.errors import RunFailed, UserError
from fewstep.exporting import reload
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import load_pipeline
from fewstep.maths.average_velocity import average_velocity
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import card
from fewstep.nets.extra_inputs import reads
from fewstep.recipe import load_recipe
from fewstep.roles import Handle, Role, RoleSpec, assemble, merged

from .two_times import two_times

RECIPE = {
    "method": "meanflow",
    "config": {"steps": 2},
    "data": {"train": {"source": "digits"}},
    "train": {"steps": 2, "batch": 8, "check_export": False},
    "preview": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return two_times().export(tmp_path_factory.mktemp("again") / "m")


def handles(folder: Path, *roles: Role, **specs: dict) -> dict[str, Handle]:
    """Roles of which the first comes from the folder."""
    said = {roles[0].name: {"from": str(folder), **specs.pop(roles[0].name, {})}, **specs}
    return assemble(roles, {name: RoleSpec.model_validate(spec) for name, spec in said.items()}, 0)


def s_weights(handle: Handle) -> list[torch.Tensor]:
    return [p for name, p in handle.module.named_parameters() if name.startswith("extra_inputs.embeddings.s.")]


def answer(role: Denoiser, s: float | None, sign: float | None = None) -> torch.Tensor:
    """V(x, .7, s), or what a role with one time says."""
    from fewstep.data.batch import Cond

    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.7)
    cond = Cond(label=torch.arange(3))
    with torch.no_grad():
        if s is None:
            return role.velocity(x, t, cond)
        signs = None if sign is None else torch.full((3,), sign)
        return average_velocity(role, x, t, torch.full((3,), s), cond, signs)


def test_training_goes_on_from_the_trained_second_time(folder):
    """The role adds what is there already: it is not attached twice, and its weights are those of the folder."""
    student = handles(folder, Role("student", "full", adds=("s",)))["student"]
    assert reads(student.module) == ("s",) and len(s_weights(student)) == 2
    trained = two_times().module.extra_inputs.embeddings["s"].state_dict().values()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(s_weights(student), trained))
    hooks = [len(part._forward_hooks) for part in student.module.modules() if part._forward_hooks]
    assert hooks == [1]


def test_a_sign_that_was_left_behind_starts_anew_and_the_second_time_stays(folder):
    plain = Denoiser.of(handles(folder, Role("student", "full", adds=("s",)))["student"])
    student = Denoiser.of(handles(folder, Role("student", "full", adds=("s", "sign")))["student"])
    assert reads(student.module) == ("s", "sign")
    for s in (0.7, 0.1):
        assert torch.equal(answer(student, s, -1.0), answer(plain, s)), "its last layer is zero"
    assert len(student.trainable()) == len(plain.trainable()) + 2


def test_a_role_with_one_time_plays_the_plain_flow_model(folder):
    """A teacher from such a folder is called at s = t; a copy of it that adds s is told what it is told."""
    roles = handles(folder, Role("teacher"), Role("student", "full", "teacher", adds=("s",)))
    teacher, student = (Denoiser.of(handle) for handle in roles.values())
    assert torch.equal(answer(teacher, None), answer(student, 0.7))
    assert (answer(student, 0.1) - answer(teacher, None)).abs().max() > 1e-3
    with pytest.raises(UserError, match="reads 's'"):
        answer(student, None)


def test_a_copy_of_a_student_is_hooked_once(folder):
    """As a fake score starts from its student: both add s, and the copy's layer is the student's."""
    roles = handles(folder, Role("student", "full", adds=("s",)), Role("fake", "full", "student", adds=("s",)))
    student, fake = (Denoiser.of(handle) for handle in roles.values())
    assert torch.equal(answer(fake, 0.1), answer(student, 0.1))
    assert not set(map(id, fake.module.parameters())) & set(map(id, student.module.parameters()))


def test_an_adapter_on_a_two_time_network_reads_s_through_its_layer(folder):
    roles = handles(
        folder, Role("teacher"), Role("student", "lora", "teacher", adds=("s",)), student={"lora": {"targets": "wide"}}
    )
    student = roles["student"]
    assert not student.shifted and reads(merged(student)) == ("s",)
    assert (answer(Denoiser.of(student), 0.1) - answer(Denoiser.of(roles["teacher"]), None)).abs().max() > 1e-3


def test_an_adapter_cannot_gain_a_layer(folder):
    with pytest.raises(UserError, match=r"tune is lora, but the network gains an input \(sign\)"):
        handles(folder, Role("student", "lora", adds=("s", "sign")))


# runs


def run(tmp_path: Path, **said) -> Trainer:
    return Trainer(load_recipe({**RECIPE, **said}), tmp_path / "run", show=False)


def one_time(tmp_path: Path) -> str:
    from .students import student

    return str(student("unet2d", classes=10).export(tmp_path / "base"))


@pytest.mark.parametrize("sampler", ["any", "multi"])
def test_an_adapter_that_no_pipeline_can_call_is_refused_before_training(tmp_path, sampler):
    student = {"from": one_time(tmp_path), "tune": "lora"}
    with pytest.raises(UserError, match=r"student.tune is lora.*sampler: few, or write tune: full"):
        run(tmp_path, student=student, config={"steps": 2, "sampler": sampler}).run()


def test_an_adapter_told_zero_is_a_network_with_one_time(tmp_path):
    trainer = run(tmp_path, student={"from": one_time(tmp_path), "tune": "lora"}, config={"steps": 2, "sampler": "few"})
    trainer.run()
    model = export_run(trainer)
    said = card(model)
    assert (said["times"], said["schedule"]["target"], said["steps"]) == (None, "zero", [1, 2, 4, 8, 50])
    assert not (model / "times").exists()


def test_the_whole_way_is_held_to_the_method_in_further_numbers_of_steps(tmp_path, monkeypatch):
    """Train, export, check at the method's 2 steps, at 1 and at 8; go on from the folder."""
    base = {"from": "unet2d", "build": {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16]}}
    base["build"] |= {"norm_num_groups": 4}
    trainer = run(tmp_path, student={**base, "optimizer": {"lr": 0.05}})
    trainer.run()
    model = export_run(trainer)
    assert card(model)["steps"] == [1, 2, 4, 8, 50] and card(model)["times"] == ["s"]
    asked = []

    def here(folder, said, given, prompts, steps):
        asked.extend(steps)
        pipeline = load_pipeline(folder, device="cpu")
        rows = len(given["noise.0"])
        with torch.no_grad():
            made = []
            for steps in asked:
                with given_noise(pipeline, lambda i, shape: given[f"noise.{i}"]):
                    made.append(torch.from_numpy(images_of(pipeline, rows, given["labels"].tolist(), steps, 1.0)))
        return torch.cat(made).permute(0, 3, 1, 2)

    monkeypatch.setattr(reload, "fresh_samples", here)
    assert check_export(trainer.method, model) < 1e-4
    assert asked == [2, 1, 8]
    monkeypatch.setattr(reload, "fresh_samples", lambda *given: here(*given).roll(1, 0))
    with pytest.raises(RunFailed, match="does not make the trained samples"):
        asked.clear()
        check_export(trainer.method, model)

    again = Trainer(load_recipe({**RECIPE, "student": {"from": str(model)}}), tmp_path / "again", show=False)
    assert reads(again.handles["student"].module) == ("s",)
    with torch.no_grad():
        assert any(weight.abs().max() > 0 for weight in s_weights(again.handles["student"])[1:])
