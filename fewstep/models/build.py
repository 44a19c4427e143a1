"""Reading the `build:` part of a recipe into a family's typed sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import UserError, nearest

T = TypeVar("T", bound=BaseModel)


def parse(model: type[T], said: Mapping[str, Any], where: str) -> T:
    """`said` as a `model`; the first mistake becomes one line that names field, value and what is allowed."""
    try:
        return model.model_validate(said)
    except ValidationError as error:
        raise UserError(explain(error, model, where)) from None


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line for the first mistake of a pydantic error: the nearest key for an unknown one, else value and reason."""
    errors = error.errors()
    first = next(
        (e for e in errors if e["type"] == "extra_forbidden"), errors[0]
    )  # a typo also makes its field missing
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key '{place}': {nearest(place.split('.')[-1], _keys(model, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{where}: '{place}' is missing"
    said = first["msg"].removeprefix("Value error, ")
    if not place:  # of several fields together: the message names them
        return f"{where}: {said}"
    return f"{where}: {place}={first['input']!r}: {said[0].lower()}{said[1:]}"


def _keys(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in loc:
        field = current.model_fields.get(part) if isinstance(current, type) and issubclass(current, BaseModel) else None
        current = field.annotation if field is not None else None
    if not (isinstance(current, type) and issubclass(current, BaseModel)):
        current = model
    return [f.alias or name for name, f in current.model_fields.items()]
