"""TwinFlow on real network classes: rows, calls, labels, targets, and what it says of bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.engine.barrier import Gradients, advance
from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.maths.rcgm import dealt
from fewstep.methods.base import Update
from fewstep.methods.diffusion.twinflow import TwinFlow
from fewstep.recipe import load_recipe
from fewstep.roles import Handle, RoleSpec, assemble

ROWS, DIGIT = 8, (1, 8, 8)
BASE = {"guide": "base", "guidance_scale": 4.0}


def assembled(sizes: dict, tune: str = "full", moved: bool = True, **config) -> TwinFlow:
    """The method on tiny networks; `moved`: away from what they start as."""
    sampler = {"sampler": "few"} if tune == "lora" else {}
    method = TwinFlow(TwinFlow.Config(**{**sampler, **config}))
    source = {"from": "unet2d", "build": sizes}
    said = {"tune": tune, "lora": {"rank": 2, "targets": "all"}} if tune == "lora" else {}
    asks = method.config.asks_teacher
    specs = {"teacher": RoleSpec(**source), "student": RoleSpec(**said, **({} if asks else source))}
    handles = assemble(method.roles(), specs, seed=0)
    torch.manual_seed(1)
    for p in handles["student"].trainable().values() if moved else ():
        p.data.add_(0.02 * torch.randn_like(p))
    method.bind(handles, {}, {})
    return method


def digits(first: int = 0, rows: int = ROWS, data: bool = True) -> Batch:
    """Rows `first` and on of a batch of noise and labels; without `data` labels alone."""
    ids = torch.arange(first, first + rows)
    x0 = torch.randn(64, *DIGIT, generator=torch.Generator().manual_seed(0))[ids]
    return Batch(ids, {"cond": Cond(label=ids % 10), **({"x0": x0} if data else {})})


def draw(first: int = 0, rows: int = ROWS) -> Draw:
    return Draw(5, 0, np.arange(first, first + rows))


def update(method: TwinFlow, rows: int = ROWS, data: bool = True) -> Update:
    (said,) = method.train_step(digits(rows=rows, data=data), draw(rows=rows))
    assert isinstance(said, Update)
    return said


def calls(method: TwinFlow) -> list[tuple[int, bool, Tensor]]:
    """Rows, whether with a graph, and labels of every call of the student's module from now on."""
    seen: list[tuple[int, bool, Tensor]] = []

    def saw(_module, _args, kwargs, _output) -> None:
        seen.append((len(kwargs["sample"]), torch.is_grad_enabled(), kwargs["timestep"].clone()))

    method.student.module.register_forward_hook(saw, with_kwargs=True)
    return seen


# who trains, and as what it starts


@pytest.mark.parametrize(
    "config, roles, adds",
    [
        ({}, ["student"], ("s", "sign")),
        ({"guidance_scale": 5.0}, ["student"], ("s", "sign")),
        ({"parts": {"mul": 1, "any": 1}}, ["student"], ("s",)),
        (BASE, ["teacher", "student"], ("s", "sign")),
        ({**BASE, "guidance_scale": 1.0}, ["student"], ("s", "sign")),
        ({"guide": "base_datafree"}, ["teacher", "student"], ("s", "sign")),
        ({"real_velocity": "teacher"}, ["teacher", "student"], ("s", "sign")),
    ],
)
def test_a_frozen_base_takes_part_only_where_it_is_asked(config, roles, adds):
    declared = TwinFlow(TwinFlow.Config(**config)).roles()
    assert [role.name for role in declared] == roles
    assert declared[-1].adds == adds and declared[-1].defaults["ema_warmup"]


@pytest.mark.parametrize("second", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_student_starts_as_the_base_for_every_second_time_and_sign(tiny_unet, second, sign):
    """Property 13: V(x, t, s) = v(x, t) bit for bit."""
    method = assembled(tiny_unet, moved=False, **BASE)
    x, t, cond = torch.randn(ROWS, *DIGIT), torch.linspace(0.1, 1, ROWS), digits().cond
    told = cond.with_(s=second * t, sign=torch.full((ROWS,), sign))
    assert torch.equal(method.student.velocity(x, t, told), method.teacher.velocity(x, t, cond))


def test_after_training_the_velocity_has_no_part_of_the_second_time(tiny_unet):
    """At s = t and sign +1 the added layers are silent, whatever they have learned."""
    method = assembled(tiny_unet)
    x, t, cond = torch.randn(ROWS, *DIGIT), torch.linspace(0.1, 1, ROWS), digits().cond
    at = method.student.velocity(x, t, cond.with_(s=t))
    minus = method.student.velocity(x, t, cond.with_(s=t, sign=-torch.ones(ROWS)))
    extra = method.student.module.extra_inputs
    for p in extra.parameters():
        p.data.zero_()
    assert torch.equal(method.student.velocity(x, t, cond.with_(s=0 * t)), at) and not torch.equal(at, minus)


# rows


@pytest.mark.parametrize(
    "parts, order, group",
    [
        ({}, 2, "e2e mul any adv"),
        ({}, 1, "e2e mul one adv"),
        ({}, 0, "mul"),
        ({"any": 2, "e2e": 1, "mul": 2, "adv": 1}, 2, "e2e mul mul any any adv"),
    ],
)
def test_groups_of_rows_have_a_fixed_composition(parts, order, group):
    """One row of each kind, with `one` in place of `any` at order 1; a third of the rows for the twin is 1 2 2 1."""
    method = TwinFlow(TwinFlow.Config(parts=parts, order=order))
    assert list(method.config.group) == group.split() and method.row_multiple == len(group.split())


def test_each_kind_of_row_has_its_times(tiny_unet):
    """e2e (1, 0); mul s in .95 t .. t; any s < t; adv s = t at the twin's sign; rows keep their places in the batch."""
    method = assembled(tiny_unet)
    rows = dealt(method.config.group, 64, torch.device("cpu"))
    assert rows.order[:16].tolist() == list(range(0, 64, 4)) and rows.order[48:].tolist() == list(range(3, 64, 4))
    t, s = method.times(rows, draw(rows=64))
    assert (t[:16] == 1).all() and (s[:16] == 0).all()
    assert (
        (s[16:32] >= 0.9499 * t[16:32]).all() and (s[16:32] <= t[16:32]).all() and not torch.equal(s[16:32], t[16:32])
    )
    assert (s[32:48] < t[32:48]).all() and (s[32:48] / t[32:48]).std() > 0.2
    assert torch.equal(s[48:], t[48:])
    assert method.sign(t, rows).tolist() == [1.0] * 48 + [-1.0] * 16
    one = assembled(tiny_unet, order=1)
    assert (one.times(dealt(one.config.group, 64, torch.device("cpu")), draw(rows=64))[1][32:48] == 0).all()


def test_conditions_are_dropped_in_mul_rows_alone(tiny_unet):
    method = assembled(tiny_unet, null_drop=1.0)
    rows = dealt(method.config.group, ROWS, torch.device("cpu"))
    label = method.asked(digits(), rows, draw()).cond["label"]
    assert label.tolist() == [0, 4, 10, 10, 2, 6, 3, 7]


def test_twin_rows_are_the_students_own_one_step_outputs(tiny_unet):
    """x0 = z - V(z, 1, 0) with the row's own condition; all other rows are the data's."""
    method = assembled(tiny_unet)
    rows = dealt(method.config.group, ROWS, torch.device("cpu"))
    cond = digits().cond[rows.order]
    x0 = method.clean(digits(), cond, rows, draw())
    assert torch.equal(x0[:6], digits().x0[rows.order][:6]) and not x0.requires_grad
    z, told = draw().normal("start", *DIGIT)[[3, 7]], cond[rows.twin].with_(s=torch.zeros(2))
    torch.testing.assert_close(x0[6:], z - method.student.velocity(z, torch.ones(2), told))


def test_cutting_the_batch_changes_nothing(tiny_unet):
    """One part of 8 rows or two of 4 have equal gradients: kinds go by place in the step's batch."""

    def gradients(cuts: int) -> list[Tensor]:
        method = assembled(tiny_unet, guidance_scale=2.0)
        rows, said = ROWS // cuts, []
        parameters = list(method.student.trainable().values())
        parts = [method.train_step(digits(i * rows, rows), draw(i * rows, rows)) for i in range(cuts)]
        finish = lambda _: said.extend(p.grad.clone() for p in parameters)  # noqa: E731
        advance(parts, [(0, i) for i in range(cuts)], Gradients(lambda _: parameters, lambda _: 1.0, cuts), finish)
        return said

    for whole, cut in zip(gradients(1), gradients(2)):
        torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-5)


# calls


@pytest.mark.parametrize(
    "config, without_graph",
    [
        ({"guidance_scale": 5.0}, 3.25),
        ({}, 2.25),
        ({"guidance_scale": 5.0, "order": 1}, 2.5),
        ({"parts": {"e2e": 1, "mul": 1, "any": 2}}, 2.0),
        ({"parts": {"mul": 4}, "order": 0}, 0.0),
    ],
)
def test_no_row_is_computed_whose_result_is_thrown_away(tiny_unet, config, without_graph):
    """Forwards a step in units of the batch: one with a graph; without: .25 made, 1 guided, .75 a roll-out step, .5 G."""
    method = assembled(tiny_unet, **config)
    seen = calls(method)
    update(method)
    assert [rows for rows, graph, _ in seen if graph] == [ROWS]
    assert sum(rows for rows, graph, _ in seen if not graph) / ROWS == without_graph


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("guide", ["base", "base_datafree"])
def test_the_base_is_called_at_its_own_label(tiny_unet, tune, guide, monkeypatch):
    """An adapter's label for (t, t) is t / 2; the base under it guides at t."""
    method = assembled(tiny_unet, tune, guide=guide, guidance_scale=4.0)
    rows = dealt(method.config.group, ROWS, torch.device("cpu"))
    t = method.times(rows, draw())[0][rows.between]
    inside, asked = Handle.__call__, []
    monkeypatch.setattr(
        Handle, "__call__", lambda self, **kw: asked.append((self.name, kw["timestep"])) or inside(self, **kw)
    )
    update(method)
    (labels,) = [label for name, label in asked if name == "teacher"]
    torch.testing.assert_close(labels, 1000 * torch.cat([t, t]))


def test_an_adapter_reads_second_time_and_sign_from_its_label(tiny_unet):
    """sign (t - s / 2): the whole way is label 1000, the twin is called at -t / 2."""
    method = assembled(tiny_unet, "lora")
    rows = dealt(method.config.group, ROWS, torch.device("cpu"))
    t, s = method.times(rows, draw())
    seen = calls(method)
    update(method)
    (label,) = [label for _, graph, label in seen if graph]
    torch.testing.assert_close(label, 1000 * method.sign(t, rows) * (t - s / 2))
    assert (label[:2] == 1000).all() and (label[6:] < 0).all()
    assert method.schedule().target == "zero" and method.schedule().kind == "renoise"


def test_nothing_but_the_students_one_call_carries_a_graph(tiny_unet):
    """An unrestricted backward of all terms reaches the student alone; its targets come without."""
    method = assembled(tiny_unet, guidance_scale=4.0, guide="base", real_velocity="teacher")
    said = update(method)
    sum(rows.mean() for rows in said.losses.values()).backward()
    assert all(p.grad is None for p in method.teacher.module.parameters())
    assert all(p.grad is None for p in method.student.ema.values())
    assert any(p.grad.abs().max() > 0 for p in method.student.module.extra_inputs.parameters())


def test_without_data_none_is_read(tiny_unet):
    """base_datafree: x0 is made in every row, and below t = 1 v is the base's own."""
    method = assembled(tiny_unet, guide="base_datafree", guidance_scale=2.0)
    said = update(method, data=False)
    assert set(said.losses) == {"rcgm", "adversarial", "rectification"}
    rows = dealt(method.config.group, ROWS, torch.device("cpu"))
    asked = method.asked(digits(data=False), rows, draw()).part(rows.path)
    with torch.no_grad():
        v = method.velocity(asked, rows.between)[rows.between]
    part = asked.part(rows.between)
    tied, free = (method.teacher.velocity(part.x, part.t, c) for c in (part.cond, method.teacher.null(part.cond)))
    torch.testing.assert_close(v, free + 2 * (tied - free), rtol=1e-4, atol=1e-5)


# targets


@pytest.mark.parametrize(
    "config, averaged", [({}, True), ({"order": 1}, False), ({"order": 1, "target": "average"}, True)]
)
def test_targets_come_from_the_average_but_at_order_1(tiny_unet, config, averaged):
    """Filling the average with other weights moves the residual, or not."""
    method = assembled(tiny_unet, **config)
    rows = dealt(method.config.group, ROWS, torch.device("cpu"))
    asked = method.asked(digits(), rows, draw()).part(rows.path)
    before = method.residual(asked, torch.zeros_like(asked.x), rows, draw())
    for p in method.student.ema.values():
        p.data.add_(0.1)
    assert torch.equal(before, method.residual(asked, torch.zeros_like(asked.x), rows, draw())) != averaged


def test_the_averages_decay_grows_from_zero(tiny_unet):
    """d <- d + (1 - d) (d_max - d) / 2 for .99: 0 (the copy itself), .495, .620, .690; .9 is passed at the 17th update
    and .98 at the 132nd."""
    student = assembled(tiny_unet).student
    name, parameter = next(iter(student.trainable().items()))
    decays = [student.ema_decay]
    for count in range(132):
        before = student.ema[name].detach().clone()
        student.update_ema()
        decays.append(student.ema_decay)
        if count < 2:
            expected = decays[-1] * before + (1 - decays[-1]) * parameter.detach()
            torch.testing.assert_close(student.ema[name].detach(), expected)
    assert decays[:4] == pytest.approx([0.0, 0.495, 0.619987, 0.690288], abs=1e-3)
    assert decays[16] < 0.9 <= decays[17] and decays[131] < 0.98 <= decays[132]


def recipe(sizes: dict, **config) -> dict:
    said = {"method": "twinflow", "student": {"from": "unet2d", "build": sizes, "optimizer": {"lr": 1e-3}}}
    said |= {"config": config, "data": {"train": {"source": "digits"}}}
    return said | {"train": {"steps": 4, "batch": 8, "log_every": 1, "save_every": 2}}


def test_a_resumed_run_averages_as_one_that_went_through(tiny_unet, tmp_path: Path):
    """The decay is in the checkpoint: taken up again after 2 steps of 4, a run ends in the same average."""
    through = Trainer(load_recipe(recipe(tiny_unet)), tmp_path, show=False)
    through.run()
    shutil.rmtree(tmp_path / "checkpoints" / "step-4")
    rest = Trainer(load_recipe(tmp_path / "recipe.yaml"), tmp_path, resume=True, show=False)
    assert rest.handles["student"].ema_decay == 0.0
    rest.run()
    student, resumed = through.handles["student"], rest.handles["student"]
    assert resumed.ema_decay == student.ema_decay > 0.7
    assert all(torch.equal(student.ema[name], resumed.ema[name]) for name in student.ema)


# pictures, levels


def test_a_run_shows_the_twin_and_the_losses_by_level(tiny_unet, tmp_path: Path):
    said = recipe(tiny_unet, steps=1)
    said["preview"] = {"every": 4, "n": 4}
    Trainer(load_recipe(said), tmp_path, show=False).run()
    assert list((tmp_path / "previews").glob("negative-time/*.png"))
    levels = update(assembled(tiny_unet)).levels
    assert len(levels["rcgm"].t) == 6 and len(levels["adversarial"].t) == 2
    assert assembled(tiny_unet, parts={"e2e": 1, "any": 1}).pictures(4, 0) == {}


# bad input


@pytest.mark.parametrize(
    "config, message",
    [
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"guide": "teacher"}, "base_datafree"),
        ({"order": 0, "parts": {"e2e": 1, "mul": 1}}, "order 0"),
        ({"parts": {"e2e": 1}, "weights": {"rectification": 1.0}}, "e2e and adv rows"),
        ({"parts": {"e2e": 0}}, "one or more"),
        ({"parts": {"e2e": 1, "mul": -1}}, "one or more"),
        ({"parts": {"e2f": 1}}, "e2e"),
        ({"weights": {"rectify": 1.0}}, "did you mean 'rectification'"),
        ({"clamp": 0}, "clamp"),
        ({"order": 4}, "order"),
    ],
)
def test_bad_options_are_named(tiny_unet, config, message):
    with pytest.raises(UserError, match=message):
        load_recipe({**recipe(tiny_unet), "config": config})


def test_an_adapter_that_a_stock_pipeline_could_not_sample_is_refused(tiny_unet):
    with pytest.raises(UserError, match="write few"):
        assembled(tiny_unet, "lora", sampler="any")


def test_batches_are_cut_in_whole_groups(tiny_unet, tmp_path: Path):
    said = recipe(tiny_unet, parts={"e2e": 1, "mul": 2, "any": 2, "adv": 1})
    with pytest.raises(UserError, match="multiples of 6"):
        Trainer(load_recipe(said), tmp_path, show=False)
