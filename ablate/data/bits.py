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


def bits(seed: int, stream: int, rows: np.ndarray, columns: int, first: int = 0) -> np.ndarray:
    """uint64 (len(rows), columns): columns first, first+1, … of the given rows of a stream."""
    key = _mix(np.array([seed], np.uint64) * np.uint64(8) + np.uint64(stream))
    base = _mix(rows.astype(np.uint64) * _GOLDEN + _mix(key * _GOLDEN))
    counter = np.arange(first + 1, first + 1 + columns, dtype=np.uint64) * _GOLDEN
    return _mix(base[:, None] + counter)


def below(x: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """int64 in [0, n) from random bits; n < 2**31 (bias below n / 2**32)."""
    return (((x >> np.uint64(32)) * np.asarray(n, np.uint64)) >> np.uint64(32)).astype(np.int64)


def unit(x: np.ndarray) -> np.ndarray:
    """float64 in (0, 1) from random bits."""
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def permutation(seed: int, index: int, n: int) -> np.ndarray:
    """int64 (n,): the index-th shuffle of range(n) under a seed."""
    return np.argsort(bits(seed, ORDER, np.array([index]), n)[0], kind="stable")
