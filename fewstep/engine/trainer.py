"""The trainer: runs the stages of any method, and writes one run folder.

runs/NAME/recipe.yaml  metrics.jsonl  checkpoints/step-N/  previews/  stores/  model/  report.html
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.encoded import dressed, fitting
from ..data.latents import Cached
from ..data.registry import make_source
from ..draws import Draw
from ..errors import RunFailed, UserError, nearest
from ..maths.scalars import value
from ..methods.base import Event, Stage
from ..recipe import PreviewSpec, Recipe, ValidateSpec, load_recipe
from ..roles import Handle, assemble
from ..store import Store
from . import checkpoint, distributed, snapshot
from .barrier import Barrier, ContractError, Gradients, advance
from .exporting import export_run, meet_export
from .feed import Feed, Feeds
from .guards import Guards
from .interrupt import Interrupt, watching
from .offline import keep_rows, ready, run_offline
from .optim import RoleOptimizer
from .preview import write_previews
from .progress import Advance, bar
from .report import report
from .resume import to_resume
from .sharding import refuse_engines, shard
from .sizes import cut, sizes
from .snapshot import Place
from .tracking import Tracker, Window, require_trackers, rewind
from .validation import Best, validate


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the exported model in it (None when nothing is exported), steps done."""

    folder: Path
    model: Path | None
    steps: int


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: bool = False,
    stage: str | None = None,
    show: bool = True,
) -> Run:
    """Trains a recipe into the folder `out` and exports the result. The same as `fewstep train RECIPE a.b=c --out OUT`.

    resume: go on from the newest checkpoint in `out`. stage: run this one only. show: progress bars on stderr.
    Raises UserError for bad input and RunFailed for a run that could not go on; checkpoints are never half-written.
    """
    trainer = Trainer(load_recipe(recipe, overrides), Path(out), resume, stage, show)
    trainer.run()
    model = export_run(trainer) if stage is None else None
    if trainer.main:
        report(trainer.folder)
    distributed.wait()
    return Run(trainer.folder, model, trainer.total)


class Trainer:
    """Owns the loop. A method is asked for roles and stages, told of events, and otherwise left alone."""

    def __init__(self, recipe: Recipe, folder: Path, resume: bool = False, only: str | None = None, show: bool = True):
        require_trackers(list(recipe.train.trackers))
        refuse_engines()
        if recipe.train.shard and recipe.preview:
            raise UserError("previews are drawn on one process, which has a part of each network: remove `preview`")
        self.recipe, self.folder, self.only = recipe, folder, only
        self.checkpoints = folder / "checkpoints"
        saved = to_resume(self.recipe, folder, resume)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), log_with=list(recipe.train.trackers) or None, project_dir=str(folder)
        )
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        self.show = show and self.main
        self.method = recipe.build_method()
        self.stages = self._stages()
        self.sources = {name: make_source(config) for name, config in recipe.data.items()}
        self.stores = self._stores()
        self.handles = self._handles()
        self.sources = dressed(self.sources, self.handles)
        self.method.bind(self.handles, self.sources, self.stores)
        meet_export(self.method, self.handles)
        if recipe.train.shard:
            shard(self.handles, self.device)
        self.place, self.window = Place(), Window()
        self.guards, self.best = Guards(recipe.guards), Best.of(recipe.validation)
        self.interrupt = Interrupt()
        self.feeds: Feeds = Feeds({})
        self.optimizers: dict[str, RoleOptimizer] = {}
        self._check_inputs()
        self._open_folder(saved)
        self.saved = saved

    @property
    def total(self) -> int:
        """Optimiser steps done over all stages."""
        return self.place.total

    # ---- setting up

    def _stages(self) -> list[Stage]:
        patches = self.recipe.stages
        stages = [s for s in self.method.stages() if not (s.name in patches and patches[s.name].skip)]
        if self.only is not None:
            names = [s.name for s in stages]
            if self.only not in names:
                raise UserError(
                    f"--stage: '{self.recipe.method}' has no stage '{self.only}': {nearest(self.only, names)}"
                )
        return stages

    def _stores(self) -> dict[str, Store]:
        root = Path(self.recipe.stores) if self.recipe.stores else self.folder / "stores"
        return {name: Store.open(root, name) for name in self.method.store_names()}

    def _handles(self) -> dict[str, Handle]:
        self.skipped = {s.name for s in self.stages if s.offline and ready(s, self.recipe, self.sources, self.stores)}
        roles = self.method.roles()
        active = [s for s in self.stages if s.name not in self.skipped and self.only in (None, s.name)]
        used = {name for s in active for name in (s.uses if s.uses is not None else [r.name for r in roles])}
        declared, said = [r for r in roles if r.name in used], self.recipe
        handles = assemble(declared, said.roles, said.train.seed, self.device, fitting(self.sources))
        for handle in handles.values():
            if handle.narrow and self.recipe.train.precision != "bf16":
                raise UserError(f"{handle.name} has a base with weights: bf16, which needs train.precision: bf16")
            handle.autocast = torch.bfloat16 if self.recipe.train.precision == "bf16" else None
        return handles

    def _check_inputs(self) -> None:
        """What a later stage would stumble over is said before the first one starts, and before anything is written."""
        for stage in self.stages:
            if stage.name in self.skipped or self.only not in (None, stage.name):
                continue
            for name in _names(stage.data):
                self.source(name)
            if not stage.offline:
                cut(sizes(stage, self.recipe).batch, self.recipe, self.method, distributed.world())

    def _open_folder(self, saved: checkpoint.Checkpoint | None) -> None:
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recipe.write(self.folder / "recipe.yaml")
            rewind(self.folder / "metrics.jsonl", snapshot.place(saved).total if saved else -1)
            checkpoint.prune(self.checkpoints, self.recipe.train.keep_last, self.best.step)
        distributed.wait()
        self.tracker = Tracker(
            self.accelerator, self.folder / "metrics.jsonl", list(self.recipe.train.trackers), self.recipe.plain()
        )

    # ---- running

    def run(self) -> None:
        """All stages, from the beginning or from the checkpoint."""
        self._fill_caches()
        first = snapshot.place(self.saved).stage if self.saved else 0
        failures: dict[str, list[str]] = {}
        with watching() as self.interrupt:
            for index, stage in enumerate(self.stages):
                if index < first or stage.name in self.skipped or self.only not in (None, stage.name):
                    continue
                resumed = self.saved if self.saved is not None and index == first else None
                try:
                    self._run_stage(index, stage, resumed)
                except RunFailed as error:
                    if stage.group is None or self.interrupt.name:
                        raise
                    failures.setdefault(stage.group, []).append(f"{stage.name}: {error}")
                self._end_group(index, failures)
        self.tracker.close()

    def _fill_caches(self) -> None:
        for name, source in self.sources.items():
            if isinstance(source, Cached):
                with bar(f"encode {name}", source.shards, show=self.show) as advance:
                    source.fill(advance)

    def _end_group(self, index: int, failures: dict[str, list[str]]) -> None:
        group = self.stages[index].group
        last = index + 1 == len(self.stages) or self.stages[index + 1].group != group
        if last and group in failures:
            raise RunFailed(f"group '{group}' ended with failures. " + "; ".join(failures[group]))

    def _run_stage(self, index: int, stage: Stage, saved: checkpoint.Checkpoint | None) -> None:
        if stage.offline:
            return run_offline(self, stage)
        size = sizes(stage, self.recipe)
        self.place = Place(index, 0, self.place.total)
        self.cut = cut(size.batch, self.recipe, self.method, distributed.world())
        for name, handle in self.handles.items():
            handle.train_here(name in stage.trains)
        skips = self.recipe.guards.nan == "skip"
        self.optimizers = {
            name: RoleOptimizer(self.handles[name], size.steps, size.lr, size.batch, skips) for name in stage.trains
        }
        self.feeds = Feeds({n: Feed(self.source(n), n, self.recipe.train.seed, size.batch) for n in _names(stage.data)})
        self.method.on(Event("stage_start", stage.name, 0))
        if saved is not None:
            snapshot.restore(self, saved)
        else:
            for name in self.feeds:
                self._select(stage, name)
        with bar(stage.name, size.steps, self.place.step, self.show) as progress:
            while self.place.step < size.steps:
                self._step(stage)
                self._after_step(stage, size.steps, progress)
        self.method.on(Event("stage_end", stage.name, size.steps))
        return None

    def source(self, name: str) -> Any:
        if name not in self.sources:
            raise UserError(
                f"the recipe has no data.{name}, which this stage reads: write `data: {{{name}: {{source: ...}}}}`"
            )
        return self.sources[name]

    def _select(self, stage: Stage, name: str) -> None:
        feed = self.feeds[name]
        event = Event("epoch_start", stage.name, self.place.step, feed.epoch, name, seed=self.recipe.train.seed)
        feed.select(self.method.select(name, event))
        if self.cut.micro % feed.selection.group:
            raise UserError(
                f"data.{name} comes in groups of {feed.selection.group}, which micro-batches of {self.cut.micro} would "
                "split: choose train.micro_batch as a multiple of it"
            )

    def _step(self, stage: Stage) -> None:
        for name, feed in self.feeds.items():
            if feed.ended:
                self.method.on(Event("epoch_end", stage.name, self.place.step, feed.epoch, name))
                feed.start_epoch()
                self._select(stage, name)
        positions = {name: feed.next() for name, feed in self.feeds.items()}
        seed, step = self.recipe.train.seed, self.place.step
        parts, seeds, ids = [], [], []
        for part in range(self.cut.parts):
            start = (distributed.rank() * self.cut.parts + part) * self.cut.micro
            slots = np.arange(start, start + self.cut.micro)
            draw = Draw(seed, step, slots, device=self.device, scope=stage.name)
            batch = self.feeds.batch({n: p[slots] for n, p in positions.items()}, draw).to(self.device)
            parts.append(stage.step(batch, draw))
            seeds.append((seed, stage.name, step, start))
            ids.append(batch.ids)
        updated: list[str] = []
        with self._activations():
            advance(parts, seeds, self._gradients(), lambda barrier: updated.extend(self._finish(barrier, ids)))
        self.place.step, self.place.total = step + 1, self.place.total + 1
        rows = sum(len(part) for part in ids) * distributed.world()
        self.method.on(Event("step_end", stage.name, self.place.step, updated=tuple(updated), rows=rows))

    def _activations(self) -> AbstractContextManager[Any]:
        if not self.recipe.train.offload_activations:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    def _gradients(self) -> Gradients:
        weights, step = self.method.config.weights, self.place.step
        return Gradients(
            parameters=self._parameters,
            others=self._others,
            weight=lambda term: value(weights.get(term, 1.0), step),
            parts_in_step=self.cut.parts * distributed.world(),
        )

    def _others(self, roles: tuple[str, ...]) -> list[nn.Parameter]:
        return [p for name in self.optimizers if name not in roles for p in self.optimizers[name].parameters.values()]

    def _parameters(self, roles: tuple[str, ...]) -> list[nn.Parameter]:
        missing = [r for r in roles if r not in self.optimizers]
        if missing:
            raise ContractError(
                f"'{missing[0]}' is stepped but not among the roles that stage {self.stages[self.place.stage].name} trains"
            )
        return [p for r in roles for p in self.optimizers[r].parameters.values()]

    def _finish(self, barrier: Barrier, ids: Sequence[Tensor]) -> tuple[str, ...]:
        distributed.sum_gradients(self._parameters(barrier.roles))
        self.window.add(barrier.metrics)
        self.window.add_levels(barrier.levels)
        for role in barrier.roles:
            self.window.add(self.optimizers[role].step(self.place.step))
        for part, keep in barrier.keep:
            keep_rows(self.stores, distributed.gather_rows(ids[part].to(self.device)), keep, distributed.gather_rows)
        return barrier.roles

    # ---- after a step

    def _after_step(self, stage: Stage, steps: int, progress: Advance) -> None:
        done, train = self.place.step, self.recipe.train
        last = done == steps
        stop = self.interrupt.stops(self.device, last or done % train.log_every == 0)
        save = stop or (train.save_every is not None and self.total % train.save_every == 0) or (last and self._final())
        note = self._log(stage) if last or save or done % train.log_every == 0 else None
        progress(1, note)
        if self.recipe.preview and self._due(self.recipe.preview.every, last):
            self._preview(stage, self.recipe.preview)
        if self.recipe.validation and self._due(self.recipe.validation.every, last):
            self._validate(stage, self.recipe.validation)
        if save:
            self.save()
        if stop:
            resume = f"fewstep train {self.folder}/recipe.yaml --out {self.folder} --resume"
            raise RunFailed(f"stopped by {self.interrupt.name} after step {self.total}; go on with: {resume}")

    def _final(self) -> bool:
        return (
            all(s.offline or s.name in self.skipped for s in self.stages[self.place.stage + 1 :])
            or self.only is not None
        )

    def _due(self, every: int, last: bool) -> bool:
        return last or self.total % every == 0

    def _log(self, stage: Stage) -> str:
        numbers = self.window.take()
        reason = self.guards.check(self.total, numbers)
        self.tracker.log(self.total, {"stage": stage.name, **numbers})
        self._warn(stage)
        if reason is not None:
            self._fail(reason)
        return " ".join(f"{n.removeprefix('loss.')} {v:.3g}" for n, v in numbers.items() if n.startswith("loss."))

    def _warn(self, stage: Stage) -> None:
        for what in self.guards.take():
            self.tracker.log(self.total, {"stage": stage.name, "warning": what})
            if self.show:
                print(f"warning: {what}", file=sys.stderr)

    def _fail(self, reason: str) -> None:
        raise RunFailed(f"training stopped: {reason}. {checkpoint.last_good(self.checkpoints)}")

    def _preview(self, stage: Stage, spec: PreviewSpec) -> None:
        seed, folder = self.recipe.train.seed, self.folder / "previews"
        samples = write_previews(self.method, spec.n, seed, folder, self.total) if self.main else None
        reason = self.guards.look(self.total, samples) if samples is not None else None
        self._warn(stage)
        if reason is not None:
            self._fail(reason)

    def _validate(self, stage: Stage, spec: ValidateSpec) -> None:
        started = time.monotonic()
        numbers = validate(self.method, self.source(spec.source), spec, self.recipe, self.device)
        took = {"validation_seconds": round(time.monotonic() - started, 3)}
        self.tracker.log(self.total, {"stage": stage.name, **took, **numbers})
        self.best.offer(self.total, numbers)

    # ---- saving

    def save(self) -> None:
        """Writes a checkpoint of everything a resumed run needs."""
        files = snapshot.files(self) if self.main or self.recipe.train.shard else {}
        if self.main:
            checkpoint.save(self.checkpoints, self.total, files, snapshot.state(self))
            checkpoint.prune(self.checkpoints, self.recipe.train.keep_last, self.best.step)
        distributed.wait()


def _names(data: str | tuple[str, ...]) -> tuple[str, ...]:
    return (data,) if isinstance(data, str) else data
