"""SiD of chains: rollout, laws of noise levels, weights, masks, who gets gradient, resets, and the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.data.batch import Batch, Cond
from fewstep.maths.solvers import rollout, sample
from fewstep.methods.base import Event
from fewstep.methods.diffusion.sid import sid_terms
from fewstep.methods.protein.sid_protein import SiDProtein
from fewstep.models.protein_flow import centred
from fewstep.recipe import load_recipe
from tests.oracles.harness import backward

from .networks import assembled, draw, lengths

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def gradients(method: SiDProtein, role: str) -> list[torch.Tensor | None]:
    """Of a role's parameters."""
    return [p.grad for p in getattr(method, role).handle.module.parameters()]


# ---- levels


def test_the_first_input_has_the_noise_of_the_first_level_and_no_signal():
    """Standard deviation .708 sqrt(1 - 1 / n), as centring takes a part of it."""
    method, seen = assembled(SiDProtein, steps=4), []
    batch = lengths(*[24] * 64)
    role = method.student
    plain = role.x0
    role.x0 = lambda x, t, cond: seen.append((x, t)) or plain(x, t, cond)
    rollout(role, method.schedule_for(4), batch.cond, draw(rows=64), role.shape(batch.cond), until=1)
    x, t = seen[0]
    assert torch.allclose(t, torch.full_like(t, 10**-0.15))
    assert x.std(correction=0).item() == pytest.approx(10**-0.15 * (1 - 1 / 24) ** 0.5, rel=0.02)


def test_levels_of_the_losses_have_the_laws_of_the_paper():
    """Student: log-uniform, 15 % at the lower bound. Fake model: 1 - t of .98 Beta(1.9, 1) + .02 U, within bounds."""
    method, numbers = assembled(SiDProtein), draw(rows=40_000)
    t = method.level(numbers.within("student"))
    assert (t == t.min()).float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (t.min().item(), t.max().item()) == (pytest.approx(0.02), pytest.approx(0.98))
    inside = t[(t > 0.02) & (t < 0.98)].log10()
    assert inside.mean().item() == pytest.approx((0 - 1.7) / 2, abs=0.02)  # as many in each decade
    tau = 1 - method.fake_level(numbers.within("fake"))
    assert tau.mean().item() == pytest.approx(0.98 * 1.9 / 2.9 + 0.02 * 0.5, abs=0.01)
    assert (tau.min().item(), tau.max().item()) == (pytest.approx(0.02), pytest.approx(0.98))


# ---- losses


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_both_forms_of_the_loss_are_one(alpha):
    """d ((y_r - x) - alpha d) = (1 - alpha) d^2 + d (y_f - x), element by element."""
    x, real, fake = torch.randn(3, 2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    d = real - fake
    torch.testing.assert_close(sid_terms(x, real, fake, alpha), (1 - alpha) * d**2 + d * (fake - x))


def _gaussian_gradients(a: float, b: float, m: float, s: float, t: float, alpha: float) -> tuple[float, float]:
    """d/da and d/db of the loss of x_g = a z + b with closed-form denoisers of N(m, s^2) and, held fixed, N(b, a^2)."""
    z, eps = torch.randn(2, 400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    scale.requires_grad_(), shift.requires_grad_()

    def denoise(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
        return mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)

    made = scale * z + shift
    x = (1 - t) * made + t * eps
    loss = sid_terms(made, denoise(x, m, s), denoise(x, b, a), alpha).mean()
    return tuple(g.item() for g in torch.autograd.grad(loss, (scale, shift)))  # type: ignore[return-value]


def _share(x: float, t: float) -> float:
    return t**2 / ((1 - t) ** 2 * x**2 + t**2)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_gradients_on_gaussians_are_the_closed_form(alpha):
    """a = s: dL/db = -c_s^2 (m - b) for every alpha; b = m: dL/da = 2 a (1-t) D [(1-alpha)(1-t) D - c_a]."""
    t, s = 0.4, 1.0
    _, shift = _gaussian_gradients(1.0, 0.5, 1.5, s, t, alpha)
    assert shift == pytest.approx(-(_share(s, t) ** 2), rel=0.02)
    scale, _ = _gaussian_gradients(1.6, 0.0, 0.0, s, t, alpha)
    c_a, c_s = _share(1.6, t), _share(s, t)
    assert scale == pytest.approx(2 * 1.6 * (c_a - c_s) * ((1 - alpha) * (c_a - c_s) - c_a), rel=0.02)


def test_above_alpha_one_the_gradient_turns_where_the_model_is_far_too_wide():
    """Wrong sign beyond A(a) / A(s) = alpha / (alpha - 1) = 6 for 1.2, never for 1."""
    t, s = 0.3, 1.0

    def width(ratio: float) -> float:
        return ((ratio * ((1 - t) ** 2 * s**2 + t**2) - t**2) / (1 - t) ** 2) ** 0.5

    signs = {
        (ratio, alpha): _gaussian_gradients(width(ratio), 0.0, 0.0, s, t, alpha)[0] > 0
        for ratio in (5.0, 7.0)
        for alpha in (1.0, 1.2)
    }
    assert signs == {(5.0, 1.0): True, (7.0, 1.0): True, (5.0, 1.2): True, (7.0, 1.2): False}


def test_equal_networks_leave_nothing_to_learn():
    """Teacher = fake model: loss and gradient of the student are 0."""
    method = assembled(SiDProtein, steps=2)
    method.fake_score.handle.module.load_state_dict(method.teacher.handle.module.state_dict())
    update = method.student_update(lengths(16, 24), draw())
    assert update.losses["sid"].abs().max() == 0
    backward(method, update)
    assert all(g is None or g.abs().max() < 1e-4 for g in gradients(method, "student"))  # of a loss times 100


def test_sum_over_n_counts_a_chain_of_n_residues_one_nth():
    """W is n times that of `mean`."""
    weights = {}
    for weight in ("mean", "sum_over_n"):
        method = assembled(SiDProtein, weight=weight)
        cond = lengths(8, 24).cond
        noise = torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0))
        x0, real = centred(noise, cond["mask"]), torch.zeros(2, 24, 3)
        weights[weight] = method.normaliser(x0, real, torch.full((2,), 0.5), cond)
    torch.testing.assert_close(weights["sum_over_n"] / weights["mean"], torch.tensor([8.0, 24.0]))


# ---- who gets gradient


def test_each_update_trains_its_own_role_and_only_the_drawn_step_has_a_graph():
    """The student's loss runs through both other networks and leaves nothing in them."""
    method = assembled(SiDProtein, steps=4)
    fake, student = method.train_step(lengths(16, 24), draw())
    backward(method, student)
    assert any(g is not None and g.any() for g in gradients(method, "student"))
    assert all(g is None for g in gradients(method, "fake_score") + gradients(method, "teacher"))
    for p in method.student.handle.module.parameters():
        p.grad = None
    backward(method, fake)
    assert all(g is None for g in gradients(method, "student") + gradients(method, "teacher"))
    assert any(g is not None and g.any() for g in gradients(method, "fake_score"))
    calls, plain = [], method.student.x0
    method.student.x0 = lambda x, t, cond: calls.append(torch.is_grad_enabled()) or plain(x, t, cond)
    method.generate(lengths(16, 24).cond, draw(7), graph=True)
    assert calls[-1] and not any(calls[:-1])


# ---- padding


def test_a_padded_chain_gives_the_losses_of_the_chain_alone():
    """With the same noise on its residues; padding stays 0 and the centre of mass at 0 in every step."""
    method = assembled(SiDProtein, steps=3)
    noise = {}

    class Fixed:
        """Noise of the residues by name, whatever the padding."""

        def __init__(self, inner, most):
            self.inner, self.most = inner, most

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def within(self, name):
            return Fixed(self.inner.within(name), self.most)

        def normal(self, name, *shape, **said):
            if len(shape) != 2:
                return self.inner.normal(name, *shape, **said)
            key = (self.inner._scope, name)
            full = noise.setdefault(key, torch.randn(1, 40, 3, generator=torch.Generator().manual_seed(len(noise))))
            return full[:, : shape[0]].clone()

    losses = []
    for most in (16, 40):
        numbers = Fixed(draw(3, rows=1), most)
        updates = list(method.train_step(lengths(16, most=most), numbers))
        losses.append(torch.stack([v for update in updates for v in update.losses.values()]))
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-5, atol=1e-6)
    cond = lengths(16, 33, most=40).cond
    x = sample(method.student, method.schedule_for(3), cond, draw(), (40, 3))
    assert not x[~cond["mask"]].any() and x.sum(1).abs().max() / 16 < 1e-6


def test_the_rollout_of_an_exact_gaussian_denoiser_has_the_variance_of_the_recursion():
    """P_i = g_i^2 [(1 - t_i)^2 P_{i-1} + t_i^2], below the data's variance."""
    method, std = assembled(SiDProtein, steps=8), 0.6
    role, cond = method.student, lengths(*[32] * 400).cond

    def exact(x, t, cond):
        x, t = role.project(x, cond), t[:, None, None]
        return (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * x

    role.x0 = exact
    schedule = method.schedule_for(8)
    made = sample(role, schedule, cond, draw(rows=400), (32, 3))
    variance = 0.0
    for u in schedule.u:
        t = method.path.time(u)
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        variance = gain**2 * ((1 - t) ** 2 * variance + t**2)
    assert made.var(correction=0).item() == pytest.approx(variance * (1 - 1 / 32), rel=0.02)
    assert variance < std**2


# ---- resets, schedule, recipes


def test_the_fake_model_is_the_teacher_again_after_so_many_samples():
    """Counted in samples; learning rates of both start anew."""
    method, rewound = assembled(SiDProtein, fake_reset=48), []
    for name in ("student", "fake_score"):
        getattr(method, name).handle.rewind = lambda name=name: rewound.append(name)
    teacher = method.teacher.handle.module.state_dict()

    def equal() -> bool:
        return all(torch.equal(v, teacher[k]) for k, v in method.fake_score.handle.module.state_dict().items())

    assert not equal()
    method.on(Event("step_end", "train", 2, rows=16))
    assert not equal() and not rewound
    method.on(Event("step_end", "train", 3, rows=16))
    assert equal() and set(rewound) == {"student", "fake_score"}


def test_the_exported_schedule_is_the_grid_with_less_noise():
    """Factor .45 of the noise's standard deviation, in every step and the first one."""
    method = assembled(SiDProtein, steps=[8, 16])
    schedule = method.schedule()
    assert (schedule.kind, schedule.steps, schedule.noise_scale) == ("renoise", 16, 0.45)
    assert method.steps_offered() == (8, 16)


@pytest.mark.parametrize("name", ["chains", "proteina_200m"])
def test_recipes_are_sound(name):
    """They say no teacher that has to be there."""
    recipe = load_recipe(CONFIGS / "sid_protein" / f"{name}.yaml")
    assert recipe.build_method().config.alpha == 1.0
    assert recipe.method == "sid_protein"


def test_a_method_without_lengths_cannot_be_fed_pictures():
    """What is asked for is named."""
    method = assembled(SiDProtein)
    with pytest.raises(KeyError, match="mask"):
        list(method.train_step(Batch(torch.arange(2), {"cond": Cond()}), draw()))
