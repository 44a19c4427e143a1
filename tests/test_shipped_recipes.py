"""Every recipe that travels with fewstep says only what its method and its roles know."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.recipe import load_recipe
from fewstep.resources import config
from fewstep.roles import merge_spec

SHIPPED = sorted(
    file.relative_to(config("")).as_posix()
    for file in Path(config("")).glob("*/*.yaml")
    if file.parent.name not in ("accelerate", "evaluation")
)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_one(name):
    """Its method can be built, and its words fit on top of the paper's."""
    recipe = load_recipe(config(name))
    method = recipe.build_method()
    for role in method.roles():
        spec = merge_spec(role, recipe.roles.get(role.key))
        assert not (spec.weights == "bf16" and recipe.train.precision != "bf16")
    assert {role.key for role in method.roles()} >= set(recipe.roles)
