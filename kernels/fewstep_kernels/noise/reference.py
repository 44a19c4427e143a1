"""Counter-based uniform and normal numbers, equal bit for bit on every machine (number format `fn1`).

Words come from Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key = (seed lo, seed hi),  counter = (element // 4, stream, sample lo, sample hi)

and the four words of a counter are elements 4g .. 4g+3 of that sample. So neither the batch nor the device enters, and
the first n elements of a longer sample are the sample of length n. Normals are Box-Muller pairs made only of operations
that IEEE 754 rounds correctly (+, *, int -> float32, sqrt), each rounded to float32 on its own. numpy fuses nothing;
a compiler that contracts a*b + c would change bits, so these functions must not be traced.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

FORMAT = "fn1"

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
F32 = NDArray[np.float32]

_MASK = 0xFFFFFFFF
_LOW = np.uint64(_MASK)
_HALF = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK = 8192  # counters at a time: their words stay in the L2 cache


def philox(counter: U32, key: int) -> U32:
    """Philox-4x32-10: counter [..., 4] uint32 and a 64-bit key give [..., 4] uint32."""
    flat = counter.reshape(-1, 4).astype(np.uint64).T
    even, odd = np.ascontiguousarray(flat[0::2]), np.ascontiguousarray(flat[1::2])
    _scramble(even, odd, key)
    return np.stack([even[0], odd[0], even[1], odd[1]], axis=-1).astype(np.uint32).reshape(counter.shape)


def words(seed: int, stream: int, samples: NDArray[np.int64], n: int) -> U32:
    """The first n 32-bit words of each sample: [rows, n].

    seed: 64 bits. stream: 32 bits, what the numbers are for. samples [rows]: 64-bit sample numbers, as int64.
    """
    out = np.empty((*samples.shape, _groups(n), 4), np.uint32)
    flat = out.reshape(-1, 4)
    for block, even, odd in _blocks(seed, stream, samples, n):
        flat[block, 0::2], flat[block, 1::2] = even.T, odd.T
    return _first(out, n)


def uniform(seed: int, stream: int, samples: NDArray[np.int64], n: int) -> F32:
    """u = fl(word) 2^-32 + 2^-33, in (0, 1]: [rows, n] float32. Arguments as in `words`."""
    return _unit(words(seed, stream, samples, n))


def normal(seed: int, stream: int, samples: NDArray[np.int64], n: int) -> F32:
    """Standard normals [rows, n] float32. Arguments as in `words`.

    Words (0, 1) of a counter give elements 0 and 1, words (2, 3) elements 2 and 3. The largest absolute value is 6.77;
    the distance from Box-Muller in float64 on the same u is about 6e-7.
    """
    out = np.empty((*samples.shape, _groups(n), 4), np.float32)
    flat = out.reshape(-1, 4)
    for block, even, odd in _blocks(seed, stream, samples, n):
        cosine, sine = _box_muller(even.astype(np.uint32), odd.astype(np.uint32))
        flat[block, 0::2], flat[block, 1::2] = cosine.T, sine.T
    return _first(out, n)


def _groups(n: int) -> int:
    return -(-n // 4)


def _first(out: NDArray, n: int) -> NDArray:
    rows = out.shape[0]
    return np.ascontiguousarray(out.reshape(rows, out.shape[1] * 4)[:, :n])


def _blocks(seed: int, stream: int, samples: NDArray[np.int64], n: int) -> Iterator[tuple[slice, U64, U64]]:
    """Words 0, 2 and words 1, 3 of the counters [2, block], with the place of the block among all rows * groups."""
    groups = _groups(n)
    sample = np.repeat(samples.astype(np.int64, copy=False).view(np.uint64), groups)
    group = np.tile(np.arange(groups, dtype=np.uint64), len(samples))
    for start in range(0, len(sample), _BLOCK):
        block = slice(start, start + _BLOCK)
        even, odd = np.empty((2, 2, len(sample[block])), np.uint64)
        even[0], odd[0] = group[block], stream & _MASK
        np.bitwise_and(sample[block], _LOW, out=even[1])
        np.right_shift(sample[block], _HALF, out=odd[1])
        _scramble(even, odd, seed)
        yield block, even, odd


def _scramble(even: U64, odd: U64, key: int) -> None:
    """Ten rounds in place. `even` holds words 0 and 2, `odd` words 1 and 3, each [2, n] with 32 bits used of 64."""
    low, high = key & _MASK, key >> 32 & _MASK
    product = np.empty_like(even)
    crossed = product[::-1]  # the product of word 0 goes into words 2 and 3, and the other way round
    for _ in range(_ROUNDS):
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(crossed, _HALF, out=even)
        even ^= odd
        even ^= np.array([[low], [high]], np.uint64)
        np.bitwise_and(crossed, _LOW, out=odd)
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK


def _hex(*coefficients: str) -> list[np.float32]:
    return [np.float32(float.fromhex(c)) for c in coefficients]


# Least-maximum fits, low order first: ln(1 + f) = f P(f); sin and cos of r quarter turns, r^2 = s, are r S(s) and C(s).
_LOG = _hex(
    "0x1.0p+0", "-0x1.fffff8p-2", "0x1.55554p-2", "-0x1.00041ep-2", "0x1.99aa68p-3",
    "-0x1.542e06p-3", "0x1.220304p-3", "-0x1.0e9664p-3", "0x1.0aa194p-3", "-0x1.40bf02p-4",
)  # fmt: skip
_SIN = _hex("0x1.921fb6p+0", "-0x1.4abbcep-1", "0x1.466bbap-4", "-0x1.32ca9ep-8", "0x1.4bc89ap-13")
_COS = _hex("0x1.0p+0", "-0x1.3bd3ccp+0", "0x1.03c1dcp-2", "-0x1.55c57cp-6", "0x1.d9c364p-11")
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_SQRT_HALF = np.int32(0x3F3504F3)  # bits of sqrt(1/2): the mantissa is taken in [sqrt(1/2), sqrt(2))


def _horner(x: F32, coefficients: list[np.float32]) -> F32:
    value = x * coefficients[-1]
    value += coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value *= x
        value += coefficient
    return value


def _unit(word: U32) -> F32:
    u = word.astype(np.float32)
    u *= np.float32(2.0**-32)
    u += np.float32(2.0**-33)
    return u


def _log(u: F32) -> F32:
    """ln u for u in (0, 1]: u = 2^e (1 + f), and ln 2 in two parts of which the first times e is exact."""
    bits = u.view(np.int32)
    exponent = (bits - _SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).view(np.float32)
    f -= np.float32(1)
    e = exponent.astype(np.float32)
    value = _horner(f, _LOG)
    value *= f
    value += e * _LN2_LOW
    e *= _LN2_HIGH
    value += e
    return value


def _box_muller(x: U32, y: U32) -> tuple[F32, F32]:
    """(R cos a, R sin a) with R = sqrt(-2 ln u(x)) and a = 2 pi y / 2^32."""
    radius = _log(_unit(x))
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    turn = y + np.uint32(1 << 29)  # bits 30 and 31: the quarter; the rest: the place in it, from -1/2
    r = ((turn & np.uint32(0x3FFFFFFF)).view(np.int32) - np.int32(1 << 29)).astype(np.float32)
    r *= np.float32(2.0**-30)
    square = r * r
    sine = _horner(square, _SIN)
    sine *= r
    sine *= radius
    cosine = _horner(square, _COS)
    cosine *= radius
    odd = (turn & np.uint32(1 << 30)).astype(bool)
    return (
        _negated(np.where(odd, sine, cosine), turn + np.uint32(1 << 30)),
        _negated(np.where(odd, cosine, sine), turn),
    )


def _negated(value: F32, sign: U32) -> F32:
    """-value where bit 31 of `sign` is set."""
    bits = value.view(np.uint32)
    bits ^= sign & np.uint32(1 << 31)
    return value
