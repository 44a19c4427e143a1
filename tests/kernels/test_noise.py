"""Counter-based noise: Philox-4x32-10 and the exact normal transform, against a scalar transcription of both."""

from __future__ import annotations

import numpy as np
import pytest
from fewstep_kernels import noise
from fewstep_kernels.noise import reference
from scipy import stats

SEED = 0x1234_5678_9ABC_DEF0
STREAM = 0xDEADBEEF
SAMPLES = np.array([0, 5, 7 << 32 | 0xFFFFFFFF, 1 << 40, (2**31 - 1) << 32], np.int64)


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds in Python integers, as the SC 2011 paper writes them."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second % 2**32, first >> 32 ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def scalar_words(sample: int, n: int) -> list[int]:
    key = [SEED % 2**32, SEED >> 32]
    groups = (scalar_philox([g, STREAM, sample % 2**32, sample >> 32], key) for g in range(-(-n // 4)))
    return [word for group in groups for word in group][:n]


def rounded(value: int) -> np.float32:
    """Correctly rounded float32: float64 holds every integer below 2^53 and rounds to nearest even from there."""
    return np.float32(float(value))


def scalar_polynomial(x: np.float32, coefficients: str) -> np.float32:
    value = np.float32(0)
    for word in reversed(coefficients.split()):
        value = np.float32(value * x) + np.float32(float.fromhex(word))
    return value


def scalar_pair(x: int, y: int) -> tuple[np.float32, np.float32]:
    """One Box-Muller pair, every operation rounded to float32 on its own."""
    u = rounded(x) * np.float32(2.0**-32) + np.float32(2.0**-33)
    bits = int(u.view(np.int32))
    e = (bits - 0x3F3504F3) >> 23
    f = np.int32(bits - (e << 23)).view(np.float32) - np.float32(1)
    p = scalar_polynomial(
        f,
        "0x1.0p+0 -0x1.fffff8p-2 0x1.55554p-2 -0x1.00041ep-2 0x1.99aa68p-3 "
        "-0x1.542e06p-3 0x1.220304p-3 -0x1.0e9664p-3 0x1.0aa194p-3 -0x1.40bf02p-4",
    )
    log = np.float32(e) * np.float32(0.693359375) + (np.float32(e) * np.float32(-2.12194440e-4) + f * p)
    radius = np.float32(np.sqrt(np.float64(np.float32(-2) * log)))
    q = ((y + 2**29) % 2**32) >> 30
    d = (y - (q << 30)) % 2**32
    r = rounded(d - 2**32 if d >= 2**31 else d) * np.float32(2.0**-30)
    s = r * r
    sine = r * scalar_polynomial(s, "0x1.921fb6p+0 -0x1.4abbcep-1 0x1.466bbap-4 -0x1.32ca9ep-8 0x1.4bc89ap-13")
    cosine = scalar_polynomial(s, "0x1.0p+0 -0x1.3bd3ccp+0 0x1.03c1dcp-2 -0x1.55c57cp-6 0x1.d9c364p-11")
    across, up = (sine, cosine) if q % 2 else (cosine, sine)
    return radius * (-across if q in (1, 2) else across), radius * (-up if q in (2, 3) else up)


def box_muller_float64(words: np.ndarray) -> np.ndarray:
    u = reference._unit(words[0::2]).astype(np.float64)  # the uniform is what it is; its logarithm is on trial
    angle = words[1::2].astype(np.float64) * (2 * np.pi * 2.0**-32)
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ("00000000 00000000 00000000 00000000", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", 0x299F31D0_A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, answer):
    counter = np.array([int(word, 16) for word in counter.split()], np.uint32)
    assert [f"{word:08x}" for word in noise.philox(counter, key)] == answer.split()
    stacked = noise.philox(np.tile(counter, (2, 3, 1)), key)
    assert stacked.shape == (2, 3, 4) and (stacked == noise.philox(counter, key)).all()


def test_words_are_philox_of_element_stream_and_sample():
    words = noise.words(SEED, STREAM, SAMPLES, 11)
    assert words.dtype == np.uint32
    assert words.tolist() == [scalar_words(int(sample), 11) for sample in SAMPLES]


def test_normals_equal_the_scalar_transform_bit_for_bit():
    normals = noise.normal(SEED, STREAM, SAMPLES, 203)
    for sample, row in zip(SAMPLES, normals, strict=True):
        words = scalar_words(int(sample), 204)
        expected = np.array([scalar_pair(words[i], words[i + 1]) for i in range(0, 204, 2)], np.float32).reshape(-1)
        assert (bits(row) == bits(expected[:203])).all()


def test_the_transform_holds_at_the_ends_of_the_range_and_at_the_quarter_turns():
    xs = [0, 1, 2**24 + 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    ys = [0, 1, 2**29 - 1, 2**29, 2**29 + 1, 3 * 2**29 - 1, 3 * 2**29, 2**31, 5 * 2**29, 7 * 2**29, 2**32 - 1]
    x, y = (grid.reshape(-1) for grid in np.meshgrid(np.array(xs, np.uint32), np.array(ys, np.uint32)))
    pairs = np.stack(reference._box_muller(x, y), axis=-1)
    expected = np.array([scalar_pair(int(a), int(b)) for a, b in zip(x, y, strict=True)])
    assert (bits(pairs) == bits(expected)).all()
    assert np.abs(pairs).max() == pytest.approx(np.sqrt(66 * np.log(2)), abs=1e-6)


def test_uniform_is_in_the_half_open_interval_and_comes_from_the_word_alone():
    u = noise.uniform(SEED, STREAM, SAMPLES, 1000)
    expected = [[rounded(w) * np.float32(2.0**-32) + np.float32(2.0**-33) for w in row[:64]]
                for row in noise.words(SEED, STREAM, SAMPLES, 64).tolist()]  # fmt: skip
    assert u.dtype == np.float32 and (u[:, :64] == np.array(expected)).all()
    ends = reference._unit(np.array([0, 2**32 - 1], np.uint32))
    assert ends.tolist() == [2.0**-33, 1.0]


def test_numpy_rounds_square_roots_and_word_conversion_correctly():
    values = np.random.default_rng(0).uniform(0, 45, 200_000).astype(np.float32)
    # float64 has more than 2 * 24 + 2 bits, so rounding its root once more is still correct rounding.
    assert (bits(np.sqrt(values)) == bits(np.sqrt(values.astype(np.float64)).astype(np.float32))).all()
    words = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    assert (words.astype(np.float32) == words.astype(np.float64).astype(np.float32)).all()


@pytest.mark.parametrize("function", [noise.words, noise.uniform, noise.normal])
def test_a_shorter_sample_is_a_prefix_of_a_longer_one(function):
    long = function(SEED, STREAM, SAMPLES, 101)
    for n in (0, 1, 2, 3, 4, 5, 64, 100):
        assert (function(SEED, STREAM, SAMPLES, n) == long[:, :n]).all()
        assert function(SEED, STREAM, SAMPLES, n).shape == (len(SAMPLES), n)


@pytest.mark.parametrize("function", [noise.words, noise.uniform, noise.normal])
def test_a_row_does_not_depend_on_the_rows_beside_it(function):
    samples = np.arange(300, dtype=np.int64)
    n = 130  # 300 rows of 33 counters: more than one block
    together = function(SEED, STREAM, samples, n)
    assert (function(SEED, STREAM, samples[::-1], n) == together[::-1]).all()
    assert all((function(SEED, STREAM, samples[i : i + 1], n)[0] == together[i]).all() for i in (0, 247, 248, 299))
    assert function(SEED, STREAM, samples[:0], n).shape == (0, n)


def test_every_part_of_the_address_changes_the_numbers():
    base = noise.words(SEED, STREAM, SAMPLES[1:2], 64)
    others = [
        noise.words(SEED ^ 1, STREAM, SAMPLES[1:2], 64),
        noise.words(SEED ^ 1 << 63, STREAM, SAMPLES[1:2], 64),
        noise.words(SEED, STREAM ^ 1 << 31, SAMPLES[1:2], 64),
        noise.words(SEED, STREAM, SAMPLES[1:2] ^ 1, 64),
        noise.words(SEED, STREAM, SAMPLES[1:2] ^ 1 << 62, 64),
    ]
    assert all((base != other).mean() > 0.9 for other in others)


def test_normals_are_within_6e_7_of_box_muller_in_float64_on_the_same_uniforms():
    samples = np.arange(4, dtype=np.int64)
    normals = noise.normal(SEED, STREAM, samples, 100_000)
    exact = [box_muller_float64(row) for row in noise.words(SEED, STREAM, samples, 100_000)]
    assert np.abs(normals - np.stack(exact)).max() < 6e-7


def test_normals_have_the_moments_law_and_independence_of_a_standard_normal():
    z = noise.normal(SEED, STREAM, np.arange(1000, dtype=np.int64), 1000).astype(np.float64)
    n, flat = z.size, z.reshape(-1)
    assert abs(flat.mean()) < 4 / np.sqrt(n)
    assert abs(flat.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.skew(flat)) < 4 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(flat)) < 4 * np.sqrt(24 / n)
    assert stats.kstest(flat, "norm").pvalue > 0.01
    for lag in (1, 2, 4):
        assert abs((z[:, :-lag] * z[:, lag:]).mean()) < 4 / np.sqrt(n)
    assert abs((z[:-1] * z[1:]).mean()) < 4 / np.sqrt(n)


def test_uniforms_have_the_uniform_law():
    u = noise.uniform(SEED, STREAM, np.arange(1000, dtype=np.int64), 1000).reshape(-1)
    assert stats.kstest(u, "uniform").pvalue > 0.01
