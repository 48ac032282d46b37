"""Paired statistics of two models on the same questions: difference, share retained, and whether that is shown.

Owns the statistics; never knows tasks or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, erf, exp, sqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

from abliterate.evaluate.intervals import Interval, Z, bootstrap, wilson

Float64Array = npt.NDArray[np.float64]
Verdict = Literal["retained", "lost", "gained", "not shown"]

#: Error that all verdicts of one table share, after Holm.
ALPHA = 0.05


@dataclass(frozen=True)
class Paired:
    """Two models on `n` questions: mean scores with 95% intervals, and what the pairs say.

    `difference` is edited − base, `retained` edited / base. `p_change` tests whether the scores differ at all,
    `p_loss` whether a loss of the margin or more can be excluded.
    """

    n: int
    base: Interval
    edited: Interval
    difference: Interval
    retained: Interval | None
    p_change: float
    p_loss: float


def paired(base: Float64Array, edited: Float64Array, margin: float) -> Paired:
    """Compare scores `[n]` of the same questions, larger being better; the margin is in the scores' own unit.

    Right and wrong (0, 1): McNemar's exact test on the questions that only one model gets right, intervals of the
    difference and of the ratio after Bonett and Price (2012 and 2006), which are honest where those are few. Other
    scores: Student's paired test, with the normal distribution for n of hundreds; else bootstrap over questions.
    """
    n, change = len(base), edited - base
    one, two = float(base.sum()), float(edited.sum())
    mean, error = float(change.mean()), float(change.std(ddof=1) / sqrt(n)) if n > 1 else float("inf")
    right_or_wrong = np.isin(np.concatenate([base, edited]), (0, 1)).all()
    if right_or_wrong:
        lost, won = int((change < 0).sum()), int((change > 0).sum())
        p_change = _mcnemar(lost, won)
        # One question more for each side: with no difference at all the interval still has a width.
        a, b = (won + 1) / (n + 2), (lost + 1) / (n + 2)
        middle, error = a - b, sqrt((a + b - (a - b) ** 2) / (n + 2))
        spread = exp(Z * sqrt((lost + won + 2) / ((one + 1) * (two + 1))))
        retained = Interval(two / one, two / one / spread, (two + 1) / one * spread) if one else None
        means = wilson(round(one), n), wilson(round(two), n)
    else:
        means = _mean(base), _mean(edited)
        retained = bootstrap(np.stack([base, edited], 1), _ratio) if (base > 0).sum() > 1 and one > 0 else None
        middle = mean
        p_change = 2 * _above(abs(mean) / error) if error else float(mean == 0)
    difference = Interval(mean, min(mean, middle - Z * error), max(mean, middle + Z * error))
    p_loss = _above((middle + margin) / error) if error else float(middle <= -margin)
    return Paired(n, *means, difference, retained, p_change, p_loss)


def _mean(scores: Float64Array) -> Interval:
    return bootstrap(scores[:, None], lambda rows: float(rows.mean()))


def _ratio(rows: Float64Array) -> float:
    base = rows[:, 0].sum()
    return float(rows[:, 1].sum() / base) if base else 1.0


def _above(z: float) -> float:
    """The normal distribution's share above `z`."""
    return 0.5 * (1 - erf(z / sqrt(2)))


def _mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p: how often a fair coin parts the discordant questions so unevenly, or more."""
    n, few = lost + won, min(lost, won)
    return float(min(1.0, 2 * sum(comb(n, k) for k in range(few + 1)) / 2**n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: each below 5% where all together err that often (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdicts(results: Sequence[Paired]) -> list[Verdict]:
    """What is shown for each task, all together with an error of 5%.

    `retained` where a loss of the margin is excluded, `lost` or `gained` where a change is shown, else nothing is.
    """
    no_loss, change = (holm([getattr(r, p) for r in results]) for p in ("p_loss", "p_change"))
    found: list[Verdict] = []
    for result, kept, changed in zip(results, no_loss, change, strict=True):
        if changed <= ALPHA and result.difference.value > 0:
            found.append("gained")
        elif kept <= ALPHA:
            found.append("retained")
        else:
            found.append("lost" if changed <= ALPHA else "not shown")
    return found
