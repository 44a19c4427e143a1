"""Phased consistency: edges, jumps, targets, the sampler that visits them, and the adversarial turns."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError

from fewstep.maths.paths import FlowPath, add_noise
from fewstep.methods.diffusion.pcm import PCM, Place
from fewstep.roles import RoleSpec, assemble
from tests.methods.trajectories import (
    BETAS,
    ROWS,
    assembled,
    draw,
    halves_agree,
    images,
    only,
    points,
    seated,
    table,
    touched,
)

F64 = torch.float64
PLAIN = {"guidance_scale": 1.0}


def pcm(path=None, **config):
    return seated(PCM(PCM.Config(**config)), path or FlowPath())


# phases


@pytest.mark.parametrize("phases", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("path", [table(), FlowPath(shift=3.0)])
def test_the_sampler_goes_from_edge_to_edge(path, phases):
    """Upper edges = the levels that are sampled at; lower edges = where those steps end, the last one at 0."""
    method = pcm(path, steps=(phases,), **PLAIN)
    at = method.place(draw(4000))
    visited = [*method.schedule().u, 0.0]
    for top, edge in pairwise(visited):
        inside = (at.top - top).abs() < 1e-12
        assert inside.float().mean().item() == pytest.approx(1 / phases, abs=0.05)
        assert (at.edge[inside] - edge).abs().max() < 1e-12
    assert ((at.edge <= at.u_next) & (at.u_next < at.u) & (at.u <= at.top)).all()
    assert (at.u == at.top).any() and (at.u_next == at.edge).any()


def test_the_edges_are_the_stock_schedulers_levels():
    """DDIM trailing on tables, Euler with sigmas 1, 1 - 1/N, ... on flow paths."""
    ddim = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    ddim.set_timesteps(4)
    assert (
        [round(1000 * u) for u in pcm(table(), **PLAIN).schedule().u] == ddim.timesteps.tolist() == [999, 749, 499, 249]
    )
    euler, path = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowPath(shift=3.0)
    euler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    levels = [path.time(u) for u in pcm(path, **PLAIN).schedule().u]
    assert levels == pytest.approx(euler.sigmas[:-1].tolist(), abs=1e-6)
    assert pcm(path, **PLAIN).schedule().kind == "ode"


# jumps and targets


@pytest.mark.parametrize("path", [table(), table("v_prediction"), FlowPath()])
def test_the_jump_is_ddim_to_the_edge(path):
    """alpha_e x0 + sigma_e eps in the network's own world; at t = 0 it is the clean prediction."""
    method, batch = pcm(path, **PLAIN), points()
    u, edge = torch.full((ROWS,), 0.6, dtype=F64), torch.tensor([0.5, 0.25, 0.0, 0.0] * 2, dtype=F64)
    t = path.time(u)
    x0 = method.student.x0(batch.x0, t.float(), batch.cond)
    eps = method.student.eps(batch.x0, t.float(), batch.cond)
    e = torch.where(edge > 0, path.time(edge), 0)[:, None]
    expected = (1 - e) * x0 + e * eps
    torch.testing.assert_close(method.jump(batch.x0, u, edge, batch.cond), expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("path", [table(), table("v_prediction"), FlowPath()])
def test_at_the_edge_the_jump_is_the_identity(path):
    """Whatever the network says, for every edge and for t = 0."""
    method, x = pcm(path, **PLAIN), points().x0
    edge = torch.tensor([0.75, 0.5, 0.25, 0.0] * 2, dtype=F64)
    assert torch.equal(method.jump(x, edge, edge, points().cond), x)


@pytest.mark.parametrize("path", [table(), FlowPath()])
def test_a_step_compares_two_jumps_to_one_edge(path):
    """huber( F(x_t, t), sg F(x_s, s) ) with x_s the teacher's DDIM step, guidance w + 1 drawn for each row."""
    method, batch, numbers = pcm(path), points(), draw()
    at, g = method.place(numbers), draw().uniform("guidance", low=5.0, high=6.0).double()

    def time(u):
        return torch.where(u > 0, path.time(u), 0)

    t, s = time(at.u), time(at.u_next)
    x = add_noise(batch.x0, numbers.normal("eps", 3).double(), t)
    null = batch.cond.with_(label=torch.full((ROWS,), 10))
    cond_v, null_v = (method.teacher.velocity(x, t.float(), c) for c in (batch.cond, null))
    below = x + (s - t)[:, None] * (null_v + g[:, None] * (cond_v - null_v))
    error = method.jump(x, at.u, at.edge, batch.cond) - method.jump(below, at.u_next, at.edge, batch.cond)
    expected = ((error**2 + 1e-6).sqrt() - 1e-3).mean(1)
    torch.testing.assert_close(only(method).losses["consistency"], expected, atol=2e-6, rtol=1e-5)


def test_the_target_takes_no_average():
    """An EMA, when a recipe keeps one for export, is not the target."""
    method = pcm(**PLAIN)
    before = only(method).losses["consistency"]
    handle = method.student.handle
    handle.ema = {n: torch.nn.Parameter(p.detach() + 1) for n, p in handle.trainable().items()}
    assert torch.equal(only(method).losses["consistency"], before)


def test_dropped_rows_are_unconditional_for_teacher_and_student():
    """label_dropout: a share of rows; the sampler may then be guided."""
    method = pcm(guidance_scale=1.0, label_dropout=0.3, sample_guidance=2.0)
    label = method.dropped(points().cond.with_(label=torch.arange(6000) % 10), draw(6000))["label"]
    assert (label == 10).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(label[label != 10], (torch.arange(6000) % 10)[label != 10])
    seen = []
    for net in (method.teacher.module, method.student.module):
        net.register_forward_hook(lambda _m, args, kwargs, _o: seen.append(kwargs["label"]), with_kwargs=True)
    only(method)
    assert len(seen) == 3 and all(torch.equal(s, seen[0]) for s in seen)
    assert (method.schedule().guidance, method.schedule().embedded) == (2.0, False)


# the discriminator


def adversarial(sizes, tune="lora", **config):
    return assembled(PCM(PCM.Config(adversarial=True, guidance_scale=1.0, **config)), sizes, tune)


def test_student_and_discriminator_take_turns(tiny_unet):
    """Even steps: consistency and adversarial terms for the student; odd ones: the heads."""
    method = adversarial(tiny_unet)
    even, odd = only(method, images()), only(method, images(), step=1)
    assert even.role_names == ("student",) and set(even.losses) == {"consistency", "adversarial"}
    assert odd.role_names == ("discriminator",) and set(odd.losses) == {"discriminator"}
    assert method.config.weights == {"adversarial": 0.1}


@pytest.mark.parametrize("step, trained", [(0, "student"), (1, "discriminator")])
def test_gradient_stays_with_the_turn(tiny_unet, step, trained):
    """The heads' loss reaches the heads alone; the student's flows through teacher and heads, held by `Update.roles`."""
    method = adversarial(tiny_unet)
    update = only(method, images(), step)
    parameters = list(getattr(method, trained).trainable().values())
    torch.autograd.backward(sum(r.mean() for r in update.losses.values()), inputs=parameters)
    assert all(p.grad is not None for p in parameters)
    assert touched(method.teacher.module) == 0
    other = {"student": method.discriminator.module, "discriminator": method.student.adapter}[trained]
    assert touched(other) == 0


def test_the_discriminator_sees_states_inside_the_phase(tiny_unet):
    """Edge states diffused to a level between the edge and the top of the phase, real and made with one noise."""
    method, seen = adversarial(tiny_unet), []
    method.teacher.features = lambda x, t, cond, layers: seen.append((x, t)) or [torch.zeros(len(x), 16, 4, 4)]
    method.discriminator = lambda features: features[0].mean((1, 2, 3))
    at, states = method.place(draw()), torch.zeros(ROWS, 1, 8, 8)
    real, made = method.logits([states, states], at, images().cond, draw(step=3))
    (x, t), u = seen[0], draw(step=3).uniform("adversarial.u", low=at.edge, high=at.top)
    assert torch.equal(x[:ROWS], x[ROWS:]) and len(real) == len(made) == ROWS
    assert ((t[:ROWS] > at.edge) & (t[:ROWS] <= at.top)).all() and torch.equal(t[:ROWS], u)
    s, t = at.edge, t[:ROWS].double()
    spread = (t**2 - ((1 - t) / (1 - s) * s) ** 2).sqrt()
    noise = draw(step=3).normal("adversarial.eps", 1, 8, 8)
    torch.testing.assert_close(x[:ROWS], (spread[:, None, None, None] * noise).float(), atol=1e-5, rtol=1e-5)


def test_adversarial_losses_are_hinge_and_margin():
    """D: relu(1 - real) + relu(1 + fake); student: relu(1 - fake)."""
    method = pcm(adversarial=False, **PLAIN)
    method.logits = lambda states, *_: tuple(torch.full((ROWS,), v) for v in (0.4, -0.3)[-len(states) :])
    method.config = PCM.Config(adversarial=True, **PLAIN)
    made = torch.zeros(ROWS, 3)
    update = method.student_update(made, made, None, None, None)
    assert update.losses["adversarial"].tolist() == pytest.approx([1.3] * ROWS)
    assert method.discrimination(made, made, None, None, None).tolist() == pytest.approx([0.6 + 0.7] * ROWS)


# roles and configuration


def test_the_student_is_a_rank_64_adapter_without_average():
    handles = assemble(PCM().roles(), {"teacher": RoleSpec(**{"from": "mlp"})}, seed=0)
    student = handles["student"]
    assert (student.tune, student.spec.lora.rank, student.spec.optimizer.lr, student.ema) == ("lora", 64, 5e-6, None)
    assert list(handles) == ["teacher", "student"]


@pytest.mark.parametrize(
    "said, reason",
    [
        ({"steps": (5,)}, "levels=48 must be a multiple of the 5 phases"),
        ({"steps": (2, 4)}, "at most 1 item"),
        ({"guidance_scale": (6.0, 5.0)}, "upside down"),
        ({"weights": {"adverserial": 1.0}}, "did you mean 'adversarial'"),
        ({"label_dropout": 1.0}, "less than 1"),
        ({"skip": 0.1}, "none"),
    ],
)
def test_bad_configuration_is_refused_with_the_reason(said, reason):
    with pytest.raises(ValidationError, match=f"(?i){reason}"):
        PCM.Config(**said)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_gradient_reaches_the_student_alone(tiny_unet, tune):
    method = assembled(PCM(PCM.Config(label_dropout=0.1)), tiny_unet, tune)
    only(method, images()).losses["consistency"].mean().backward()
    student = method.student.adapter if tune == "lora" else method.student.module
    assert touched(student) == len(list(student.parameters())) and touched(method.teacher.module) == 0


@pytest.mark.parametrize("config", [{}, {"label_dropout": 0.5}])
def test_rows_do_not_depend_on_their_micro_batch(config):
    assert halves_agree(pcm(**config))


def test_levels_below_the_lowest_phase_end_clean():
    """On tables the last target is the teacher's clean prediction (t = 0, not the entry k = 0), as in the exported DDIM."""
    method, batch = pcm(table(), **PLAIN), points()
    grid = torch.tensor([*method.grid(), 0.0], dtype=F64)
    last = torch.full((ROWS,), 47)
    at = Place(grid[last], grid[last + 1], torch.zeros(ROWS, dtype=F64), grid[last - 11])
    target = method.target_at(at, batch.x0, batch.cond, batch.cond, 1.0)
    t = method.exact_time(at.u)
    torch.testing.assert_close(target, method.teacher.x0(batch.x0, t.float(), batch.cond), atol=1e-6, rtol=1e-6)
