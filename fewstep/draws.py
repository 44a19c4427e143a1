"""Addressed randomness: every random number of a run is a function of (seed, step, slot, name) and of nothing else.

The slot is the row's place in the step's global batch (at inference: the image's index). So a run that resumes at step
k, on another number of processes or with another micro-batch, sees the numbers it would have seen.
"""

from __future__ import annotations

import copy
import hashlib
from functools import lru_cache
from typing import Literal, overload

import numpy as np
import torch
from fewstep_kernels import noise
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Per = Literal["row", "step"]
WHOLE_STEP = 0xFFFFFFFF  # the slot of numbers that all rows of a step share


class AddressUsed(RuntimeError):
    """A programming error: one address is drawn twice in a step, so two places would get equal numbers."""


class Draw:
    """The random numbers of one micro-batch.

        eps = draw.normal("eps", 3, 32, 32)                  # [rows, 3, 32, 32]
        u = draw.uniform("u", low=0.02)                      # [rows]
        level = draw.integers("level", 4, per="step")        # one int, the same on every rank
        with_dm = draw.within("dm").normal("eps", 3, 32, 32) # other numbers than "eps"

    Tensors lie on `device`. `integers` and `choice` per step give Python numbers, made on the host, so that a branch on
    them waits for nothing. Each full name (scope and name) may be drawn once; a second time raises AddressUsed.

    seed: 64 bits. step: of the run, 0 .. 2^31 - 1. slots [rows]: places in the step's global batch, 0 .. 2^32 - 2.
    """

    def __init__(
        self, seed: int, step: int, slots: ArrayLike | Tensor, device: torch.device | str = "cpu", scope: str = ""
    ):
        slots = np.asarray(slots.cpu() if isinstance(slots, Tensor) else slots, dtype=np.int64)
        if not 0 <= step < 2**31:
            raise ValueError(f"step is {step}; an address holds 0 .. 2^31 - 1")
        if slots.ndim != 1 or (len(slots) and not 0 <= slots.min() <= slots.max() < WHOLE_STEP):
            raise ValueError("slots is one number a row, 0 .. 2^32 - 2")
        self.seed, self.step, self.device = seed, step, torch.device(device)
        self._samples = {"row": slots | step << 32, "step": np.array([step << 32 | WHOLE_STEP], np.int64)}
        self._scope = scope
        self._used: dict[int, str] = {}

    @classmethod
    def for_images(
        cls, seed: int, indices: ArrayLike | Tensor, device: torch.device | str = "cpu", scope: str = ""
    ) -> Draw:
        """The numbers of images `indices`: image i is the same whichever images are drawn beside it."""
        return cls(seed, 0, indices, device, scope)

    @property
    def rows(self) -> int:
        """Rows of this micro-batch."""
        return len(self._samples["row"])

    def within(self, name: str) -> Draw:
        """The same rows with names prefixed by `name.`; what is drawn there counts as drawn here."""
        inner = copy.copy(self)
        inner._scope = self._full(name)
        return inner

    def normal(self, name: str, *row_shape: int, per: Per = "row") -> Tensor:
        """Standard normals, float32: [rows, *row_shape], or [*row_shape] per step."""
        values = noise.normal(self.seed, self._claim(name), self._samples[per], _size(row_shape))
        return self._place(values, row_shape, per)

    def uniform(
        self,
        name: str,
        *row_shape: int,
        per: Per = "row",
        low: float | Tensor = 0.0,
        high: float | Tensor = 1.0,
    ) -> Tensor:
        """Uniform in (low, high], float32: [rows, *row_shape], or [*row_shape] per step. Bounds: numbers or [rows]."""
        values = noise.uniform(self.seed, self._claim(name), self._samples[per], _size(row_shape))
        u = self._place(values, row_shape, per)
        if isinstance(low, float | int) and isinstance(high, float | int) and (low, high) == (0, 1):
            return u
        low, high = self._bound(low, u), self._bound(high, u)
        # Rounding may land on low or beyond high.
        return (low + (high - low) * u).clamp(torch.nextafter(low, high), high)

    @overload
    def integers(self, name: str, n: int, *row_shape: int, per: Literal["row"] = "row") -> Tensor: ...
    @overload
    def integers(self, name: str, n: int, *, per: Literal["step"]) -> int: ...
    @overload
    def integers(self, name: str, n: int, length: int, /, *row_shape: int, per: Literal["step"]) -> Tensor: ...
    def integers(self, name: str, n: int, *row_shape: int, per: Per = "row") -> Tensor | int:
        """Uniform on 0 .. n-1 (bias below n / 2^64), int64: [rows, *row_shape]; per step [*row_shape] or an int."""
        if not 1 <= n <= 2**31:
            raise ValueError(f"integers('{name}', {n}): n is 1 .. 2^31")
        values = _integers(n, *_wide(self.seed, self._claim(name), self._samples[per], _size(row_shape)))
        if per == "step" and not row_shape:
            return int(values[0, 0])
        return self._place(values, row_shape, per)

    @overload
    def choice(self, name: str, probability: float | Tensor, per: Literal["row"] = "row") -> Tensor: ...
    @overload
    def choice(self, name: str, probability: float, per: Literal["step"]) -> bool: ...
    def choice(self, name: str, probability: float | Tensor, per: Per = "row") -> Tensor | bool:
        """True with `probability` (a number or [rows]); bool [rows], or a Python bool per step."""
        values = noise.uniform(self.seed, self._claim(name), self._samples[per], 1)
        if per == "step":
            return bool(values[0, 0] <= probability)
        return self._place(values, (), per) <= probability

    def permutation(self, name: str, n: int) -> Tensor:
        """A random order of 0 .. n-1, int64 [n], the same on every rank."""
        return self._place(_permutation(self.seed, self._claim(name), self._samples["step"], n)[None], (n,), "step")

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator seeded from a per-step address, for library code that insists on one."""
        high, low = _wide(self.seed, self._claim(name), self._samples["step"], 1)
        return torch.Generator().manual_seed(int(high[0, 0]) << 31 | int(low[0, 0]) >> 1)

    def _full(self, name: str) -> str:
        return f"{self._scope}.{name}" if self._scope else name

    def _claim(self, name: str) -> int:
        """The stream of `name`, marked as used."""
        full = self._full(name)
        stream = _stream(full)
        if stream in self._used:
            other = self._used[stream]
            why = f"'{full}' is drawn twice" if other == full else f"'{full}' and '{other}' hash alike: rename one"
            raise AddressUsed(f"step {self.step}: {why}")
        self._used[stream] = full
        return stream

    def _place(self, values: NDArray, row_shape: tuple[int, ...], per: Per) -> Tensor:
        shape = row_shape if per == "step" else (self.rows, *row_shape)
        return torch.from_numpy(values).reshape(shape).to(self.device, non_blocking=True)

    def _bound(self, bound: float | Tensor, like: Tensor) -> Tensor:
        """`bound` as float32 that broadcasts over rows."""
        if not isinstance(bound, Tensor):
            return torch.full((), bound, dtype=torch.float32, device=like.device)  # a fill: no copy to wait for
        bound = bound.to(like.device, torch.float32)
        return bound.reshape(-1, *[1] * (like.ndim - 1)) if bound.ndim else bound


@lru_cache(maxsize=1)
def order(seed: int, epoch: int, n: int, name: str = "order") -> NDArray[np.int64]:
    """A random order of 0 .. n-1 that depends on (seed, epoch, name) alone. Read-only, and kept for the next call."""
    # The prefix keeps these streams apart from those of a step with the number of this epoch.
    samples = np.array([epoch << 32 | WHOLE_STEP], np.int64)
    permutation = _permutation(seed, _stream(f"epoch:{name}"), samples, n)
    permutation.flags.writeable = False
    return permutation


def _stream(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def _size(row_shape: tuple[int, ...]) -> int:
    return int(np.prod(row_shape, dtype=np.int64))


def _wide(seed: int, stream: int, samples: NDArray, n: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """n numbers of 64 bits for each sample, as their high and low words: two of [rows, n]."""
    pairs = noise.words(seed, stream, samples, 2 * n).astype(np.uint64)
    return pairs[:, 0::2], pairs[:, 1::2]


def _integers(n: int, high: NDArray[np.uint64], low: NDArray[np.uint64]) -> NDArray[np.int64]:
    """floor(n w / 2^64) of w = 2^32 high + low in 64-bit arithmetic (Lemire, arXiv:1805.10941, without rejection)."""
    half, factor = np.uint64(32), np.uint64(n)
    return ((high * factor + (low * factor >> half)) >> half).astype(np.int64)


def _permutation(seed: int, stream: int, samples: NDArray, n: int) -> NDArray[np.int64]:
    high, low = _wide(seed, stream, samples, n)
    return np.argsort(high[0] << np.uint64(32) | low[0], kind="stable")
