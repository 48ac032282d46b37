"""What statistics and first round say layer by layer and position by position, as small tables for a reader.

Owns their rounding and gaps; never decides anything: the choice is made elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.activations.stats import ActivationStats
from abliterate.direction.direction import Direction, candidates, separation

#: Rows are layers, columns positions; None where there is no candidate.
Table = list[list[float | None]]


def profile(
    chosen: Direction, harmful: ActivationStats, harmless: ActivationStats, tried: list[Direction]
) -> dict[str, Any]:
    """Separation of all candidates, the fall of the refusal score in the first round, and projections on `chosen`.

    `fall` is how far ablation lowers the mean refusal score of the round's `fall_prompts` harmful prompts.
    """
    n_layers, positions = len(harmful.mean), harmful.positions
    found = candidates(harmful, harmless, n_layers)
    table: dict[str, Any] = {
        "positions": list(positions),
        "separation": _table(found, [separation(d, harmful, harmless) for d in found], n_layers, positions),
        "projections": projections(chosen, harmful, harmless),
    }
    if tried:
        falls = [d.scores["base"] - d.scores["ablated"] for d in tried]
        table |= {"fall": _table(tried, falls, n_layers, positions), "fall_prompts": int(tried[0].scores["prompts"])}
    return table


def projections(
    chosen: Direction, harmful: ActivationStats, harmless: ActivationStats
) -> dict[str, list[float]] | None:
    """Mean and spread of both sets along the (first) direction chosen, by layer at its position; None if it has none.

    The spread `√(σ² r̂²)` leaves out covariances between the stream's axes, which no statistics keep: it is near the
    standard deviation, not equal to it.
    """
    if chosen.position not in harmful.positions:
        return None
    index, unit = harmful.positions.index(chosen.position), np.atleast_2d(chosen.vector)[0].astype(np.float64)
    table: dict[str, list[float]] = {}
    for kind, stats in (("harmful", harmful), ("harmless", harmless)):
        spread = np.sqrt(stats.m2[:, index] @ unit**2 / max(1, stats.count - 1))
        table |= {f"{kind}_mean": rounded(stats.mean[:, index] @ unit), f"{kind}_spread": rounded(spread)}
    return table


def rounded(values: Iterable[float] | npt.NDArray[np.float64], digits: int = 4) -> list[float]:
    """Values with so many significant digits: a reader sees no more, and the record stays small."""
    return [float(f"{value:.{digits}g}") for value in values]


def _table(found: list[Direction], values: list[float], n_layers: int, positions: tuple[int, ...]) -> Table:
    rows: Table = [[None] * len(positions) for _ in range(n_layers)]
    for d, value in zip(found, rounded(values), strict=True):
        assert d.layer is not None and d.position is not None  # candidates come from activations
        rows[d.layer][positions.index(d.position)] = value
    return rows
