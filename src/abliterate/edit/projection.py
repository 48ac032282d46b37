"""The projection of one tensor, in blocks of rows: what is removed, what is left.

Owns the arithmetic; never knows which tensor it works on or where the direction came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from abliterate.checkpoint.dtypes import Float32Array

Blocks = Callable[[], Iterable[tuple[int, Float32Array]]]
"""Yields `(first_row, rows)` of the stored tensor, `rows` as `[rows, columns]`; may be called twice."""
Store = Callable[[int, Float32Array], Float32Array]
"""Stores rows from `first_row` on and returns them as they now read, after the cast."""


class Removed(NamedTuple):
    """Frobenius norm of the tensor, norm of its component along the direction, and what is left of that."""

    norm: float
    removed: float
    leak: float


def normalise(vector: Float32Array, gain: Float32Array | None = None, centred: bool = False) -> Float32Array:
    """`normalise(g ⊙ r̂)`: the direction to remove from a writer behind a normalisation with gain `g`, `[d_model]`.

    The stream receives `g ⊙ W x / rms(W x)`, so its component along `r̂` is `(g ⊙ r̂)ᵀ W x` up to a scalar. Where the
    norm subtracts the mean first (`centred`, LayerNorm), so does the direction.
    """
    wide = vector.astype(np.float64)
    if gain is not None:
        wide = wide * gain
    if centred:
        wide = wide - wide.mean()
    return (wide / np.linalg.norm(wide)).astype(np.float32)


def project_columns(blocks: Blocks, store: Store, d: Float32Array, strength: float) -> Removed:
    """`W' = W − s·d (dᵀ W)` for `W` `[d_model, d_in]` whose rows are the residual axis (arXiv 2406.11717, §2.4).

    Two passes: `dᵀ W` is summed over all rows before the first one can change.
    """
    along: np.ndarray[tuple[int], np.dtype[np.float64]] | float = 0.0
    norm = 0.0
    for start, rows in blocks():
        along = along + (d[start : start + len(rows)] @ rows).astype(np.float64)
        norm += float(np.vdot(rows, rows))
    c = np.asarray(along, dtype=np.float32)
    left: np.ndarray[tuple[int], np.dtype[np.float64]] | float = 0.0
    for start, rows in blocks():
        part = d[start : start + len(rows)]
        stored = store(start, rows - np.outer(np.float32(strength) * part, c))
        left = left + (part @ stored).astype(np.float64)
    return _removed(norm, float(np.linalg.norm(np.asarray(along))), float(np.linalg.norm(np.asarray(left))))


def project_rows(blocks: Blocks, store: Store, d: Float32Array, strength: float) -> Removed:
    """`W' = W − s·(W d) dᵀ` for `W` `[rows, d_model]` whose columns are the residual axis, such as an embedding."""
    norm = removed = left = 0.0
    for start, rows in blocks():
        c = rows @ d
        stored = store(start, rows - np.outer(np.float32(strength) * c, d))
        rest = stored @ d
        norm += float(np.vdot(rows, rows))
        removed += float(np.vdot(c, c))
        left += float(np.vdot(rest, rest))
    return _removed(norm, float(np.sqrt(removed)), float(np.sqrt(left)))


def _removed(norm: float, removed: float, left: float) -> Removed:
    return Removed(float(np.sqrt(norm)), removed, left / removed if removed else 0.0)
