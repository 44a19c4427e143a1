"""When offline work can be skipped: a stage's inputs are hashed, and its stores remember the hash they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..data.source import Source
from ..methods.base import Stage
from ..recipe import Recipe
from ..roles import merge_spec
from ..store import Store, content_key


def stage_key(stage: Stage, recipe: Recipe, sources: Mapping[str, Source]) -> str:
    """Hash of what an offline stage reads: the method's config, its sources' content, the weights of the roles it uses."""
    method = recipe.build_method()
    names = (stage.data,) if isinstance(stage.data, str) else stage.data
    roles = [r for r in method.roles() if stage.uses is None or r.name in stage.uses]
    specs = {r.name: merge_spec(r, recipe.roles.get(r.name)) for r in roles}
    weights = {
        name: Path(spec.source) if spec.source and Path(spec.source).is_dir() else spec.model_dump(mode="json")
        for name, spec in specs.items()
    }
    config = method.config.model_dump(mode="json")
    contents = [sources[name].content_key() for name in names if name in sources]
    return content_key(recipe.method, stage.name, config, contents, weights, recipe.train.seed)


def ready(stage: Stage, recipe: Recipe, sources: Mapping[str, Source], stores: Mapping[str, Store]) -> bool:
    """Whether every store the stage writes was made from equal inputs."""
    if not stage.writes:
        return False
    key = stage_key(stage, recipe, sources)
    return all(stores[name].key == key for name in stage.writes)
