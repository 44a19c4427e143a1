"""FreeFlow on real network classes: who trains, who is called, what is exported, and what it says of bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.engine.barrier import Gradients, advance
from fewstep.errors import RunFailed, UserError
from fewstep.exporting.pipeline import generate
from fewstep.methods.base import Total, Update
from fewstep.methods.diffusion.freeflow import FreeFlow
from fewstep.recipe import load_recipe
from fewstep.roles import RoleSpec, assemble

ROWS = 8
RANGE = (1.0, 3.0)


def assembled(sizes: dict, family: str = "unet2d", moved: bool = True, **config) -> FreeFlow:
    """The method on tiny networks; `moved`: away from "student = fake model = teacher"."""
    method = FreeFlow(FreeFlow.Config(**{"guidance_scale": 1.0, **config}))
    specs = {"teacher": RoleSpec(**{"from": family, "build": sizes})}
    specs["fake_velocity"] = RoleSpec(lora={"rank": 2, "targets": "all"})
    handles = assemble(method.roles(), specs, seed=0)
    torch.manual_seed(1)
    for handle in handles.values() if moved else ():
        for p in handle.trainable().values():
            p.data.add_(0.02 * torch.randn_like(p))
    method.bind(handles, {}, {})
    return method


def labels(rows: int = ROWS) -> Batch:
    """Conditions and nothing else."""
    ids = torch.arange(rows)
    return Batch(ids, {"cond": Cond(label=ids % 10)})


def draw(step: int = 0, first: int = 0, rows: int = ROWS) -> Draw:
    return Draw(5, step, np.arange(first, first + rows))


def updates(method: FreeFlow, step: int = 0) -> list[Update]:
    """The updates of one step, with its totals sent back."""
    running, reply, found = method.train_step(labels(), draw(step)), None, []
    while True:
        try:
            said = running.send(reply)
        except StopIteration:
            return found
        reply = dict(said) if isinstance(said, Total) else None
        if isinstance(said, Update):
            found.append(said)


def touched(module: nn.Module) -> int:
    """Parameters that hold a gradient."""
    return sum(p.grad is not None for p in module.parameters())


# who trains


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"mode": "pred"}, {"student": "full"}),
        ({"mode": "corr"}, {"student": "full", "fake_velocity": "lora"}),
        ({}, {"student": "full", "fake_velocity": "lora"}),
        ({"guidance_scale": RANGE}, {"student": "full", "fake_velocity": "full"}),
    ],
)
def test_roles_follow_mode_and_guidance(config, expected):
    """A drawn guidance is an input of student and fake model, which an adapter cannot hold."""
    method = FreeFlow(FreeFlow.Config(**{"guidance_scale": 1.5, **config}))
    roles = {role.name: role for role in method.roles()}
    assert {n: r.tune for n, r in roles.items()} == {"teacher": "frozen", **expected}
    told = ("guidance",) if config.get("guidance_scale") else ()
    assert roles["student"].adds == ("delta", *told)
    assert "fake_velocity" not in expected or roles["fake_velocity"].adds == told


@pytest.mark.parametrize("guidance", [1.0, 2.0, RANGE])
def test_only_v_carries_a_graph_in_the_students_step(tiny_unet, guidance):
    """Property 7: teacher, fake model, x, dV/d delta, w and lambda are found without one; an unrestricted backward of the
    student's loss reaches the student alone, and the fake model's reaches the fake model alone."""
    method = assembled(tiny_unet, guidance_scale=guidance)
    parts = method.parts(ROWS, torch.device("cpu"), segment=0)
    moves, lengths, made = method.directions(method.asked(labels().cond, parts, 0, draw()), parts)
    assert not any(t.requires_grad for t in (*moves.values(), *lengths.values(), made))
    student, fake = updates(method)
    assert (student.role_names, fake.role_names) == (("student",), ("fake_velocity",))
    mine = method.fake_velocity.adapter or method.fake_velocity.module
    sum(rows.mean() for rows in student.losses.values()).backward()
    assert touched(method.student.module) == len(list(method.student.module.parameters()))
    assert touched(mine) == 0 and touched(method.teacher.module) == 0
    method.student.module.zero_grad()
    fake.losses["denoise"].mean().backward()
    assert touched(method.student.module) == 0 and touched(mine) == len(list(mine.parameters()))


def test_gradient_is_that_of_v_times_the_direction(tiny_unet):
    """Property 7: L = [sum_pred V . sg(w D_G) + lambda sum_corr V . sg(D_N)] / (B d)."""
    method = assembled(tiny_unet)
    (student, _) = updates(method)
    sum(rows.mean() for rows in student.losses.values()).backward()
    found = [p.grad.clone() for p in method.student.module.parameters()]
    method.student.module.zero_grad()

    parts = method.parts(ROWS, torch.device("cpu"), segment=0)
    asked = method.asked(labels().cond, parts, 0, draw())
    moves, _, _ = method.directions(asked, parts)
    lengths = {name: move.flatten(1).norm(dim=1).mean() for name, move in moves.items()}
    factor = {"prediction": 1.0, "correction": lengths["prediction"] / (lengths["correction"] + 1e-3)}
    v = method.student.velocity(asked.start, torch.full((ROWS,), 1.0), asked.cond.with_(delta=asked.delta))
    carrier = sum((v[rows] * factor[name] * moves[name]).sum() for name, rows in parts.items()) / v.numel()
    expected = torch.autograd.grad(carrier, list(method.student.module.parameters()))
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "family, sizes", [("unet2d", None), ("dit", {"sample_size": 8, "classes": 10, "num_layers": 2})]
)
def test_student_starts_as_the_teacher_for_every_duration_and_guidance(tiny_unet, family, sizes):
    """Property 9: V(z, delta, g) = v(z, 1) bit for bit."""
    method = assembled(sizes or tiny_unet, family, moved=False, guidance_scale=RANGE)
    z, one, cond = torch.randn(ROWS, 1, 8, 8), torch.ones(ROWS), labels().cond
    expected = method.teacher.velocity(z, one, cond)
    told = cond.with_(delta=torch.linspace(0, 1, ROWS), guidance=torch.linspace(1, 9, ROWS))
    assert torch.equal(method.student.velocity(z, one, told), expected)
    assert torch.equal(method.fake_velocity.velocity(z, one, told), expected)


# what a step does


def test_three_rows_in_four_predict_and_every_fourth_corrects_at_full_duration(tiny_unet):
    method = assembled(tiny_unet)
    parts = method.parts(ROWS, torch.device("cpu"), segment=0)
    assert parts["prediction"].tolist() == [0, 1, 2, 4, 5, 6] and parts["correction"].tolist() == [3, 7]
    delta = method.asked(labels().cond, parts, 0, draw()).delta
    assert (delta[parts["correction"]] == 1).all() and (delta[parts["prediction"]] < 1).all()
    assert (
        len(assembled(tiny_unet, prediction_share=0.5).parts(ROWS, torch.device("cpu"), segment=0)["correction"]) == 4
    )


def test_cutting_the_batch_changes_nothing(tiny_unet):
    """Rows keep their part, their numbers and their share of lambda: one part of 8 rows or two of 4, equal gradients."""

    def gradients(cuts: int) -> list[Tensor]:
        method = assembled(tiny_unet)
        rows, said = ROWS // cuts, []
        parameters = list(method.student.trainable().values())
        parts = [
            method.train_step(
                Batch(torch.arange(rows), {"cond": labels().cond[i * rows : (i + 1) * rows]}), draw(0, i * rows, rows)
            )
            for i in range(cuts)
        ]

        def finish(barrier) -> None:
            if barrier.roles == ("student",):
                said.extend(p.grad.clone() for p in parameters)

        of = {"student": parameters, "fake_velocity": list(method.fake_velocity.trainable().values())}
        advance(
            parts, [(0, i) for i in range(cuts)], Gradients(lambda roles: of[roles[0]], lambda _: 1.0, cuts), finish
        )
        return said

    for whole, cut in zip(gradients(1), gradients(2)):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_calls_of_each_network(tiny_unet):
    """Joint, unguided, jvp: the student has 6 predicting rows twice (once each for direction and gradient) and 2
    correcting rows twice; the teacher sees each row once; the fake model 2 rows, and 2 for each of its steps."""
    method = assembled(tiny_unet, fake_updates=2)
    seen: dict[str, list[int]] = {}
    for name in ("teacher", "student"):
        rows = seen.setdefault(name, [])
        network = getattr(method, name).module
        network.register_forward_hook(lambda _m, _a, out, rows=rows: rows.append(len(out[0])))
    assert len(updates(method)) == 3
    assert seen["student"] == [6, 2, 8]
    assert sorted(seen["teacher"]) == [2, 2, 2, 2, 6]  # the fake model is an adapter on the same base: three calls of 2


def test_warmup_holds_the_correction_back(tiny_unet):
    """Its term has no gradient for the first steps while the fake model learns."""
    method = assembled(tiny_unet, warmup=3)
    early, late = updates(method, 2), updates(method, 3)
    assert early[0].losses["correction"].abs().max() == 0 < late[0].losses["correction"].abs().max()
    assert len(early) == len(late) == 2


@pytest.mark.parametrize("mode, terms, roles", [("pred", {"prediction"}, 1), ("corr", {"correction"}, 2)])
def test_each_term_alone_takes_all_rows(tiny_unet, mode, terms, roles):
    found = updates(assembled(tiny_unet, mode=mode))
    assert set(found[0].losses) == terms and len(found) == roles
    assert all(len(rows) == ROWS for rows in found[0].losses.values())


@pytest.mark.parametrize("how", ["central", "backward"])
def test_differences_agree_with_forward_mode_on_the_real_network(tiny_unet, how):
    """Property 6, through the method: the same D_G to a few per cent of its size."""
    exact, near = (
        assembled(tiny_unet, mode="pred"),
        assembled(tiny_unet, mode="pred", derivative=how, derivative_step=2e-3),
    )
    asked = exact.asked(labels().cond, {}, 0, draw())
    a, b = exact.prediction(asked)[0], near.prediction(asked)[0]
    assert (a - b).norm() / a.norm() < {"central": 1e-3, "backward": 3e-2}[how]


# sampling and export


def recipe(sizes: dict, **config) -> dict:
    student = {"optimizer": {"lr": 1e-3}, "ema": 0.5}
    said = {"method": "freeflow", "teacher": {"from": "unet2d", "build": sizes}, "student": student}
    said |= {"config": {"guidance_scale": 1.0, **config}, "data": {"train": {"source": "labels", "classes": 10}}}
    lora = {"lora": {"rank": 2, "targets": "all"}} if config.get("mode") != "pred" else {}
    return said | ({"fake_velocity": lora} if lora else {}) | {"train": {"steps": 3, "batch": 8, "log_every": 1}}


def test_export_is_a_stock_one_step_folder_that_draws_the_trainers_images(tiny_unet, tmp_path: Path, monkeypatch):
    """Property 12: training opens no images; a fresh process without fewstep loads the folder (checked on export) and
    the pipeline makes the method's own samples with one network call an image, at full noise, and no null call."""
    from fewstep.data import images
    from fewstep.engine.trainer import Trainer

    monkeypatch.setattr(images.Digits, "__init__", lambda *_a, **_k: pytest.fail("images were opened"))
    run = fewstep.train(recipe(tiny_unet, guidance_scale=RANGE), tmp_path / "run", show=False)
    made = generate(run.model, 6, seed=3)
    assert made.nfe == 1 and made.timesteps == (999.0,)
    assert not list(run.model.rglob("*.py"))
    names = {name for file in run.model.rglob("*.safetensors") for name in _names(file)}
    assert names and not any("extra_inputs" in name for name in names)
    trainer = Trainer(load_recipe(run.folder / "recipe.yaml"), run.folder, resume=True, show=False)
    trainer.run()
    with torch.no_grad():
        expected = ((trainer.method.samples(6, 3) + 1) / 2).clamp(0, 1)
    assert (made.images.float() / 255 - expected).abs().max() < 0.5 / 255 + 1e-4


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.mark.parametrize("fed, expected", [(None, 2.0), (2.5, 2.5)])
def test_the_exported_network_has_duration_and_guidance_for_good(tiny_unet, fed, expected):
    """Folding is exact to 1e-6 at delta = t_max and the configured guidance."""
    method = assembled(tiny_unet, guidance_scale=RANGE, sample_guidance=fed)
    assert method.constants() == {"delta": method.student.path.t_max, "guidance": expected}
    z, cond = torch.randn(ROWS, 1, 8, 8), labels().cond
    stock = method.exported_module()
    at = {name: torch.full((ROWS,), value) for name, value in method.constants().items()}
    with method.student.averaged(), torch.no_grad():
        known = method.student.velocity(z, torch.ones(ROWS), cond.with_(**at))
        assert (stock(z, torch.full((ROWS,), 1000.0), class_labels=cond["label"]).sample - known).abs().max() < 2e-6


# bad input


def test_a_guidance_range_needs_an_unconditional_branch(tiny_unet):
    method = assembled({**tiny_unet, "classes": None}, guidance_scale=RANGE)
    with pytest.raises(UserError, match="no unconditional branch"):
        updates(method)


def test_a_network_without_forward_mode_is_named_with_the_way_out(tiny_unet):
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    method = assembled(tiny_unet)
    method.student.module.time_embedding.register_forward_hook(lambda _m, _a, out: Round.apply(out))
    with pytest.raises(UserError, match=r"no forward-mode derivative.*config\.derivative: central"):
        updates(method)


def test_nan_in_the_fake_model_stops_the_run_and_is_named(tiny_unet, tmp_path: Path, monkeypatch):
    """What the fake model says is logged ahead of the losses, so that the first number that breaks is its own."""
    inside = FreeFlow.bind

    def broken(self, *args):
        inside(self, *args)
        next(iter(self.fake_velocity.trainable().values())).data.fill_(float("nan"))

    monkeypatch.setattr(FreeFlow, "bind", broken)
    with pytest.raises(RunFailed, match="fake_velocity_gap is nan at step 1"):
        fewstep.train(recipe(tiny_unet), tmp_path / "run", show=False)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"guidance_scale": [3.0, 1.0]}, "guidance_scale"),
        ({"guidance_scale": 2.0, "sample_guidance": 3.0}, "baked in"),
        ({"correction_interval": [0.7, 0.1]}, "correction_interval"),
        ({"weights": {"predicton": 2.0}}, "did you mean 'prediction'"),
        ({"mode": "both"}, "joint"),
        ({"prediction_share": 1.0}, "less than 1"),
    ],
)
def test_bad_options_are_named(tiny_unet, config, message):
    with pytest.raises(UserError, match=message):
        load_recipe({**recipe(tiny_unet), "config": config})


def test_batches_are_cut_in_fours(tiny_unet, tmp_path: Path):
    said = recipe(tiny_unet)
    said["train"]["batch"] = 6
    with pytest.raises(UserError, match="multiples of 4"):
        fewstep.train(said, tmp_path / "run", show=False)
