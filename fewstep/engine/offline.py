"""Stages that train nothing and write stores. Their inputs are hashed; a store made from equal inputs is not made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.encoded import plain
from ..data.source import Source
from ..draws import Draw
from ..methods.base import Event, Stage
from ..recipe import Recipe
from ..resources import locate
from ..roles import merge_spec
from ..store import Store, content_key
from . import distributed
from .barrier import Barrier, Gradients, advance
from .feed import Feed
from .progress import bar
from .sizes import sizes

if TYPE_CHECKING:
    from .trainer import Trainer

NO_GRADIENTS = Gradients(lambda _roles: [], lambda _term: 0.0, 1)


def run_offline(trainer: Trainer, stage: Stage) -> None:
    """One pass over the stage's source in order, on every process alike; rows go to stores, which are then committed."""
    recipe, method, stores = trainer.recipe, trainer.method, trainer.stores
    name, seed = stage.data if isinstance(stage.data, str) else stage.data[0], recipe.train.seed
    feed = Feed(trainer.source(name), name, seed, sizes(stage, recipe).batch, shuffle=False)
    feed.select(method.select(name, Event("epoch_start", stage.name, 0, 0, name)))
    method.on(Event("stage_start", stage.name, 0))
    for written in stage.writes:
        stores[written].clear()
    with bar(stage.name, feed.per_epoch, show=trainer.show) as progress, torch.no_grad():
        for step in range(feed.per_epoch):
            positions = feed.next()
            # step 0 throughout: positions differ, and what is stored must not depend on the batch size
            draw = Draw(seed, 0, positions, device=trainer.device, scope=stage.name)
            rows = feed.rows(positions, draw.within(f"data.{name}")).to(trainer.device)
            advance(
                [stage.step(rows, draw)], [(seed, stage.name, step)], NO_GRADIENTS, partial(_store, trainer, rows.ids)
            )
            progress()
    trainer.tracker.log(trainer.total, {"stage": stage.name, **trainer.window.take()})
    key = stage_key(stage, recipe, trainer.sources)
    for written in stage.writes if trainer.main else ():
        stores[written].commit(key, {"stage": stage.name, "method": recipe.method})
    distributed.wait()
    method.on(Event("stage_end", stage.name, feed.per_epoch))


def _store(trainer: Trainer, ids: Tensor, barrier: Barrier) -> None:
    trainer.window.add(barrier.metrics)
    for _, keep in barrier.keep:
        keep_rows(trainer.stores, ids, keep)


def keep_rows(
    stores: Mapping[str, Store],
    ids: Tensor,
    keep: Mapping[str, Tensor],
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> None:
    """Writes an Update's `keep` under the samples' ids: "store.column" -> rows; a bare store name means column "value"."""
    columns: dict[str, dict[str, Tensor]] = {}
    for name, rows in keep.items():
        store, _, column = name.partition(".")
        columns.setdefault(store, {})[column or "value"] = gather(rows.detach()).cpu()
    for store, named in columns.items():
        stores[store].write(ids.cpu(), **named)


def stage_key(stage: Stage, recipe: Recipe, sources: Mapping[str, Source]) -> str:
    """Hash of what an offline stage reads: the method's config, its sources' content, the weights of the roles it uses.

    Asked before roles are loaded as well, so encoders count with the folder of their role and not with the source.
    """
    method = recipe.build_method()
    names = (stage.data,) if isinstance(stage.data, str) else stage.data
    roles = [r for r in method.roles() if stage.uses is None or r.name in stage.uses]
    specs = {r.name: merge_spec(r, recipe.roles.get(r.key)) for r in roles}
    weights = {
        name: locate(spec.source) if spec.source and locate(spec.source).is_dir() else spec.model_dump(mode="json")
        for name, spec in specs.items()
    }
    config = method.config.model_dump(mode="json", include=None if stage.reads is None else set(stage.reads))
    contents = [plain(sources[name]).content_key() for name in names if name in sources]
    return content_key(recipe.method, stage.name, config, contents, weights, recipe.train.seed)


def ready(stage: Stage, recipe: Recipe, sources: Mapping[str, Source], stores: Mapping[str, Store]) -> bool:
    """Whether every store the stage writes was made from equal inputs."""
    if not stage.writes:
        return False
    key = stage_key(stage, recipe, sources)
    return all(stores[name].key == key for name in stage.writes)
