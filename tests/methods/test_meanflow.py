"""MeanFlow as a method: which rows and times, how many network calls, what is guided, and what runs promise."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.maths.average_velocity import average_velocity, slope_along
from fewstep.maths.paths import add_noise, expand
from fewstep.methods.diffusion.meanflow import MeanFlow
from fewstep.recipe import load_recipe
from tests.methods.averages import (
    ROWS,
    calls,
    cut_difference,
    draw,
    halves_agree,
    images,
    made,
    only,
    recipe,
    step_on_meta,
    whole_and_halves,
)

GUIDED = {"guidance_scale": 2.0, "guidance_mix": 0.5}


# rows and times


def test_every_fourth_row_has_an_interval_and_the_others_have_none(tiny_unet):
    method = made(MeanFlow, tiny_unet)
    parts = method.parts(ROWS, torch.device("cpu"))
    assert parts["interval"].tolist() == [3, 7] and parts["flow"].tolist() == [0, 1, 2, 4, 5, 6]
    t, s = method.times(parts["interval"], draw())
    assert (s < t)[parts["interval"]].all() and torch.equal(s[parts["flow"]], t[parts["flow"]])


def test_t_and_s_are_the_larger_and_the_smaller_of_two_draws_by_the_law(tiny_unet):
    """P(t < a) = F(a)^2 and P(s < a) = 1 - (1 - F(a))^2 with F of logit-normal(-.4, 1)."""
    method = made(MeanFlow, tiny_unet, interval_share=1.0)
    t, s = method.times(torch.arange(20_000), draw(20_000))
    law = stats.norm(-0.4, 1)
    assert stats.kstest(law.cdf(torch.logit(t.double())) ** 2, "uniform").pvalue > 0.01
    assert stats.kstest(1 - (1 - law.cdf(torch.logit(s.double()))) ** 2, "uniform").pvalue > 0.01


def test_cutting_the_batch_changes_no_row(tiny_unet):
    assert halves_agree(made(MeanFlow, tiny_unet, **GUIDED))


# what a step asks and says


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, [2, 8]),
        ({"derivative": "central"}, [2, 2, 2, 8]),
        ({"derivative": "backward"}, [2, 2, 8]),
        ({"interval_share": 0.0}, [8]),
        ({"guidance_scale": 2.0}, [8, 2, 8]),
        (GUIDED, [16, 2, 8]),
        ({"guidance_mix": 0.5}, [2, 8]),
    ],
)
def test_calls_of_the_student(tiny_unet, config, expected):
    """The derivative is asked of the interval's rows alone, guidance costs one call, and none when it is off."""
    assert calls(made(MeanFlow, tiny_unet, **config)) == expected


def test_the_residual_is_that_of_the_identity(tiny_unet):
    """|u - sg[v - (t - s) du/dt]|^2 of each row with u at the same x_t, and its logs by part and by noise level."""
    method, batch, numbers = made(MeanFlow, tiny_unet, label_dropout=0.0, weight_power=0.0), images(), draw()
    update = only(method)
    t, s = method.times(torch.tensor([3, 7]), numbers)
    eps = numbers.normal("eps", 1, 8, 8)
    x, v = add_noise(batch.x0, eps, t), eps - batch.x0
    slope = slope_along(method.student, x, v, t, s, batch.cond)
    residual = average_velocity(method.student, x, t, s, batch.cond) - v + expand(t - s, v) * slope
    square = residual.flatten(1).square().sum(1)
    torch.testing.assert_close(update.losses["identity"], square, rtol=1e-4, atol=1e-4)
    assert (expand(t - s, v) * slope)[3].abs().max() > 1e-3
    torch.testing.assert_close(update.metrics["interval_error"], square[[3, 7]] / 64, rtol=1e-4, atol=1e-5)
    rows, levels = update.levels["interval"]
    assert torch.equal(levels, t[[3, 7]]) and torch.equal(rows.detach(), update.metrics["interval_error"])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_weight_divides_by_the_sum_over_a_rows_elements(tiny_unet, power):
    """w = 1 / (|residual|^2 + c)^p, |.|^2 the sum of squares; it carries no gradient."""
    method = made(MeanFlow, tiny_unet, weight_power=power, weight_floor=0.1)
    square = torch.tensor([0.0, 0.5, 30.0], requires_grad=True)
    loss = method.weighted(square)
    torch.testing.assert_close(loss, square / (square + 0.1) ** power)
    (gradient,) = torch.autograd.grad(loss.sum(), square)
    torch.testing.assert_close(gradient, 1 / (square.detach() + 0.1) ** power)
    plain = only(made(MeanFlow, tiny_unet, weight_power=0.0)).losses["identity"]
    assert plain.mean() > 64 * 0.5  # 64 elements of residual about 1


def test_central_differences_agree_with_forward_mode_where_h_resolves_the_time_features(tiny_unet):
    """Stock sinusoids turn by one radian in .001 of t: h = .0001 is exact to half a per cent, h = .005 is another number
    altogether in this network of random weights, where the fast ones are loud."""
    rows, (t, s) = torch.tensor([3, 7]), made(MeanFlow, tiny_unet).times(torch.tensor([3, 7]), draw())
    x, cond = images().x0.double(), images().cond

    def move(**config) -> torch.Tensor:
        method = made(MeanFlow, tiny_unet, **config)
        method.student.module.double()
        return method.target(x, x, t.double(), s.double(), cond, rows)[rows] - x[rows]

    exact = move()
    near, far = (move(derivative="central", derivative_step=h) for h in (1e-4, 5e-3))
    assert (near - exact).norm() < 5e-3 * exact.norm() and (far - exact).norm() > 0.5 * exact.norm() > 0.01


def test_only_u_carries_a_graph(tiny_unet):
    method, batch = made(MeanFlow, tiny_unet, **GUIDED), images()
    t, s = method.times(torch.tensor([3, 7]), draw())
    v = method.guided(batch.x0, batch.x0, t, batch.cond, torch.zeros(ROWS, dtype=torch.bool))
    target = method.target(batch.x0, v, t, s, batch.cond, torch.tensor([3, 7]))
    assert not target.requires_grad
    only(method).losses["identity"].mean().backward()
    assert all(p.grad is not None for p in method.student.module.parameters())


def test_differences_are_wider_in_bf16(tiny_unet):
    method = made(MeanFlow, tiny_unet)
    assert method.step == 0.005
    method.student.handle.autocast = torch.bfloat16
    assert method.step == 0.05


# conditions and guidance


def test_dropped_rows_are_asked_with_the_null_condition_and_are_not_guided(tiny_unet):
    """Everything dropped: guidance changes nothing, and labels do not matter."""
    losses = [only(made(MeanFlow, tiny_unet, label_dropout=1.0, **c)).losses["identity"] for c in ({}, GUIDED)]
    torch.testing.assert_close(*losses)
    method, batch = made(MeanFlow, tiny_unet, label_dropout=1.0), images()
    other = type(batch)(batch.ids, {**batch.fields, "cond": Cond(label=batch.cond["label"].flip(0))})
    (update,) = method.train_step(other, draw())
    torch.testing.assert_close(update.losses["identity"], losses[0])


def test_guidance_reaches_the_rows_that_keep_their_condition(tiny_unet):
    method = made(MeanFlow, tiny_unet, guidance_scale=2.0, label_dropout=0.5)
    plain = only(made(MeanFlow, tiny_unet, label_dropout=0.5), 64)
    guided = only(method, 64)
    dropped = draw(64).choice("dropout", 0.5)
    same = plain.losses["identity"] == guided.losses["identity"]
    error = torch.isclose(plain.metrics["flow_error"], guided.metrics["flow_error"])
    flow = method.parts(64, torch.device("cpu"))["flow"]
    assert torch.equal(error, dropped[flow]) and same[dropped].all()


def test_guidance_needs_an_unconditional_branch(tiny_unet):
    with pytest.raises(UserError, match="no unconditional branch"):
        only(made(MeanFlow, {**tiny_unet, "classes": None}, guidance_scale=2.0))


# the student


@pytest.mark.parametrize(
    "family, sizes", [("unet2d", None), ("dit", {"sample_size": 8, "classes": 10, "num_layers": 2})]
)
def test_a_new_or_given_network_starts_as_a_flow_model_for_every_s(tiny_unet, family, sizes):
    """u(x, t, s) = v(x, t) bit for bit at step 0."""
    method = made(MeanFlow, sizes or tiny_unet, moved=False, family=family)
    batch, t = images(), torch.linspace(0.1, 1, ROWS)
    at = [average_velocity(method.student, batch.x0, t, share * t, batch.cond) for share in (1.0, 0.5, 0.0)]
    assert torch.equal(at[0], at[1]) and torch.equal(at[0], at[2])


def test_an_adapter_trains_through_the_shifted_label(tiny_unet):
    """No new layer: forward mode goes through the label, and every adapter weight gets gradient."""
    method = made(MeanFlow, tiny_unet, tune="lora")
    assert method.student.shifted and not hasattr(method.student.module, "extra_inputs")
    only(method).losses["identity"].mean().backward()
    assert all(p.grad is not None for p in method.student.trainable().values())


def test_gradient_checkpointing_gives_the_same_gradients():
    """The tangent pass runs without a graph, beside the checkpointed pass with one."""
    sizes = {"sample_size": 8, "classes": 10, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    found = []
    for on in (False, True):
        method = made(MeanFlow, sizes, family="dit")
        if on:
            from fewstep.nets.lora import checkpointed

            checkpointed(method.student.module)
        only(method).losses["identity"].mean().backward()
        found.append([p.grad for p in method.student.module.parameters()])
    for plain, again in zip(*found):
        torch.testing.assert_close(again, plain, rtol=1e-3, atol=1e-6)


# runs


@pytest.mark.parametrize("config", [{}, GUIDED, {"derivative": "central"}])
def test_no_step_reads_the_host(tiny_unet, config):
    update = step_on_meta(made(MeanFlow, tiny_unet, **config))
    assert update.losses["identity"].device.type == "meta" and update.losses["identity"].shape == (ROWS,)


def test_a_run_in_two_halves_equals_one_run(tiny_unet, tmp_path):
    whole, halves = whole_and_halves(recipe("meanflow", tiny_unet), tmp_path)
    assert whole == halves


def test_micro_batches_do_not_matter(tiny_unet, tmp_path):
    assert cut_difference(recipe("meanflow", tiny_unet), tmp_path) < 1e-5


def test_a_part_that_breaks_the_fours_is_refused(tiny_unet, tmp_path):
    with pytest.raises(UserError, match="rows in multiples of 4"):
        cut_difference(recipe("meanflow", tiny_unet), tmp_path, micro=2)


@pytest.mark.parametrize("sampler, told", [("any", "next"), ("few", "zero"), ("multi", "same")])
def test_the_sampler_is_told_where_its_step_ends(tiny_unet, sampler, told):
    schedule = made(MeanFlow, tiny_unet, sampler=sampler, steps=4, **GUIDED).schedule()
    assert (schedule.target, schedule.u, schedule.guidance) == (told, (1.0, 0.75, 0.5, 0.25), 1.0)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"interval_share": 0.3}, "interval_share"),
        ({"guidance_scale": 2.0, "label_dropout": 0.0}, "label_dropout"),
        ({"guidance_scale": 2.0, "guidance_interval": [0.7, 0.2]}, "guidance_interval"),
        ({"guidance_mix": 1.0}, "guidance_mix"),
        ({"weights": {"identiti": 2.0}}, "did you mean 'identity'"),
    ],
)
def test_bad_options_are_named(tiny_unet, config, message):
    with pytest.raises(UserError, match=message):
        load_recipe({**recipe("meanflow", tiny_unet), "config": config})
