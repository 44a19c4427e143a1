"""Numbers that change over training."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from pydantic import TypeAdapter, ValidationError

from fewstep.maths.scalars import Ramp, Scalar, value


def test_a_plain_number_is_constant():
    assert [value(0.3, step) for step in (0, 7, 10**6)] == [0.3] * 3


def test_linear_ramp_is_a_line_and_then_stays():
    ramp = Ramp(linear=(1.0, 3.0), over=10)
    assert [value(ramp, step) for step in (0, 5, 10, 99)] == [1.0, 2.0, 3.0, 3.0]


def test_cosine_ramp_starts_and_ends_flat():
    ramp = Ramp(cosine=(2.0, 0.0), over=100)
    assert (ramp.at(0), ramp.at(100), ramp.at(500)) == (2.0, 0.0, 0.0)
    assert ramp.at(50) == pytest.approx(1.0)
    assert ramp.at(25) == pytest.approx(1 + math.cos(math.pi / 4))
    assert abs(ramp.at(1) - ramp.at(0)) < 1e-3 < abs(ramp.at(51) - ramp.at(50))


def test_exponential_ramp_multiplies_by_a_constant_factor():
    ramp = Ramp(exponential=(1e-3, 1e-1), over=4)
    values = [ramp.at(step) for step in range(5)]
    assert [b / a for a, b in pairwise(values)] == pytest.approx([10**0.5] * 4)
    assert ramp.at(40) == pytest.approx(1e-1)


@pytest.mark.parametrize(
    "said",
    [
        {"over": 5},
        {"linear": (0, 1), "cosine": (0, 1), "over": 5},
        {"exponential": (0, 1), "over": 5},
        {"linear": (0, 1), "over": 0},
        {"linear": (0, 1), "over": 5, "shape": "x"},
    ],
)
def test_a_ramp_without_exactly_one_legal_shape_is_refused(said):
    with pytest.raises(ValidationError):
        Ramp.model_validate(said)


def test_recipe_words_become_numbers_or_ramps():
    read = TypeAdapter(Scalar).validate_python
    assert read(2) == 2.0
    assert value(read({"linear": [0, 1], "over": 1000}), 250) == 0.25
