"""What a YAML recipe may say, typed. Loading one resolves overrides (`a.b=c`), names, and the method's own config.

Top-level keys are those of `Recipe` and the names of the method's roles:

    method: decoupled_dmd
    teacher: {from: runs/teacher/model}
    student: {tune: lora, lora: {rank: 32}}
    config: {steps: 4, guidance_scale: 1.5}
    data: {train: {source: labels, classes: 10}}
    train: {steps: 2000, batch: 128}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from .errors import UserError, nearest
from .methods.base import Method
from .methods.registry import METHODS
from .models.build import parse
from .roles import RoleSpec


class TrainSpec(BaseModel):
    """Length, sizes and habits of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: int = Field(gt=0, description="optimiser steps of a stage that says no length of its own")
    batch: int = Field(gt=0, description="rows of one step, over all processes")
    micro_batch: int | None = Field(
        default=None, gt=0, description="rows of one forward pass; default: batch / processes"
    )
    save_every: int | None = Field(
        default=None, gt=0, description="steps between checkpoints; default: at the end only"
    )
    keep_last: int = Field(default=2, gt=0, description="checkpoints kept besides the best")
    log_every: int = Field(default=10, gt=0)
    seed: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the networks' inside; maths stays in float32"
    )
    shard: bool = Field(
        default=False, description="each process holds a part of every network (FSDP2); adapters stay whole"
    )
    offload_activations: bool = Field(
        default=False,
        description="what the backward pass needs waits in the host's memory: slower, for less of a GPU's",
    )
    check_export: bool = Field(
        default=True, description="reload the exported folder in a fresh process and compare images"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []


class ValidateSpec(BaseModel):
    """`validate: {every: 500, source: test, metrics: [accuracy], best: accuracy}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    every: int = Field(gt=0)
    source: str = "train"
    metrics: list[str] = []
    n: int = Field(default=512, gt=0, description="rows, or samples drawn")
    best: str | None = Field(
        default=None, description="metric whose best checkpoint is kept; `-name` when smaller is better"
    )


class PreviewSpec(BaseModel):
    """Sample grids while training."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    every: int = Field(gt=0)
    n: int = Field(default=40, gt=0)


class GuardSpec(BaseModel):
    """Limits on what losses cannot say; `null` switches one off. A breach warns, the `patience`-th in a row stops the run.

    grad_norm: of any role, before clipping.  std_drift: |log(std / std at the first preview)| of generated samples.
    diversity: smallest ratio of pairwise distance to that of the first preview.  saturated: largest share of |x| > 1.
    nan: "skip" leaves out steps whose gradient is not finite, counts them as `skipped.ROLE`, and takes losses that are not
    finite for a breach, where "stop" ends the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    grad_norm: float | None = 1e4
    std_drift: float | None = 1.5
    diversity: float | None = 0.05
    saturated: float | None = 0.9
    nan: Literal["stop", "skip"] = "stop"
    patience: int = Field(default=3, gt=0)


class StagePatch(BaseModel):
    """What `stages: {NAME: {...}}` may change of a method's stage. `lr` is a factor on every role's learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: int | None = Field(default=None, gt=0)
    batch: int | None = Field(default=None, gt=0)
    lr: float | None = Field(default=None, gt=0)
    skip: bool = False


class EvaluationSpec(BaseModel):
    """How an exported model is scored when nobody says otherwise: `{features: NAME, reference: {source: ...}, reward: NAME}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    features: str | None = None
    reference: dict[str, Any] | None = None
    reward: str | dict[str, Any] | None = Field(
        default=None, description="of the metric `reward`: a name, or `{name: options}` as in config.reward"
    )


class Recipe(BaseModel):
    """A whole recipe. `roles` are written as top-level keys in YAML; `config` is the method's own typed config."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    method: str
    roles: dict[str, RoleSpec] = {}
    config: dict[str, Any] = {}
    data: dict[str, dict[str, Any]] = {}
    train: TrainSpec
    stages: dict[str, StagePatch] = {}
    validation: ValidateSpec | None = Field(default=None, alias="validate")
    preview: PreviewSpec | None = None
    guards: GuardSpec = GuardSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    stores: str | None = Field(
        default=None, description="folder of offline stores shared by runs; default: inside the run"
    )

    def build_method(self) -> Method:
        """The method with its config, before any network is loaded."""
        cls: type[Method] = METHODS.get(self.method)
        return cls(parse(cls.Config, self.config, "config"))

    def plain(self) -> dict[str, Any]:
        """The recipe as YAML holds it: roles at the top, defaults left out, the method's config in full."""
        said = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        roles = said.pop("roles", {})
        head = {"method": self.method, **roles}
        rest = {k: v for k, v in said.items() if k not in head}
        rest["config"] = self.build_method().config.model_dump(mode="json")
        return {**head, **rest}

    def write(self, file: Path) -> None:
        """Saves `plain()`; `load_recipe` reads it back to an equal recipe."""
        file.write_text(yaml.safe_dump(self.plain(), sort_keys=False))


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file (or mapping) with `a.b=c` overrides. UserError names key, value and what is allowed."""
    if isinstance(source, Recipe):
        if not overrides:
            return source
        source = source.plain()
    raw = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    for override in overrides:
        _override(raw, override)
    return resolve(raw)


def resolve(raw: Mapping[str, Any]) -> Recipe:
    """Types a plain mapping: sorts role names from the recipe's own keys and checks the method's config."""
    if "method" not in raw:
        raise UserError(f"the recipe names no method: write `method: NAME`; {nearest('', METHODS.names())}")
    cls: type[Method] = METHODS.get(str(raw["method"]))
    method = cls(parse(cls.Config, raw.get("config") or {}, "config"))
    roles = {role.key for role in method.roles()}
    keys = {field.alias or name for name, field in Recipe.model_fields.items()} - {"roles"}
    unknown = [key for key in raw if key not in keys | roles]
    if unknown:
        raise UserError(f"recipe: unknown key '{unknown[0]}': {nearest(str(unknown[0]), keys | roles)}")
    specs = {name: parse(RoleSpec, _role(raw[name]), name) for name in roles if name in raw}
    rest = {key: value for key, value in raw.items() if key not in roles}
    recipe = parse(Recipe, {**rest, "roles": {}}, "recipe")
    ordered = dict.fromkeys(role.key for role in method.roles())
    recipe = recipe.model_copy(update={"roles": {key: specs[key] for key in ordered if key in specs}})
    _check_stages(recipe, method)
    return recipe


def _role(said: Any) -> Any:
    return {"from": said} if isinstance(said, str) else said or {}


def _check_stages(recipe: Recipe, method: Method) -> None:
    names = [stage.name for stage in method.stages()]
    for name in recipe.stages:
        if name not in names:
            raise UserError(f"stages: '{recipe.method}' has no stage '{name}': {nearest(name, names)}")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"no recipe '{file}': give the path of a YAML file, e.g. configs/decoupled_dmd/digits.yaml")
    try:
        raw = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"'{file}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"'{file}' holds no recipe: it must be a mapping with `method:`")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"'{override}' is no override: write key.subkey=value")
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        inner = place.get(parent)
        if isinstance(inner, str) and place is raw:
            inner = {"from": inner}  # `teacher: FOLDER` is short for `teacher: {from: FOLDER}`
        if inner is None:
            inner = {}
        if not isinstance(inner, Mapping):
            raise UserError(f"cannot set '{path}': '{parent}' is {inner!r}, not a mapping")
        place[parent] = dict(inner)
        place = place[parent]
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        place[last] = text
