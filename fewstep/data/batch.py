"""What a source hands to a method: rows of tensors, each row with the id of its sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Cond(Mapping[str, Tensor]):
    """What a network is conditioned on: named tensors with the rows first, e.g. `Cond(label=y)`.

    A second time, an embedded guidance, a mask are further fields: `cond.with_(guidance=g)`. Rows are cut with
    `cond[2:5]` and stacked with `Cond.cat([a, b])`; a field is read as `cond["label"]`. An empty Cond is unconditional.
    """

    def __init__(self, **fields: Tensor):
        self._fields = fields

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._fields[key]
        return Cond(**{name: value[key] for name, value in self._fields.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        return f"Cond({', '.join(f'{name}={tuple(value.shape)}' for name, value in self._fields.items())})"

    def with_(self, **fields: Tensor) -> Cond:
        """A copy with these fields added or replaced."""
        return Cond(**{**self._fields, **fields})

    def to(self, device: torch.device | str) -> Cond:
        """A copy on `device`."""
        return Cond(**{name: value.to(device) for name, value in self._fields.items()})

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Rows of several conds, one after the other; all have the same fields.

        With a `mask` [rows, length] among them, shorter texts are padded with zeros to the longest.
        """
        if "mask" in conds[0]:
            conds = _as_long(conds)
        return Cond(**{name: torch.cat([cond[name] for cond in conds]) for name in conds[0]})


def _as_long(conds: Sequence[Cond]) -> list[Cond]:
    """Zeros after the texts, in the fields that are as long as the mask everywhere."""
    lengths = [cond["mask"].shape[1] for cond in conds]
    texts = [n for n in conds[0] if all(cond[n].shape[1:2] == (length,) for cond, length in zip(conds, lengths))]
    return [cond.with_(**{n: _padded(cond[n], max(lengths)) for n in texts}) for cond in conds]


def _padded(value: Tensor, length: int) -> Tensor:
    more = length - value.shape[1]
    return torch.cat([value, value.new_zeros(len(value), more, *value.shape[2:])], 1) if more else value


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch. `ids` [rows] are sample ids (int64); fields are read as attributes: `batch.x0`, `batch.cond`.

    With several named sources a stage's batch holds one Batch a name: `batch.prompts`, `batch.real`.
    `weights` [rows] are the selection's sample weights, all ones unless a method selects.
    """

    ids: Tensor
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "fields":
            raise AttributeError(name)
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(f"this batch has no '{name}'; it has {sorted(self.fields)}") from None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """A copy on `device`; ids stay on the host, where stores are read."""
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.fields.items()}
        return Batch(self.ids, moved)
