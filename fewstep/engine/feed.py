"""Which samples come at a step. The order depends on (seed, source, epoch) alone, so a resumed run sees the same rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..data.source import Source
from ..draws import Draw, order
from ..errors import UserError
from ..methods.base import Selection


class Feed:
    """Serves global batches of `batch` ids from a source or from a method's selection of it.

    An epoch holds floor(n / batch) full batches, at least one (a small selection wraps around). `shuffle=False` goes
    through the ids once in order and ends with a shorter batch: offline stages.

    Where the source has buckets a batch holds one of them, and an epoch holds the full batches of each, mixed. A bucket
    smaller than a batch is left out, with a warning.
    """

    def __init__(self, source: Source, name: str, seed: int, batch: int, shuffle: bool = True):
        self.source, self.name, self.seed, self.batch, self.shuffle = source, name, seed, batch, shuffle
        self.epoch, self.offset = 0, 0
        self._order: np.ndarray | None = None
        self.select(None)

    def select(self, selection: Selection | None) -> None:
        """Serves these ids from now on (None: all of the source). UserError when there are none."""
        chosen = selection if selection is not None else Selection(torch.arange(len(self.source)))
        if len(chosen.ids) == 0:
            raise UserError(
                f"data.{self.name} serves no sample: the set is empty, or the method's selection keeps nothing"
            )
        if len(chosen.ids) % chosen.group or (self.shuffle and self.batch % chosen.group):
            raise UserError(
                f"data.{self.name} comes in groups of {chosen.group}: choose train.batch as a multiple of it"
            )
        self._hold(chosen)
        self._check_buckets()

    def _hold(self, selection: Selection) -> None:
        self.selection, self._order = selection, None
        buckets = self.source.buckets if self.shuffle else None
        self._buckets = None if buckets is None else buckets[selection.ids].numpy()

    def _check_buckets(self) -> None:
        if self._buckets is None:
            return
        if self.selection.group > 1:
            raise UserError(f"data.{self.name} comes in groups, which buckets would split: set `buckets: false`")
        if not self.per_epoch:
            raise UserError(
                f"data.{self.name}: no bucket holds a batch of {self.batch}: lower train.batch, or set `buckets: false`"
            )
        counts = np.bincount(self._buckets)
        lost = counts[counts < self.batch].sum()
        if lost:
            warnings.warn(
                f"data.{self.name}: left out {lost} of {len(self._buckets)} samples, whose buckets hold less than a batch "
                f"of {self.batch}",
                stacklevel=3,
            )

    @property
    def per_epoch(self) -> int:
        """Batches in the present epoch."""
        if self._buckets is not None:
            return int((np.bincount(self._buckets) // self.batch).sum())
        n = len(self.selection.ids)
        return max(1, n // self.batch) if self.shuffle else -(-n // self.batch)

    def next(self) -> np.ndarray:
        """Positions in the selection for the next global batch; ends an epoch by moving `offset` to `per_epoch`."""
        if self._order is None:
            self._order = self._epoch_order()
        positions = self._order[self.offset * self.batch : (self.offset + 1) * self.batch]
        self.offset += 1
        return positions

    @property
    def ended(self) -> bool:
        """Whether the epoch has no batch left; call `start_epoch` then."""
        return self.offset >= self.per_epoch

    def start_epoch(self) -> None:
        """Goes to the next epoch."""
        self.epoch, self.offset, self._order = self.epoch + 1, 0, None

    def _epoch_order(self) -> np.ndarray:
        n, group = len(self.selection.ids), self.selection.group
        if not self.shuffle:
            return np.arange(n)
        if self._buckets is not None:
            return self._bucketed_order(self._buckets)
        groups = np.concatenate(
            [order(self.seed, self.epoch, n // group, f"{self.name}.{lap}") for lap in range(-(-self.batch // n))]
        )
        return (groups[:, None] * group + np.arange(group)).reshape(-1)

    def _bucketed_order(self, buckets: np.ndarray) -> np.ndarray:
        """Each bucket in an order of its own, cut into full batches; then the batches of all in one order."""
        batches = []
        for bucket, n in enumerate(np.bincount(buckets)):
            members = np.flatnonzero(buckets == bucket)[order(self.seed, self.epoch, n, f"{self.name}.bucket{bucket}")]
            batches.append(members[: n - n % self.batch].reshape(-1, self.batch))
        every = np.concatenate(batches)
        return every[order(self.seed, self.epoch, len(every), f"{self.name}.batches")].reshape(-1)

    def rows(self, positions: np.ndarray, draw: Draw | None) -> Batch:
        """The rows at these positions of the selection, fetched from the source."""
        index = torch.from_numpy(positions)
        ids = self.selection.ids[index]
        fields = dict(self.source.fetch(ids, draw))
        weights = self.selection.weights
        fields["weights"] = weights[index] if weights is not None else torch.ones(len(ids))
        return Batch(ids, fields)

    def state(self) -> dict[str, Tensor]:
        """Place in the epoch and the selection, for a checkpoint."""
        state = {"place": torch.tensor([self.epoch, self.offset, self.selection.group]), "ids": self.selection.ids}
        return {**state, "weights": self.selection.weights} if self.selection.weights is not None else state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.epoch, self.offset, group = (int(v) for v in state["place"])
        self._hold(Selection(state["ids"], state.get("weights"), group))


class Feeds(Mapping[str, Feed]):
    """The sources of one stage, stepped together."""

    def __init__(self, feeds: Mapping[str, Feed]):
        self._feeds = dict(feeds)

    def __getitem__(self, name: str) -> Feed:
        return self._feeds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def batch(self, positions: Mapping[str, np.ndarray], draw: Draw) -> Batch:
        """One source: its rows. Several: a Batch whose fields are the sources' batches, with the first one's ids."""
        rows = {name: self[name].rows(p, draw.within(f"data.{name}")) for name, p in positions.items()}
        if len(rows) == 1:
            return next(iter(rows.values()))
        return Batch(next(iter(rows.values())).ids, rows)
