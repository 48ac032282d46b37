"""The directions of the residual stream that changes of many matrices have in common, and how much they explain.

Owns that estimate; never reads files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from abliterate.checkpoint.codecs import Float32Array
from abliterate.compare.change import Change, Float64Array

#: Most directions that changes are looked at for.
MOST = 8


@dataclass(frozen=True)
class Side:
    """The axis of a changed matrix that lies in the stream, `by_rows` where it runs along the rows.

    `gain` `[d_model]` is that of the norm behind the matrix; what it writes along `g ⊙ r̂` reaches the stream along `r̂`.
    """

    by_rows: bool
    gain: Float32Array | None = None
    centred: bool = False

    def vectors(self, change: Change) -> Float32Array:
        """The change's vectors as directions of the stream, `[k, d_model]` of unit norm."""
        found = (change.right if self.by_rows else change.left).T
        if self.gain is not None:
            found = np.divide(found, self.gain, out=np.zeros_like(found), where=self.gain != 0)
        unit: Float32Array = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30)
        return unit


def shared_directions(found: Sequence[tuple[Change, Side]]) -> Float32Array:
    """`[k, d_model]` orthonormal: what the vectors of the changes span together; as many as most changes have.

    The first right singular vectors of all vectors on top of one another, each weighted by its value over the largest
    of its change: directions that are the same in many changes add up, others do not.
    """
    ranks = Counter(c.rank if c.rank is not None else 1 for c, _ in found if len(c.sizes))
    if not ranks:
        return np.empty((0, 0), np.float32)
    k = min(MOST, max(ranks, key=lambda r: (ranks[r], -r)))
    weighted = [
        side.vectors(change)[:k] * (change.sizes / change.sizes[0])[:k, None]
        for change, side in found
        if len(change.sizes)
    ]
    vectors = _first_right_vectors(np.concatenate(weighted), k)
    # A vector's sign means nothing; make its largest number positive, so that results repeat.
    signs = np.sign(vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)])
    shared: Float32Array = (vectors * signs[:, None]).astype(np.float32)
    return shared


def _first_right_vectors(rows: Float32Array, k: int) -> Float64Array:
    """`[k, d_model]`; of many rows by their products, `[d_model, d_model]`, of few directly: that is far quicker."""
    if len(rows) <= rows.shape[1]:
        few: Float64Array = np.linalg.svd(rows.astype(np.float64), full_matrices=False)[2][:k]
        return few
    products = np.zeros(2 * (rows.shape[1],))
    for start in range(0, len(rows), 1024):
        some = rows[start : start + 1024].astype(np.float64)
        products += some.T @ some
    many: Float64Array = np.linalg.eigh(products)[1][:, ::-1][:, :k].T
    return many


def cosines(one: Float32Array, other: Float32Array) -> list[float]:
    """Cosines of the principal angles between the spans of rows `[k, d_model]`, largest first."""
    bases = [np.linalg.qr(np.atleast_2d(v).astype(np.float64).T)[0] for v in (one, other)]
    found: list[float] = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).clip(0, 1).tolist()
    return found
