"""RG-LCD: what each option means (Li et al., arXiv 2403.11027)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.maths.scalars import Ramp
from fewstep.maths.spectrum import high_frequency_share
from fewstep.methods.base import Event
from fewstep.methods.diffusion.rg_lcd import RGLCD
from fewstep.models.build import parse
from fewstep.nets.latent_reward import preference_rows
from fewstep.rewards.base import Asked
from tests.engine.toy import UNET, trained
from tests.methods.rewarded import ROWS, LinearDecoder, Mean, draw, points, rows, step
from tests.oracles.harness import train

RECIPE = {
    "teacher": {"from": "unet2d", "build": UNET},
    "student": {"tune": "full", "optimizer": {"lr": 1e-2}, "ema": 0.95},
    "data": {"train": {"source": "digits"}},
    "train": {"steps": 3, "batch": 8, "log_every": 1},
}
COMMON = {"levels": 6, "guidance_scale": 1.5, "steps": [1, 2]}


def run(folder: Path, method: str = "rg_lcd", config: dict | None = None, **said):
    """A few steps on real digits."""
    own = {"reward": "classifier"} if method == "rg_lcd" else {}
    return trained({"method": method, **RECIPE, **said, "config": {**COMMON, **own, **(config or {})}}, folder)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# without a reward it is LCM


@pytest.mark.parametrize(
    "config", [{"weights": {"reward": 0}}, {"reward_start": 3}], ids=["beta 0", "before the start"]
)
def test_without_a_reward_every_number_is_that_of_lcm(tmp_path, config):
    """Property 9: same draws, losses, parameters and averages, bit for bit; and the reward is not even computed."""
    ours, lcm = run(tmp_path / "a", config=config), run(tmp_path / "b", "lcm")
    for role in ("teacher", "student"):
        assert same(ours.handles[role].module.state_dict(), lcm.handles[role].module.state_dict())
    assert same(ours.handles["student"].ema, lcm.handles["student"].ema)
    lines = [(t.folder / "metrics.jsonl").read_text().splitlines() for t in (ours, lcm)]
    strip = [[line[line.index('"x0_std"') :] for line in said] for said in lines]
    assert strip[0] == strip[1] and "reward" not in "".join(strip[0])


def test_reward_free_branch_is_lcm_whatever_the_reward_does(tmp_path):
    """clean_target: `plain` ends where LCM's student ends, bit for bit, beside a student that left it."""
    ours = run(tmp_path / "a", config={"clean_target": True, "weights": {"reward": 5.0}})
    lcm = run(tmp_path / "b", "lcm").handles["student"]
    assert same(ours.handles["plain"].state(), lcm.state()) and same(ours.handles["plain"].ema, lcm.ema)
    assert not same(ours.handles["student"].state(), lcm.state())


def test_average_after_one_step_is_95_parts_old_and_5_new(tmp_path):
    """Property 9: theta_ema = .95 a + .05 b after one step from a to b."""
    student = run(tmp_path, train={"steps": 1, "batch": 8}).handles["student"]
    before = run(tmp_path / "frozen", train={"steps": 1, "batch": 8}, student={"optimizer": {"lr": 0.0}, "ema": 0.95})
    old = before.handles["student"].trainable()
    moved = 0.0
    for name, new in student.trainable().items():
        torch.testing.assert_close(student.ema[name], 0.95 * old[name] + 0.05 * new, rtol=1e-6, atol=1e-7)
        moved = max(moved, (new - old[name]).abs().max().item())
    assert moved > 5e-3


PROXY = {"mode": "proxy", "reward_start": 1, "proxy": {"width": 16, "depth": 1, "patch": 4, "embed": 8}}


@pytest.mark.parametrize("config", [{}, PROXY], ids=["direct", "proxy"])
def test_micro_batches_change_no_update(tmp_path, config):
    """1 x 8 = 2 x 4 rows: losses are averaged over the rows of the step, pairs of the proxy stay within a row."""
    sgd = {"name": "sgd", "lr": 0.1, "momentum": 0.0}  # Adam's first steps are signs, which rounding may turn
    said = {"student": {"optimizer": sgd}} | ({"proxy": {"optimizer": sgd}} if config else {})
    whole = run(tmp_path / "a", config=config, **said, train={"steps": 3, "batch": 8})
    cut = run(tmp_path / "b", config=config, **said, train={"steps": 3, "batch": 8, "micro_batch": 4})
    for role in ("student", "proxy") if config else ("student",):
        other = cut.handles[role].trainable()
        for name, p in whole.handles[role].trainable().items():
            torch.testing.assert_close(p, other[name], rtol=1e-5, atol=1e-6)


# the reward's path


def test_reward_reaches_the_prediction_through_decoder_and_clamp():
    """Property 5: d L / d z = -beta D^T 1 / (2 numel scale) inside [-1, 1], and nothing outside."""
    decoder, beta = LinearDecoder(scale=0.5), 3.0
    method = points(around=decoder, weights={"reward": beta})
    z = (0.8 * torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(1))).requires_grad_()
    losses, _ = method.rewarded(z, torch.ones(ROWS), rows(), 0)
    (beta * losses["reward"].mean()).backward()
    inside = ((z.detach() / 0.5 @ decoder.matrix).abs() < 1).float()
    assert 0.2 < inside.mean() < 0.9
    torch.testing.assert_close(z.grad, -beta * inside @ decoder.matrix.T / (2 * inside.numel() * 0.5))


@pytest.mark.parametrize("config", [{}, {"mode": "proxy", "proxy": {"from": "elsewhere"}}, {"clean_target": True}])
def test_only_the_student_gets_a_gradient_from_its_update(config):
    """Property 5: reward model, VAE, teacher, average, proxy and reward-free student receive none; the student does."""
    decoder = LinearDecoder()
    method = points(around=decoder, ema=0.95, **config)
    update = next(method.train_step(rows(), draw(0)))
    assert update.roles == "student" and set(update.losses) == {"consistency", "reward"}
    students = list(method.student.trainable().values())
    torch.autograd.backward(sum(r.mean() for r in update.losses.values()), inputs=students)
    assert all(p.grad is not None for p in students)
    others = [decoder.matrix, *method.student.ema.values(), *method.teacher.module.parameters()]
    for name in {"reward", "proxy", "plain"} & vars(method).keys():
        others += getattr(method, name).module.parameters()
    assert all(p.grad is None for p in others)


def test_only_the_first_rows_are_rewarded_and_their_mean_counts():
    """reward_rows: a term of so many rows, whose mean estimates the same expectation."""
    updates = step(proxied(reward_rows=2, reward_start=0, weights={"reward": Ramp(linear=(1, 2), over=9)}))
    assert {name: len(rows) for name, rows in updates["proxy"].losses.items()} == {"proxy": 2}
    assert len(step(proxied(reward_rows=99))["proxy"].losses["proxy"]) == ROWS  # a last, smaller micro-batch
    update = step(points(reward_rows=2))["student"]
    assert update.losses["consistency"].shape == (ROWS,) and update.losses["reward"].shape == (2,)
    torch.testing.assert_close(update.losses["reward"], step(points())["student"].losses["reward"][:2])


def test_rows_outside_of_the_band_have_no_reward_and_no_gradient():
    """reward_band: clock values of levels, 1 = noise; shapes stay."""
    method = points(reward_band=(0.25, 0.5))
    z = torch.zeros(5, 2).requires_grad_()
    losses, metrics = method.rewarded(z, torch.tensor([0.125, 0.25, 0.375, 0.5, 0.625]), rows(5), 0)
    losses["reward"].sum().backward()
    assert losses["reward"].shape == metrics["reward"].shape == (5,)
    assert (z.grad != 0).all(1).tolist() == (losses["reward"] != 0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(
    "config, on",
    [
        ({"reward_start": 3}, [False, False, False, True, True]),
        ({"weights": {"reward": Ramp(linear=(0, 1), over=4)}}, [False, True, True, True, True]),
    ],
)
def test_reward_begins_when_it_is_asked_to(config, on):
    """Nothing is decoded while beta is 0; beta may be a schedule."""
    decoder = LinearDecoder()
    method = points(around=decoder, **config)
    for number, wanted in enumerate(on):
        decoder.calls.clear()
        assert ("reward" in step(method, number)["student"].losses) == wanted
        assert decoder.calls == [ROWS] * wanted


# the proxy


def proxied(**config):
    """Proxy mode with an expert that has no derivative."""
    reward = config.pop("expert", None) or Mean(differentiable=False)
    return points(reward, LinearDecoder(), **{"mode": "proxy", "reward_start": 1, **config})


def test_student_follows_the_proxy_s_cosine():
    """L_R = -cos(proxy_image(z), proxy_condition(c)); the expert is not asked and nothing is decoded for it."""
    method = proxied()
    z = torch.randn(ROWS, 2)
    method.student.around.calls.clear()
    losses, metrics = method.rewarded(z, torch.ones(ROWS), rows(), 1)
    torch.testing.assert_close(losses["reward"], -method.proxy(z, rows().cond)[0][0])
    assert set(metrics) == {"proxy_reward"} and method.student.around.calls == []


class Remembering(Mean):
    """Keeps what it was shown."""

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        self.seen = (images, asked)
        assert not torch.is_grad_enabled()
        return super().score(images, asked)


@pytest.mark.parametrize("contrast", [False, True])
def test_proxy_learns_from_latents_that_are_all_judged_for_the_row_s_own_condition(contrast):
    """E and P of [prediction; target; x0] and, with contrast, of the neighbour's x0: latents move, captions never do."""
    expert = Remembering(differentiable=False)
    method = proxied(expert=expert, proxy={"expert_scale": 40.0, "contrast": contrast})
    prediction, target, batch = torch.randn(ROWS, 2), torch.randn(ROWS, 2), rows()
    update = method.proxy_update(prediction, target, batch)
    shown = [prediction, target, batch.x0] + ([batch.x0[[1, 0, 3, 2, 5, 4]]] if contrast else [])
    images, asked = expert.seen
    torch.testing.assert_close(images, method.images(torch.cat(shown)))
    assert asked.labels.tolist() == batch.cond["label"].tolist() * len(shown)
    cosines, scale = method.proxy(torch.cat(shown), batch.cond)
    judged = expert(images, asked).reshape(len(shown), ROWS)
    assert update.roles == "proxy"
    torch.testing.assert_close(update.losses["proxy"], preference_rows(scale * cosines, 40 * judged))
    torch.testing.assert_close(update.metrics["reward"], judged[0])
    torch.testing.assert_close(update.metrics["reward_data"], judged[2])


def test_proxy_learns_before_the_student_listens():
    """reward_start counts for the student's term only."""
    updates = step(proxied(reward_start=5), 0)
    assert set(updates) == {"student", "proxy"} and set(updates["student"].losses) == {"consistency"}


class Stepped(Mean):
    """A mean in steps of 1/20: no derivative anywhere, and none that is not zero where there is one."""

    def score(self, images: Tensor, asked: Asked) -> Tensor:
        return (20 * super().score(images, asked)).round() / 20


def test_an_expert_without_a_derivative_is_raised_through_the_proxy():
    """The one-step reward rises under the proxy's gradient, and stays where it was without."""
    reached = {}
    for beta in (0.0, 0.5):
        weights = {"reward": beta}
        expert, proxy = Stepped(differentiable=False), {"expert_scale": 20.0}
        method = points(expert, mode="proxy", reward_start=30, weights=weights, proxy=proxy, distance="l2")
        rates = {"student": 3e-3, "proxy": 1e-2}
        optimizers = {n: torch.optim.Adam(getattr(method, n).trainable().values(), rate) for n, rate in rates.items()}
        train(method, range(120), lambda _: rows(64, scale=0.3), optimizers)
        z = method.f(method.student, torch.randn(256, 2), torch.ones(256, dtype=torch.float64), rows(256).cond)
        reached[beta] = method.judged(z.detach(), Asked())[0].mean().item()
    assert reached[0.5] > reached[0.0] + 0.2


# what to watch


def test_validation_reports_reward_and_high_frequencies_of_the_average(tmp_path):
    """validate.metrics [reward, high_frequency]: at the fewest steps, and at each offered number of steps."""
    trainer = run(tmp_path, validate={"every": 3, "n": 16, "metrics": ["reward", "high_frequency"], "best": "reward"})
    said = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "validation.reward" in line]
    names = ("reward", "reward_1", "reward_2", "high_frequency", "high_frequency_1", "high_frequency_2")
    assert len(said) == 1 and all(f'"validation.{name}"' in said[0] for name in names)
    batch = trainer.method.rows_of_data(8)
    numbers = trainer.method.validation(batch)
    assert {v.shape for v in numbers.values()} == {(8,)} and torch.equal(numbers["reward"], numbers["reward_1"])
    student = trainer.handles["student"]
    for name, p in student.trainable().items():
        p.data.copy_(student.ema[name])
    assert torch.equal(trainer.method.validation(batch)["reward_2"], numbers["reward_2"])  # the average all along


def test_high_frequency_is_relative_to_real_samples(tmp_path):
    """1 for the data itself, the share of white noise over the data's for noise."""
    method = run(tmp_path).method
    real = method.rows_of_data(32).x0
    assert method.high_frequency(real)["high_frequency"].mean().item() == pytest.approx(1.0, abs=1e-5)
    noise = torch.randn(500, 1, 8, 8)
    expected = high_frequency_share(noise).mean() / high_frequency_share(real).mean()
    torch.testing.assert_close(method.high_frequency(noise)["high_frequency"].mean(), expected)


# mistakes


class NoVAE(LinearDecoder):
    """A pipeline without a VAE."""

    def decode(self, latents: Tensor) -> Tensor:
        raise UserError("this folder holds no vae: give a whole pipeline folder")


def test_a_missing_vae_is_said_before_the_first_step():
    """The stage starts with one decoded and judged sample."""
    method = points(around=NoVAE())
    method.sources = {"train": _Points()}
    with pytest.raises(UserError, match="holds no vae"):
        method.on(Event("stage_start", "train", 0))


class _Points:
    def __len__(self):
        return 4

    def fetch(self, ids, draw):
        return {name: value[: len(ids)] for name, value in rows(4).fields.items()}


def test_a_reward_that_asks_for_what_the_data_lacks_is_refused_before_the_first_step(tmp_path):
    """`needs` of the reward against the batches' fields."""

    class Prompted(Mean):
        name, needs = "prompted", "prompt"

    method = points(Prompted(), LinearDecoder())
    method.sources = {"train": _Points()}
    with pytest.raises(UserError, match="by their prompt, which these batches lack"):
        method.on(Event("stage_start", "train", 0))


def test_direct_mode_refuses_a_reward_without_a_derivative():
    with pytest.raises(UserError, match=r"'mean' has no derivative.*mode: proxy"):
        points(Mean(differentiable=False))


def test_an_unknown_reward_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match="did you mean 'classifier'"):
        run(tmp_path, config={"reward": "clasifier"})


@pytest.mark.parametrize(
    "said, message",
    [
        ({"weights": {"rewards": 1.0}}, "no loss term 'rewards': did you mean 'reward'"),
        ({"reward_band": [0.8, 0.2]}, "must increase within"),
        ({"reward_band": [0.2, 1.2]}, "must increase within"),
        ({"guidance_scale": [16, 4]}, "upside down"),
        ({"mode": "proxy"}, "untrained proxy"),
        ({"mode": "both"}, "direct"),
        ({"proxy": {"widht": 3}}, "did you mean 'width'"),
    ],
)
def test_mistakes_in_the_config_are_named(said, message):
    """Each is one line through the recipe's reader."""
    with pytest.raises(UserError, match=message):
        parse(RGLCD.Config, said, "config")


def test_roles_follow_the_config():
    """The reward is a frozen role, so that `plan` counts it; the plain student is tuned as the student is."""
    names = {m: [r.name for r in RGLCD(RGLCD.Config(**m_config)).roles()] for m, m_config in _CONFIGS.items()}
    assert names["direct"] == ["teacher", "student", "reward"]
    assert names["all"] == ["teacher", "student", "plain", "reward", "proxy"]
    plain = RGLCD(RGLCD.Config(clean_target=True)).roles()[2]
    assert plain.key == "student" and plain.adds == ("guidance",)


_CONFIGS = {"direct": {}, "all": {"clean_target": True, "mode": "proxy", "reward_start": 100}}
