"""95% intervals: Wilson's for shares, the percentile bootstrap over prompts for everything else.

Owns the statistics only; never knows what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054
_RESAMPLES = 4000


class Interval(NamedTuple):
    """A value with the bounds of its 95% interval."""

    value: float
    low: float
    high: float


def wilson(hits: int, n: int) -> Interval:
    """The share `hits / n` with Wilson's score interval, which stays inside [0, 1] and is honest at 0 of n."""
    assert 0 <= hits <= n and n > 0
    p = hits / n
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * float(np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)))
    # At the ends the bound is the value itself; rounding must not put the value outside its interval.
    return Interval(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)))


def bootstrap(
    rows: npt.NDArray[np.float64], statistic: Callable[[npt.NDArray[np.float64]], float], seed: int = 0
) -> Interval:
    """`statistic(rows)` with a percentile interval over resampled rows (prompts); `rows` is `[n, ...]`."""
    rng = np.random.default_rng(seed)
    draws = [statistic(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(_RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(statistic(rows)), float(low), float(high))


def bootstrap_pairs(cells: npt.NDArray[np.float64], seed: int = 0) -> Interval:
    """The mean of `cells` `[n, m]` with a percentile interval over resampled rows and, apart from them, columns."""
    n, m = cells.shape
    rng = np.random.default_rng(seed)
    rows, columns = (rng.multinomial(k, np.full(k, 1 / k), _RESAMPLES) / k for k in (n, m))
    low, high = np.quantile(((rows @ cells) * columns).sum(1), [0.025, 0.975])
    return Interval(float(cells.mean()), float(low), float(high))


def mean(rows: npt.NDArray[np.float64]) -> float:
    """The mean over all rows."""
    return float(rows.mean())
