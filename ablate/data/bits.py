"""Counter-based random bits: every number is a function of (seed, stream, row, column) alone.

The generator is SplitMix64 (Steele, Lea, Flood 2014). Written out here so that the order of the
data never changes with a version of NumPy, and so that row i needs none of the rows before it.
"""

from __future__ import annotations

import numpy as np

ORDER, RECALL_TRAIN, RECALL_HELD_OUT = 1, 2, 3
"""Streams: numbers of different streams have nothing in common, whatever the seeds."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, in place; x is uint64."""
    x ^= x >> np.uint64(30)
    x *= _M1
    x ^= x >> np.uint64(27)
    x *= _M2
    x ^= x >> np.uint64(31)
    return x


def bits(seed: int, stream: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """uint64 (len(rows), columns): the first columns of the given rows of a stream."""
    key = _mix(np.array([seed], np.uint64) * np.uint64(8) + np.uint64(stream))
    base = _mix(rows.astype(np.uint64) * _GOLDEN + _mix(key * _GOLDEN))
    counter = np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN
    return _mix(base[:, None] + counter)


def words(seed: int, stream: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """uint32 (len(rows), columns), two out of each number of `bits`."""
    return bits(seed, stream, rows, -(-columns // 2)).view(np.uint32)[:, :columns]


def below(x: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """int64 in [0, n) from uint32 words; n < 2**31 (bias below n / 2**32)."""
    wide = x.astype(np.uint64)
    wide *= np.asarray(n, np.uint64)
    wide >>= np.uint64(32)
    return wide.view(np.int64)


def unit(x: np.ndarray) -> np.ndarray:
    """float64 in (0, 1) from uint32 words."""
    return (x + 0.5) * 2.0**-32


def permutation(seed: int, index: int, n: int) -> np.ndarray:
    """int64 (n,): the index-th shuffle of range(n) under a seed."""
    return np.argsort(bits(seed, ORDER, np.array([index]), n)[0], kind="stable")
