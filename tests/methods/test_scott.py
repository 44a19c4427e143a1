"""SCott (arXiv 2403.01505) on real network classes: what is called, who is trained, and what each option means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data.batch import Batch, Cond
from fewstep.draws import Draw
from fewstep.errors import UserError
from fewstep.maths.paths import FlowPath, VPPath
from fewstep.methods.base import Update
from fewstep.methods.diffusion.lcm import LCM
from fewstep.methods.diffusion.scott import SCott
from fewstep.models.build import parse
from fewstep.models.oracle import MLP
from fewstep.nets.lora import checkpointed
from fewstep.roles import RoleSpec, assemble
from tests.oracles.harness import backward, seat

ROWS = 6
VP = {"kind": "vp", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CALM = {"eta_range": (0.0, 0.98), "guidance_scale": 3.0}  # on flow paths: no noise from t = 1


def assembled(sizes: dict, method=SCott, tune: str = "full", student: dict | None = None, **config):
    """The method on a tiny UNet, its student and critics moved away from the teacher."""
    method = method(parse(method.Config, config, "config"))
    lora = {"rank": 2, "targets": "all"}
    specs = {
        "teacher": RoleSpec(**{"from": "unet2d", "build": sizes}),
        "student": RoleSpec(**{"tune": tune, "lora": lora, **(student or {})}),
        "discriminator": RoleSpec(lora=lora),
    }
    (stage,) = method.stages()
    handles = assemble([r for r in method.roles() if stage.uses is None or r.name in stage.uses], specs, seed=0)
    torch.manual_seed(1)
    for handle in handles.values():
        for p in handle.trainable().values():
            p.data.add_(0.02 * torch.randn_like(p))
    method.bind(handles, {}, {})
    return method


def points(path=None, **config) -> SCott:
    """The method without D on two small MLPs of points in the plane."""
    torch.manual_seed(0)
    method = SCott(parse(SCott.Config, {"adversarial": None, **CALM, **config}, "config"))
    return seat(method, {name: MLP.build(classes=10).module for name in ("teacher", "student")}, path)


def widen(method) -> None:
    """Networks and averages in float64: the distance's slope 1/c = 1000 makes float32 rounding of targets show."""
    for role in (method.teacher, method.student):
        role.module.double()
        for p in (role.ema or {}).values():
            p.data = p.data.double()


def images(rows: int = ROWS, double: bool = False) -> Batch:
    """Random pictures with labels."""
    ids = torch.arange(rows)
    x0 = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = x0.double() if double else x0
    return Batch(ids, {"cond": Cond(label=ids % 10), "x0": x0})


class Recorded(Draw):
    """Remembers what was drawn, by full name."""

    seen: dict[str, Tensor]

    def normal(self, name: str, *row_shape: int, per="row") -> Tensor:
        self.seen[self._full(name)] = super().normal(name, *row_shape, per=per)
        return self.seen[self._full(name)]


def draw(step: int = 0, rows: int = ROWS) -> Recorded:
    """The numbers of one step."""
    made = Recorded(5, step, np.arange(rows))
    made.seen = {}
    return made


def said(method, step: int = 0, batch: Batch | None = None) -> list[Update]:
    """The updates of a step whose roles are not stepped."""
    return list(method.train_step(batch if batch is not None else images(), draw(step)))


def gradients(method, update: Update, role: str = "student") -> list[Tensor]:
    """Of the weighted losses, by the role's parameters."""
    backward(method, update)
    return [p.grad.clone() for p in getattr(method, role).trainable().values()]


def values(*parts) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for part in parts for p in part.parameters()]


# LCM is a special case


@pytest.mark.parametrize("guidance", [1.0, 3.0, (2.0, 6.0)])
@pytest.mark.parametrize("path", [{"kind": "flow"}, {"kind": "flow", "shift": 3.0}, VP])
@pytest.mark.parametrize("solver", ["er_sde", "ddim_eta", "euler_maruyama", "sde_dpm_2"])
def test_one_step_without_noise_and_without_discriminator_is_lcm(tiny_unet, path, guidance, solver):
    """Property 7: eta = 0, h = 1, lambda = 0 on one grid and the same draws: losses and gradients of LCM to 1e-6."""
    common = {"guidance_scale": guidance, "embed_guidance": False, "levels": 20, "student": {"ema": 0.9}}
    sizes = {**tiny_unet, "path": path}
    mine = assembled(sizes, solver=solver, eta=0, substeps=1, skip=None, weights={"adversarial": 0}, **common)
    theirs = assembled(sizes, LCM, **common)
    for method in (mine, theirs):
        widen(method)
    (scott,), (lcm,) = said(mine, batch=images(double=True)), said(theirs, batch=images(double=True))
    torch.testing.assert_close(scott.losses["consistency"], lcm.losses["consistency"], rtol=0, atol=1e-6)
    assert lcm.losses["consistency"].min() > 1e-4
    for a, b in zip(gradients(mine, scott), gradients(theirs, lcm), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# who is trained


@pytest.mark.parametrize(
    "config, used",
    [
        ({"adversarial": None}, False),
        ({"weights": {"adversarial": 0}}, False),
        ({}, True),
        ({"weights": {"adversarial": {"linear": [0, 0.4], "over": 10}}}, True),
    ],
)
def test_without_a_weight_the_discriminator_is_neither_loaded_nor_trained(config, used):
    """A recipe may still speak of its roles, so that one override switches D off."""
    method = SCott(SCott.Config(**config))
    (stage,) = method.stages()
    critics = ("discriminator", "heads") if used else ()
    assert stage.uses == ("teacher", "student", *critics) and stage.trains == ("student", *critics)
    assert [r.name for r in method.roles()] == ["teacher", "student", "discriminator", "heads"]


def test_the_papers_values_are_the_defaults():
    """eta 1, h 3, k 24 of 1000, lambda .4, EMA .95, lr 8e-6 and 2e-5, rank 64; AdamW, clip 1."""
    method = SCott()
    c, roles = method.config, {r.name: r for r in method.roles()}
    assert (c.eta, c.substeps, c.skip, c.weights["adversarial"], c.huber_c) == (1, 3, 0.024, 0.4, 1e-3)
    assert roles["student"].defaults == {"ema": 0.95, "optimizer": {"lr": 8e-6}}
    assert roles["discriminator"].defaults == {"optimizer": {"lr": 2e-5}, "lora": {"rank": 64}}
    assert roles["heads"].defaults == {"optimizer": {"lr": 2e-5}}


def test_turns_of_student_and_discriminator(tiny_unet):
    """Every step has both, the student first, with terms and monitors of rows that carry no graph."""
    student, critic = said(assembled(tiny_unet, **CALM))
    assert student.role_names == ("student",) and critic.role_names == ("discriminator", "heads")
    assert set(student.losses) == {"consistency", "adversarial"} and set(critic.losses) == {"discriminator"}
    metrics = {**student.metrics, **critic.metrics}
    assert set(metrics) == {"x0_std", "logits_real", "logits_fake"}
    assert all(m.shape == (ROWS,) and not m.requires_grad for m in metrics.values())


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_discriminator_step_changes_adapter_and_heads_only(tiny_unet, tune):
    """Property 7 and pitfall 6: the teacher answers bit for bit as before, although D computes with its weights."""
    method = assembled(tiny_unet, tune=tune, **CALM)
    x, t, cond = torch.randn(ROWS, 1, 8, 8), torch.rand(ROWS), images().cond
    assert method.discriminator.module is method.teacher.module
    before = method.teacher.velocity(x, t, cond)
    critics = (method.discriminator.adapter, method.heads.module)
    others = (method.teacher.module, method.student.adapter or method.student.module)
    kept, old = values(*others), values(*critics)
    _, critic = said(method)
    backward(method, critic)
    torch.optim.SGD([p for part in critics for p in part.parameters()], lr=0.1).step()
    assert torch.equal(method.teacher.velocity(x, t, cond), before)
    assert all(torch.equal(a, b) for a, b in zip(kept, values(*others), strict=True))
    assert all(p.grad is None for part in others for p in part.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(old, values(*critics), strict=True)]
    assert changed[-2] and sum(changed) > 20  # the head, and the adapter up to the layer that is read


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_student_step_leaves_all_others_without_gradient(tiny_unet, tune):
    """The adversarial term flows through D's weights and the frozen teacher's and stays with the student."""
    method = assembled(tiny_unet, tune=tune, weights={"consistency": 0}, student={"ema": 0.5}, **CALM)
    student, _ = said(method)
    grads = gradients(method, student)
    assert all(torch.isfinite(g).all() for g in grads) and sum(g.abs().sum() for g in grads) > 0
    for part in (method.discriminator.adapter, method.heads.module):
        assert all(p.grad is None for p in part.parameters())
    if tune == "full":
        assert all(p.grad is None for p in method.teacher.module.parameters())
    assert all(p.grad is None for p in method.student.ema.values())


def test_three_adapters_share_one_base(tiny_unet):
    """A LoRA student: teacher, student and D are views of one network, and at step 0 the student is the teacher."""
    method = SCott(SCott.Config(**CALM))
    spec = RoleSpec(tune="lora", lora={"rank": 2, "targets": "all"})
    specs = {"teacher": RoleSpec(**{"from": "unet2d", "build": tiny_unet}), "student": spec, "discriminator": spec}
    method.bind(assemble(method.roles(), specs, seed=0), {}, {})
    assert method.teacher.module is method.student.module is method.discriminator.module
    x, t, cond = torch.randn(ROWS, 1, 8, 8), torch.rand(ROWS), images().cond
    assert torch.equal(method.student.velocity(x, t, cond), method.teacher.velocity(x, t, cond))


def test_with_the_adversarial_weight_at_zero_the_gradient_is_that_of_plain_consistency(tiny_unet):
    """Property 7: the same draws with and without D."""
    off = {"linear": [0.0, 0.4], "over": 10}  # 0 at this step, and D is there
    with_d = assembled(tiny_unet, weights={"adversarial": off}, **CALM)
    without = assembled(tiny_unet, adversarial=None, **CALM)
    for a, b in zip(gradients(with_d, said(with_d)[0]), gradients(without, said(without)[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_solver_and_target_have_no_graph(tiny_unet):
    """Property 7: teacher and EMA run without gradient, and the solver's output has none even if its input has."""
    method = assembled(tiny_unet, adversarial=None, student={"ema": 0.5}, **CALM)
    batch, numbers = images(), draw()
    at, x = method.interval(numbers), batch.x0.clone().requires_grad_()
    walked = method.walked(x, at, batch.cond, 3.0, numbers)
    assert not walked.requires_grad and not method.target(walked, at.u_next, batch.cond).requires_grad
    graphs = []
    hook = method.teacher.module.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    said(method)
    hook.remove()
    assert graphs == [False] * 3


@pytest.mark.parametrize("config, parts", [({}, 2), ({"guidance_scale": 1.0}, 1), ({"substeps": 5}, 2)])
def test_calls_of_a_step(tiny_unet, config, parts):
    """h calls of the teacher, two rows a sample when guided; the student once at u and once as the EMA at u_next."""
    method = assembled(tiny_unet, adversarial=None, **{**CALM, **config})
    seen: dict[str, list[int]] = {"teacher": [], "student": []}
    for role, rows in seen.items():
        network = getattr(method, role).module
        network.register_forward_hook(lambda _m, _a, out, rows=rows: rows.append(len(out[0])))
    said(method)
    assert seen == {"teacher": [parts * ROWS] * config.get("substeps", 3), "student": [ROWS, ROWS]}


# the solver's options


def test_every_noise_of_a_step_is_independent(tiny_unet):
    """Pitfall 3: eps of x_n, z of each sub-step, and what D's inputs are noised with have addresses of their own."""
    method = assembled(tiny_unet, disc_input="renoise", weights={"r1": 10.0}, **CALM)
    rows, numbers = 40, draw(rows=40)
    list(method.train_step(images(rows), numbers))
    names = {"eps", "solver.0", "solver.1", "solver.2", "fooling.eps", "real.eps", "made.eps", "r1"}
    assert numbers.seen.keys() == names
    table = torch.stack([n.flatten() for n in numbers.seen.values()])
    assert (torch.corrcoef(table) - torch.eye(len(names))).abs().max() < 5 / table.shape[1] ** 0.5


def test_noise_acts_within_its_range_of_levels_only():
    """eta_range on the clock: sub-steps that start outside are ODE steps, whatever z is."""
    method = points(eta_range=(0.2, 0.7), substeps=1, path=FlowPath(shift=3.0))
    t = method.path.time(torch.tensor([0.1, 0.2, 0.5, 0.7, 0.8, 1.0], dtype=torch.float64))
    assert method.within_range(t, 0.6).tolist() == [0, 0.6, 0.6, 0.6, 0, 0]
    x, cond = torch.zeros(2, 2), Cond(label=torch.zeros(2, dtype=torch.long))
    u = torch.tensor([0.9, 0.5], dtype=torch.float64)
    at = type(method.interval(draw(rows=2)))(u, u - 0.1)
    a, b = (method.walked(x, at, cond, 1.0, draw(step, rows=2)) for step in (0, 1))
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])


def test_eta_substeps_and_skip_may_change_over_training():
    """A schedule of each: h rounds; k widens the interval; eta 0 at first makes the walk deterministic."""
    ramp = {"over": 10}
    method = points(
        eta={"linear": [0, 1], **ramp}, substeps={"linear": [1, 3], **ramp}, skip={"linear": [0.01, 0.2], **ramp}
    )
    batch = Batch(torch.arange(ROWS), {"cond": images().cond, "x0": torch.randn(ROWS, 2)})
    calls = []
    method.teacher.module.register_forward_hook(lambda *_: calls.append(1))
    for step, h, k in ((0, 1, 0.01), (3, 2, 0.067), (10, 3, 0.2), (99, 3, 0.2)):
        calls.clear()
        said(method, step, batch)
        at = method.interval(draw(step))
        assert len(calls) == h
        torch.testing.assert_close((at.u - at.u_next)[at.u > k], torch.full_like(at.u, k)[at.u > k])
    at = method.interval(draw(0))
    first = method.walked(batch.x0, at, batch.cond, 1.0, draw(0))
    method.config = method.config.model_copy(update={"eta": 0.0, "substeps": 1.0})
    assert torch.equal(first, method.walked(batch.x0, at, batch.cond, 1.0, draw(0)))


@pytest.mark.parametrize("path, count, width", [(VPPath.from_scheduler({}), 1000, 24), (FlowPath(), 1000, 0.024)])
def test_the_grid_has_every_entry_of_the_table_and_intervals_of_24(path, count, width):
    """k = 24 of 1000 timesteps, ending at 0 and not below; three sub-steps of 8."""
    method = points(path, eta=0)
    assert len(method.grid()) == count == len(set(method.grid()))
    at = method.interval(draw(rows=500))
    scale = 1000 if isinstance(path, VPPath) else 1
    torch.testing.assert_close(at.u_next * scale, (at.u * scale - width).clamp_min(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", [FlowPath(), VPPath.from_scheduler({})])
def test_at_time_zero_f_is_the_identity(path):
    """Property 8: f(x, 0) = x in native variables, so a target at 0 is where the solver arrived."""
    method, x = points(path, eta=0), torch.randn(ROWS, 2)
    zero = torch.zeros(ROWS, dtype=torch.float64)
    native = path.native(x, method.time(zero))
    torch.testing.assert_close(method.f(method.student, x, zero, images().cond), native, rtol=1e-5, atol=1e-5)


# the discriminator's options


@pytest.mark.parametrize("path", [{"kind": "flow"}, VP])
def test_clean_input_is_the_sample_itself_with_the_students_level(tiny_unet, path):
    """The network is fed x0 as its native state, labelled with t_n, and no guidance; only the condition."""
    method = assembled({**tiny_unet, "path": path}, eta=0.5, **CALM)
    fed: list[dict] = []
    pack = method.discriminator.family.pack
    method.discriminator.family = type("Spy", (type(method.discriminator.family),), {
        "pack": lambda self, module, x, timestep, cond: fed.append({"x": x, "k": timestep, "cond": cond})
        or pack(module, x, timestep, cond)
    })()  # fmt: skip
    batch = images()
    said(method, batch=batch)
    k = method.path.timestep(method.time(method.interval(draw()).u))
    assert [len(call["x"]) for call in fed] == [ROWS, 2 * ROWS]
    torch.testing.assert_close(fed[1]["x"][:ROWS], batch.x0)
    torch.testing.assert_close(fed[1]["k"], k.repeat(2))
    torch.testing.assert_close(fed[0]["x"], fed[1]["x"][ROWS:])  # what the student made, both times
    assert all(set(call["cond"]) == {"label"} for call in fed)


def test_discriminator_is_not_told_the_guidance():
    """Pitfall 8: a student that reads the guidance, and a D that does not."""
    method = points(guidance_scale=(2.0, 8.0))
    told = method.told(images().cond, torch.full((ROWS,), 3.0))
    assert set(told) == {"label", "guidance"}
    asked = []
    method.discriminator = type(
        "D", (), {"features": lambda self, x, t, cond, layers: asked.append(set(cond)) or [x]}
    )()
    method.heads = lambda features: features[0].sum(1)
    batch = Batch(torch.arange(ROWS), {"cond": images().cond, "x0": torch.randn(ROWS, 2)})
    method.config = method.config.model_copy(update={"adversarial": "hinge"})
    said(method, batch=batch)
    assert asked == [{"label"}, {"label"}]


def test_renoised_input_has_one_level_and_two_noises(tiny_unet):
    """alpha_tau x + sigma_tau e: tau uniform on the grid and the same for both, e independent."""
    method = assembled(tiny_unet, disc_input="renoise", **CALM)
    batch, numbers = images(), draw()
    at = method.interval(numbers)
    t = method.judged_at(at, numbers)
    assert not torch.equal(t, method.time(at.u))
    for name in ("real", "made"):
        eps = draw().within(name).normal("eps", 1, 8, 8)
        expected = (1 - t).view(-1, 1, 1, 1) * batch.x0 + t.view(-1, 1, 1, 1) * eps
        torch.testing.assert_close(method.shown(batch.x0, t, numbers.within(name)), expected)


@pytest.mark.parametrize(
    "kind, generator, discriminator",
    [
        ("hinge", lambda f: -f, lambda r, f: torch.relu(1 - r) + torch.relu(1 + f)),
        ("linear", lambda f: -f, lambda r, f: f - r),
        ("softplus", lambda f: torch.log1p(torch.exp(-f)), lambda r, f: torch.log1p(torch.exp(-r)) + torch.log1p(torch.exp(f))),
    ],
)  # fmt: skip
def test_adversarial_losses_are_those_of_the_logits(tiny_unet, kind, generator, discriminator):
    """-D(fake) for the student; the objectives of D by name."""
    method = assembled(tiny_unet, adversarial=kind, weights={"r1": 1.0}, **CALM)
    student, critic = said(method)
    real, fake = critic.metrics["logits_real"], critic.metrics["logits_fake"]
    torch.testing.assert_close(student.losses["adversarial"], generator(fake))
    torch.testing.assert_close(critic.losses["discriminator"], discriminator(real, fake))


@pytest.mark.parametrize("disc_input", ["clean", "renoise"])
def test_r1_grows_with_the_square_of_ds_slope(tiny_unet, disc_input):
    """|D(x) - D(x + 0.1 n)|^2: a head twice as steep pays four times."""
    method = assembled(tiny_unet, disc_input=disc_input, weights={"r1": 1.0}, **CALM)
    once = said(method)[1].losses["r1"]
    for p in method.heads.module.parameters():
        p.data.mul_(2)
    torch.testing.assert_close(said(method)[1].losses["r1"], 4 * once, rtol=1e-4, atol=1e-9)
    assert (once > 0).all()


@pytest.mark.parametrize("heads", ["mean", "conv"])
@pytest.mark.parametrize("layers", [None, ("down_blocks.1.resnets.0", "mid_block")])
def test_heads_read_the_layers_asked_for(tiny_unet, heads, layers):
    """One head a layer, of either kind."""
    method = assembled(tiny_unet, heads=heads, layers=layers, **CALM)
    assert len(method.heads.module.heads) == (1 if layers is None else 2)
    assert all(torch.isfinite(rows).all() for update in said(method) for rows in update.losses.values())


def test_gradients_through_a_checkpointed_discriminator_are_the_same(tiny_unet):
    """Activation checkpointing recomputes D's blocks with D's adapter, up to the layer where its forward stops."""
    grads = []
    for checkpointing in (False, True):
        method = assembled(tiny_unet, **CALM)
        if checkpointing:
            checkpointed(method.discriminator.module)
        student, critic = said(method)
        grads.append([*gradients(method, student), *filled(method, critic)])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def filled(method, critic: Update) -> list[Tensor]:
    """D's gradients; parameters behind the layer that is read have none."""
    backward(method, critic)
    parts = (method.discriminator, method.heads)
    return [p.grad for part in parts for p in part.trainable().values() if p.grad is not None]


# bad input


@pytest.mark.parametrize(
    "config",
    [
        {"eta": 1.0},
        {"eta": 0.1},
        {"eta": {"linear": [0, 0.3], "over": 5}},
        {"eta": {"exponential": [0.5, 0.01], "over": 5}},
        {"eta": 0.5, "solver": "sde_dpm_2"},
        {"eta": 0.5, "solver": "euler_maruyama"},
        {"eta": 1.0, "solver": "ddim_eta"},
    ],
)
def test_noise_at_pure_noise_is_refused_with_the_mend(config):
    """Pitfall 2: from alpha = 0 the exact step forgets the state; also where a schedule gets there later."""
    with pytest.raises(
        UserError, match=r"at t = 1, .*config.eta_range=\[0, 0.98\].* ddim_eta with eta below 1, or eta 0"
    ):
        points(**{"eta_range": (0.0, 1.0), **config})


@pytest.mark.parametrize(
    "config",
    [
        {"eta": 1.0, "eta_range": (0.0, 0.98)},
        {"eta": 0.99, "solver": "ddim_eta", "eta_range": (0.0, 1.0)},
        {"eta": 0.0, "eta_range": (0.0, 1.0)},
        {"eta": 1.0, "eta_range": (0.0, 1.0), "path": VPPath.from_scheduler({})},
        {"eta": 1.0, "eta_range": (0.0, 1.0), "path": FlowPath(t_max=0.98)},
    ],
)
def test_what_the_refusal_recommends_runs_and_is_finite(config):
    """The mends on a flow path; DDPM tables end before alpha = 0 and are never refused."""
    method = points(**{"eta_range": (0.0, 1.0), **config})
    batch = Batch(torch.arange(64), {"cond": Cond(label=torch.zeros(64).long()), "x0": torch.randn(64, 2)})
    (update,) = method.train_step(batch, draw(rows=64))
    assert torch.isfinite(update.losses["consistency"]).all()


def test_a_table_that_ends_at_zero_signal_is_refused_too():
    """Zero terminal SNR: alpha = 0 at the last entry."""
    table = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    with pytest.raises(UserError, match="forgets the state"):
        points(VPPath.from_scheduler(table), eta=1.0, eta_range=(0.0, 1.0))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"adversarial": "linear"}, "no bound on D: add a penalty, weights.r1=10, or choose hinge"),
        ({"solver": "er_sd"}, "er_sde"),
        ({"solver": "ddim_eta", "eta": 1.2}, "ddim_eta takes eta up to 1"),
        ({"eta": -0.1}, "must not be negative"),
        ({"eta_range": [0.9, 0.1]}, "must increase within"),
        ({"substeps": 0}, "at least 1"),
        ({"substeps": {"linear": [0, 3], "over": 9}}, "at least 1"),
        ({"skip": 1.0}, "between 0 and 1"),
        ({"weights": {"advers": 1.0}}, "no loss term 'advers'.*adversarial"),
        ({"guidance_scale": [9, 4]}, "upside down"),
    ],
)
def test_bad_config_is_refused_with_the_mend(config, message):
    with pytest.raises(UserError, match=message):
        parse(SCott.Config, config, "config")


def test_linear_without_discriminator_or_with_penalty_is_allowed():
    for config in ({"weights": {"r1": 5}}, {"weights": {"adversarial": 0}}):
        assert parse(SCott.Config, {"adversarial": "linear", **config}, "config").adversarial == "linear"
