"""Addressed randomness: a number depends on seed, step, slot and name, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fewstep_kernels import noise
from scipy import stats

from fewstep import draws
from fewstep.draws import AddressUsed, Draw, order

CALLS = {
    "normal": lambda draw: draw.normal("x", 3, 5),
    "uniform": lambda draw: draw.uniform("x", 7, low=-1.0, high=2.0),
    "integers": lambda draw: draw.integers("x", 10, 2),
    "choice": lambda draw: draw.choice("x", 0.5),
}
STEP_CALLS = {
    "normal": lambda draw: draw.normal("x", 3, 5, per="step"),
    "uniform": lambda draw: draw.uniform("x", 7, per="step", low=-1.0, high=2.0),
    "integers": lambda draw: draw.integers("x", 10, 2, per="step"),
    "permutation": lambda draw: draw.permutation("x", 50),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_one_batch_of_eight_equals_eight_of_one_and_two_ranks_of_four(call):
    whole = call(Draw(3, 11, np.arange(8)))
    single = torch.cat([call(Draw(3, 11, [slot])) for slot in range(8)])
    ranks = torch.cat([call(Draw(3, 11, torch.arange(8)[rank::2])) for rank in range(2)])
    assert len(whole) == 8 and torch.equal(whole, single)
    assert torch.equal(whole[[0, 2, 4, 6, 1, 3, 5, 7]], ranks)


@pytest.mark.parametrize("call", STEP_CALLS.values(), ids=STEP_CALLS)
def test_numbers_per_step_are_the_same_on_every_part_and_change_with_the_step(call):
    first, other, later = (
        call(Draw(3, 11, np.arange(8))),
        call(Draw(3, 11, np.arange(8, 10))),
        call(Draw(3, 12, np.arange(8))),
    )
    assert torch.equal(first, other) and not torch.equal(first, later)


def test_python_numbers_per_step_agree_between_parts_and_vary_over_steps():
    def both(step, slots):
        draw = Draw(0, step, slots)
        return draw.integers("level", 4, per="step"), draw.choice("drop", 0.5, per="step")

    numbers = [both(step, [0, 1]) for step in range(64)]
    assert numbers == [both(step, [5]) for step in range(64)]
    assert {type(level) for level, _ in numbers} == {int} and {type(drop) for _, drop in numbers} == {bool}
    assert {level for level, _ in numbers} == {0, 1, 2, 3} and {drop for _, drop in numbers} == {True, False}


def test_rows_are_normals_of_sample_step_and_slot_under_the_hash_of_the_name():
    draw = Draw(9, 5, [0, 3], scope="dm")
    samples = np.array([5 << 32, 5 << 32 | 3])
    expected = noise.normal(9, draws._stream("dm.eps"), samples, 6).reshape(2, 2, 3)
    assert (draw.normal("eps", 2, 3).numpy() == expected).all()


def test_a_resumed_run_sees_the_numbers_of_step_k():
    straight = [Draw(1, step, np.arange(4)).normal("eps", 2) for step in range(6)]
    resumed = [Draw(1, step, np.arange(4)).normal("eps", 2) for step in range(3, 6)]
    assert all(torch.equal(a, b) for a, b in zip(straight[3:], resumed, strict=True))
    assert not torch.equal(straight[3], straight[4])


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in():
    together = Draw.for_images(5, range(6)).normal("prior", 1, 4, 4)
    assert torch.equal(Draw.for_images(5, [4]).normal("prior", 1, 4, 4)[0], together[4])
    assert not torch.equal(Draw.for_images(6, [4]).normal("prior", 1, 4, 4)[0], together[4])


def test_drawing_an_address_twice_names_it():
    draw = Draw(0, 7, [0])
    draw.normal("eps", 2)
    for again in (lambda: draw.normal("eps", 2), lambda: draw.integers("eps", 3, per="step")):
        with pytest.raises(AddressUsed, match=r"step 7: 'eps' is drawn twice"):
            again()
    Draw(0, 8, [0]).normal("eps", 2)


def test_a_scope_prefixes_names_and_shares_what_is_used():
    draw = Draw(0, 0, np.arange(3))
    inner = draw.within("dm")
    scoped = inner.normal("eps", 4)
    assert not torch.equal(scoped, draw.normal("eps", 4))
    assert torch.equal(scoped, Draw(0, 0, np.arange(3)).normal("dm.eps", 4))
    assert torch.equal(inner.within("fake").normal("eps", 4), Draw(0, 0, np.arange(3)).normal("dm.fake.eps", 4))
    for again in (lambda: draw.normal("dm.eps"), lambda: draw.within("dm").normal("eps")):
        with pytest.raises(AddressUsed, match=r"'dm.eps'"):
            again()


def test_two_names_with_one_hash_are_refused():
    draw = Draw(0, 0, [0])
    draw.normal("eps44614")
    with pytest.raises(AddressUsed, match="'eps95141' and 'eps44614' hash alike: rename one"):
        draw.normal("eps95141")


def test_uniforms_have_the_law_of_their_interval():
    u = Draw(2, 0, np.arange(2000)).uniform("u", 50, low=-1.0, high=3.0).reshape(-1)
    assert u.dtype == torch.float32
    assert stats.kstest(u.numpy(), stats.uniform(-1, 4).cdf).pvalue > 0.01
    plain = Draw(2, 0, np.arange(2000)).uniform("u", 50).reshape(-1)
    assert torch.equal(-1 + 4 * plain, u)


def test_uniform_bounds_may_differ_by_row_and_are_kept_after_rounding():
    low, high = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.25, 0.5000001, 1.0])
    u = Draw(2, 0, np.arange(3)).uniform("u", 10_000, low=low, high=high)
    assert (u[:2] > low[:2, None]).all() and (u <= high[:, None]).all()
    assert (u[2] == 1).all()  # an empty interval gives its end
    assert torch.equal(u[0], Draw(2, 0, [0]).uniform("u", 10_000)[0] * 0.25)
    until_one = Draw(2, 0, np.arange(3)).uniform("u", low=low, high=1.0)
    assert (until_one[:2] > low[:2]).all() and (until_one <= 1).all()


def test_integers_are_equally_likely():
    for n in (1, 2, 3, 7, 1000):
        values = Draw(4, 0, np.arange(2000)).integers("i", n, 50)
        counts = torch.bincount(values.reshape(-1), minlength=n)
        assert values.dtype == torch.int64 and len(counts) == n
        assert n == 1 or stats.chisquare(counts.numpy()).pvalue > 0.01


def test_integers_are_the_exact_share_of_a_64_bit_word():
    words = np.array([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 2**33, 2**64 - 1], np.uint64)
    high, low = words >> np.uint64(32), words & np.uint64(2**32 - 1)
    for n in (1, 3, 10**9, 2**31):
        assert draws._integers(n, high, low).tolist() == [int(word) * n >> 64 for word in words]


def test_a_choice_is_true_with_its_probability():
    draw = Draw(4, 0, np.arange(40_000))
    assert abs(draw.choice("some", 0.1).float().mean() - 0.1) < 4 * np.sqrt(0.09 / 40_000)
    assert not draw.choice("never", 0.0).any() and draw.choice("always", 1.0).all()
    rows = draw.choice("mixed", torch.tensor([0.0, 1.0]).repeat(20_000))
    assert not rows[0::2].any() and rows[1::2].all()


def test_permutations_are_permutations_and_equally_likely():
    assert torch.equal(Draw(0, 0, [0]).permutation("p", 1000).sort().values, torch.arange(1000))
    seen = [tuple(Draw(0, step, [0]).permutation("p", 3).tolist()) for step in range(1200)]
    assert stats.chisquare([seen.count(p) for p in set(seen)]).pvalue > 0.01 and len(set(seen)) == 6


def test_data_order_depends_on_seed_epoch_and_name_alone():
    first = order(0, 1, 100).copy()
    assert sorted(first.tolist()) == list(range(100))
    others = [order(0, 2, 100), order(1, 1, 100), order(0, 1, 100, "prompts")]
    assert all((first != other).any() for other in others)
    assert (order(0, 1, 100) == first).all() and order(0, 1, 100) is order(0, 1, 100)
    with pytest.raises(ValueError, match="read-only"):
        order(0, 1, 100)[0] = 0


def test_a_generator_is_seeded_by_its_address():
    def values(step, name):
        return torch.rand(4, generator=Draw(0, step, [0, 1]).generator(name))

    assert torch.equal(values(1, "crop"), values(1, "crop"))
    assert not torch.equal(values(1, "crop"), values(2, "crop"))
    assert not torch.equal(values(1, "crop"), values(1, "flip"))


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw = Draw(0, 0, [0])
    draw.normal("a", 4), draw.permutation("b", 4), draw.generator("c")
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_tensors_lie_on_the_device_of_the_draw():
    draw = Draw(0, 0, [0, 1], device="meta")
    tensors = [
        draw.normal("a", 2),
        draw.uniform("b", 2),
        draw.uniform("c", low=0.5, high=torch.tensor([1.0, 2.0])),
        draw.integers("d", 3),
        draw.choice("e", torch.tensor(0.5, device="meta")),
        draw.permutation("f", 3),
        draw.within("x").normal("a", per="step"),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert isinstance(draw.integers("g", 3, per="step"), int)


def test_a_micro_batch_without_rows_draws_empty_tensors():
    draw = Draw(0, 0, [])
    assert draw.rows == 0 and draw.normal("a", 3).shape == (0, 3) and draw.integers("b", 5).shape == (0,)


@pytest.mark.parametrize("step, slots", [(-1, [0]), (2**31, [0]), (0, [-1]), (0, [2**32 - 1]), (0, [[0]])])
def test_addresses_outside_their_words_are_refused(step, slots):
    with pytest.raises(ValueError, match=r"2\^3"):
        Draw(0, step, slots)
