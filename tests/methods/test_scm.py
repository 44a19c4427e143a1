"""sCM: a step against the paper's algorithm by hand, who is called and trained, and what is exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import fewstep
from fewstep.data.batch import Batch
from fewstep.draws import Draw
from fewstep.engine.barrier import Gradients, advance
from fewstep.engine.trainer import Trainer
from fewstep.exporting.pipeline import generate
from fewstep.maths.path import Path as NoisePath
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import sample
from fewstep.methods.diffusion.scm import SCM
from fewstep.models.denoiser import Denoiser
from fewstep.nets.weight_head import WeightHead
from fewstep.recipe import load_recipe
from fewstep.resources import config as shipped
from fewstep.roles import RoleSpec, assemble
from tests.methods.trajectories import (
    ROWS,
    ToldFamily,
    Wavy,
    assembled,
    draw,
    halves_agree,
    images,
    only,
    points,
    table,
    touched,
)
from tests.oracles.harness import seat

F64 = torch.float64


def scm(path: NoisePath | None = None, **config) -> SCM:
    """On wavy point networks; the weight is not 0 everywhere."""
    method = SCM(SCM.Config(**{"tangent_warmup": 0, **config}))
    nets = {"teacher": Wavy(), "student": Wavy(0.5), "weight": WeightHead()}
    torch.nn.init.normal_(nets["weight"].coefficients, std=0.3, generator=torch.Generator().manual_seed(0))
    seat(method, {role.name: nets[role.name] for role in method.roles()}, path or FlowPath())
    if method.config.embedded:
        method.student = Denoiser(method.student.handle, ToldFamily(), method.student.path)
    return method


# a step


def by_hand(method: SCM, step: int) -> Tensor:
    """The paper's algorithm 1 in its own variables, float64: x = cos(a) x0 + sin(a) s n, F a TrigFlow network of (x / s, a)."""
    batch, numbers, said = points(), draw(step=step), method.config
    s, label = said.data_std, batch.cond["label"]
    bell = numbers.within("time").normal("bell").double()
    a = torch.atan((said.time.loc + said.time.scale * bell).exp() / s)
    n = numbers.normal("eps", 3).double()

    def trig(module: torch.nn.Module, x: Tensor, b: Tensor) -> Tensor:
        b = b[:, None]
        t = s * b.sin() / (b.cos() + s * b.sin())
        scale = ((1 - t) ** 2 * s**2 + t**2).sqrt()  # y = x * scale, x of unit variance
        v = module(x * scale, 1000 * t[:, 0], label)
        return (((1 - t) * s**2 - t) * x + scale * v) / s

    c, w = a.cos()[:, None], a.sin()[:, None]
    x = c * batch.x0 + w * s * n
    dx = s * trig(method.teacher.module, x / s, a) if said.mode == "distill" else c * s * n - w * batch.x0
    dx = dx.detach()
    f, slope = torch.func.jvp(lambda y, b: trig(method.student.module, y, b), (x / s, a), (dx / s, torch.ones_like(a)))
    r = min(1.0, step / said.tangent_warmup) if said.tangent_warmup else 1.0
    g = -(c**2) * (s * f - dx) - r * c * w * (x + s * slope)
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    weight = method.weight.module.double()(a)
    return weight.exp() / 3 * g.square().sum(1) - weight


@pytest.mark.parametrize("mode", ["distill", "train"])
@pytest.mark.parametrize("step, warmup", [(0, 0), (0, 8), (3, 8), (20, 8)])
def test_a_step_is_the_papers_algorithm(mode, step, warmup):
    """Noise, tangent, warm-up r = step / warmup, normalisation, adaptive weight: the hand's numbers to 1e-5."""
    method = scm(mode=mode, tangent_warmup=warmup, data_std=0.75)
    update = only(method, step=step)
    assert update.role_names == ("student", "weight") and set(update.losses) == {"consistency"}
    torch.testing.assert_close(update.losses["consistency"].double(), by_hand(method, step), rtol=1e-5, atol=1e-5)


def test_the_warm_up_follows_the_step_alone():
    """r = min(1, step / tangent_warmup); 1 from the start where it is 0."""
    method = scm(tangent_warmup=40)
    assert [method.warm(s) for s in (0, 10, 40, 100)] == [0.0, 0.25, 1.0, 1.0]
    assert scm(tangent_warmup=0).warm(0) == 1.0


def test_times_have_the_papers_law():
    """log(sigma_d tan a) = log(t / (1-t)) is N(P_mean, P_std^2); on a DDPM table t stays within the table."""
    t = scm().times(draw(20_000)).double()
    logs = torch.logit(t)
    assert logs.mean().item() == pytest.approx(-1.0, abs=0.03) and logs.std().item() == pytest.approx(1.4, abs=0.03)
    ends = table()
    t = scm(ends).times(draw(20_000))
    assert t.min() >= ends.t_min - 1e-7 and t.max() <= ends.t_max


def test_the_target_is_the_student_itself_and_not_its_average():
    """theta^- = stop-gradient of theta: an average far away changes nothing."""
    method = scm()
    before = only(method).losses["consistency"]
    handle = method.student.handle
    handle.ema = {n: torch.nn.Parameter(p.detach() + 1) for n, p in handle.trainable().items()}
    assert torch.equal(only(method).losses["consistency"], before)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_ddpm_network_is_distilled_as_it_is(kind):
    method = scm(table(kind))
    update = only(method)
    update.losses["consistency"].mean().backward()
    assert torch.isfinite(update.losses["consistency"]).all() and method.student.module.a.grad != 0


def test_levels_tell_how_far_from_consistent_each_noise_level_is():
    """The mean square of the tangent before it is normalised, at its t."""
    update = only(scm())
    rows, t = update.levels["tangent"]
    torch.testing.assert_close((3 * rows).sqrt(), update.metrics["tangent"])
    assert torch.equal(t, scm().times(draw()))


# calls, gradients, parts


@pytest.mark.parametrize("how, student", [("jvp", 2), ("backward", 3), ("central", 4)])
def test_calls_of_each_network(tiny_unet, how, student):
    """One of the student with gradient and those of the derivative; the teacher once, on two rows a sample when guided."""
    for guidance, teacher in ((1.0, [ROWS]), (2.0, [2 * ROWS])):
        method = assembled(SCM(SCM.Config(derivative=how, guidance_scale=guidance)), tiny_unet, "full")
        seen: dict[str, list[int]] = {"teacher": [], "student": []}
        for name, rows in seen.items():
            getattr(method, name).module.register_forward_hook(lambda _m, _a, out, rows=rows: rows.append(len(out[0])))
        only(method, images())
        assert seen == {"teacher": teacher, "student": [ROWS] * student}


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_reaches_student_and_weight_alone(tiny_unet, tune):
    method = assembled(SCM(SCM.Config()), tiny_unet, tune)
    only(method, images()).losses["consistency"].mean().backward()
    student = method.student.adapter if tune == "lora" else method.student.module
    assert touched(student) == len(list(student.parameters())) and touched(method.teacher.module) == 0
    assert touched(method.weight.module) == 1


@pytest.mark.parametrize("mode", ["distill", "train"])
def test_rows_do_not_depend_on_their_micro_batch(mode):
    assert halves_agree(scm(mode=mode), step=3)


def test_cutting_the_batch_changes_no_gradient(tiny_unet):
    """One part of 8 rows or two of 4: equal gradients of student and weight."""

    def gradients(cuts: int) -> list[Tensor]:
        method = assembled(SCM(SCM.Config(tangent_warmup=0)), tiny_unet, "full")
        rows, whole = ROWS // cuts, images()
        starts = [i * rows for i in range(cuts)]
        parts = [
            method.train_step(
                Batch(whole.ids[i : i + rows], {"x0": whole.x0[i : i + rows], "cond": whole.cond[i : i + rows]}),
                Draw(5, 0, np.arange(i, i + rows)),
            )
            for i in starts
        ]
        trained = [*method.student.trainable().values(), *method.weight.trainable().values()]
        advance(parts, [(0, i) for i in starts], Gradients(lambda _: trained, lambda _: 1.0, cuts), lambda _: None)
        return [p.grad for p in trained]

    for whole, cut in zip(gradients(1), gradients(2)):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


def test_a_step_waits_for_no_number(tiny_unet, monkeypatch):
    """No tensor is turned into a Python number or branched on, which would wait for the device."""
    method = assembled(SCM(SCM.Config(derivative="central")), tiny_unet, "full")
    batch, numbers = images(), draw()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(Tensor, name, lambda *_a, name=name: pytest.fail(f"Tensor.{name}"))
    (update,) = method.train_step(batch, numbers)
    assert update.role_names == ("student", "weight")


def test_a_drawn_guidance_reaches_teacher_and_student():
    """Every call of the student sees the row's own number, which the sampler feeds for good."""
    method = scm(guidance_scale=(2.0, 4.0))
    only(method)
    drawn = draw().uniform("guidance", low=2.0, high=4.0)
    assert len(method.student.module.told) == 2
    assert all(torch.equal(told, drawn) for told in method.student.module.told)
    assert (method.schedule().embedded, method.schedule().guidance) == (True, 3.0)
    assert scm(guidance_scale=(2.0, 4.0), sample_guidance=2.5).schedule().guidance == 2.5


# roles and configuration


def test_without_a_teacher_there_is_none_to_load():
    roles = SCM(SCM.Config(mode="train")).roles()
    assert [role.name for role in roles] == ["student", "weight"]
    handles = assemble(roles, {"student": RoleSpec(**{"from": "mlp", "build": {"width": 8}})}, seed=0)
    assert handles["student"].spec.ema == 0.9999 and handles["weight"].family is None
    assert [role.name for role in SCM().roles()] == ["teacher", "student", "weight"]


@pytest.mark.parametrize(
    "said, reason",
    [
        ({"mode": "train", "guidance_scale": 3.0}, "needs a teacher"),
        ({"guidance_scale": (3.0, 2.0)}, "must increase"),
        ({"guidance_scale": 2.0, "sample_guidance": 2.0}, "baked into the student"),
        ({"data_std": 0.0}, "greater than 0"),
        ({"steps": ()}, "one or more"),
        ({"tangent": "sign"}, "norm"),
        ({"mode": "improved"}, "distill"),
        ({"weights": {"consistancy": 2.0}}, "did you mean 'consistency'"),
    ],
)
def test_bad_configuration_is_refused_with_the_reason(said, reason):
    with pytest.raises(ValidationError, match=f"(?i){reason}"):
        SCM.Config(**said)


# sampling and export


def test_the_schedule_is_the_consistency_sampler_on_a_plain_grid():
    method = scm(steps=(1, 2, 4))
    assert (method.schedule().kind, method.schedule().u) == ("renoise", (1.0, 0.75, 0.5, 0.25))
    assert method.steps_offered() == (1, 2, 4)


def recipe(sizes: dict, **config) -> dict:
    student = {"optimizer": {"lr": 1e-3}, "ema": 0.5}
    said = {"method": "scm", "teacher": {"from": "unet2d", "build": sizes}, "student": student}
    said |= {"config": {"steps": [1, 2, 4], "tangent_warmup": 2, **config}, "data": {"train": {"source": "digits"}}}
    return said | {"train": {"steps": 3, "batch": 8, "log_every": 1}}


def test_export_is_a_stock_folder_that_draws_the_trainers_images_in_every_number_of_steps(tiny_unet, tmp_path: Path):
    """A fresh process without fewstep loads it (checked on export); 1, 2, 4 steps are those many calls, without the
    weight, and make what the method's own sampler makes on that grid."""
    run = fewstep.train(recipe(tiny_unet), tmp_path / "run", show=False)
    trainer = Trainer(load_recipe(run.folder / "recipe.yaml"), run.folder, resume=True, show=False)
    trainer.run()
    method = trainer.method
    cond = method.preview_cond(6)
    for steps in (1, 2, 4):
        made = generate(run.model, 6, seed=3, labels=cond["label"], steps=steps)
        assert made.nfe == steps
        with torch.no_grad(), method.student.averaged():
            known = sample(
                method.student, method.schedule_for(steps), cond, Draw.for_images(3, np.arange(6)), (1, 8, 8)
            )
        assert (made.images.float() / 255 - ((known + 1) / 2).clamp(0, 1)).abs().max() < 0.5 / 255 + 1e-4
    assert not any("coefficients" in name for file in run.model.rglob("*.safetensors") for name in _names(file))


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def test_a_guidance_input_is_exported_with_the_student(tiny_unet, tmp_path: Path):
    """Trained over a range, sampled at the recipe's number with one call a step."""
    said = recipe(tiny_unet, guidance_scale=[1.0, 3.0])
    said["train"]["check_export"] = False
    run = fewstep.train(said, tmp_path / "run", show=False)
    assert generate(run.model, 2, steps=2).nfe == 2


@pytest.mark.parametrize("mode", ["distill", "train"])
def test_the_digits_recipe_runs_in_both_modes(mode, tmp_path: Path):
    """Two steps; without a teacher the student starts from the shipped weights."""
    said = load_recipe(shipped("scm/digits.yaml")).plain()
    if mode == "train":
        said["student"] = {**said["student"], "from": said.pop("teacher")["from"]}
    words = [f"config.mode={mode}", "train={steps: 2, batch: 4, log_every: 1, check_export: false}", "preview=null"]
    run = fewstep.train(load_recipe(said, words), tmp_path / "run", show=False)
    assert any(run.model.rglob("*.safetensors"))
