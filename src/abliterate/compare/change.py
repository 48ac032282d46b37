"""The difference of two stored matrices: its largest singular vectors, and what of it is more than rounding.

Owns that arithmetic, in blocks of rows; never knows which tensors it works on or what a direction means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint.codecs import Array, Float32Array
from abliterate.checkpoint.ggml_blocks import Blocks
from abliterate.checkpoint.matrix import Matrix, Rows

Float64Array = npt.NDArray[np.float64]

#: Singular vectors looked for: more than any edit along a few directions has.
SKETCH = 16
#: Bits behind the leading one of the numbers of each storage type whose steps grow with the numbers.
_MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2, "U8": 1}
#: How far a singular value must lie above what rounding alone may reach, and which part of the largest it must have:
#: an edit that carries the remainders of rounding moves some rows by more than half a step.
_ABOVE, _PART = 2.0, 0.03
#: The same part for codes under block scales, of which more move where a direction is large: that bends it, and the
#: second vector of such a change along one direction has up to a third of the first.
_PART_OF_CODES = 0.4
#: Vectors kept of a change of a rank that could be told, and of any other.
_KEPT, _KEPT_OF_MANY = 8, 2
#: Power iterations: with two, vectors whose values lie little above the noise are found to three digits.
_ROUNDS = 2


@dataclass(frozen=True)
class Pair:
    """The same matrix in two checkpoints, the open files that hold it, and the second's storage type."""

    base: Matrix
    other: Matrix
    files: tuple[int, int]
    dtype: str

    def blocks(self) -> Iterator[tuple[Rows, Array, Array]]:
        """Rows, their numbers in the base and in the other, `[n, columns]`."""
        for rows in self.base.blocks():
            yield rows, self.base.values(self.files[0], rows), self.other.values(self.files[1], rows)

    @property
    def part(self) -> float:
        """Which part of the largest singular value is more than what rounding makes of one direction."""
        return _PART_OF_CODES if isinstance(self.other.codec, Blocks) else _PART

    def steps(self, rows: Rows, other: Array) -> Float32Array:
        """The distance from each number of the other to the next that its type can store there, `[n, columns]`."""
        codec = self.other.codec
        if isinstance(codec, Blocks):
            mean = np.float32(np.diff(codec.levels).mean())
            return np.abs(codec.grid(self.other.read(self.files[1], rows)).step) * mean
        # 2 ** floor(log2 |x|) are the bits of the exponent alone.
        power: Float32Array = (other.astype(np.float32).view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
        return power * np.float32(2.0 ** -_MANTISSA[self.dtype])


@dataclass(frozen=True)
class Change:
    """`Δ = other − base`: squared Frobenius norms of base, Δ and rounding, and the largest vectors of Δ above that.

    `rank` counts singular values above rounding and a part of the largest, None where there are more than looked for
    or much is left beside them. `left` `[rows, k]`,
    `sizes` `[k]` and `right` `[columns, k]` are its first singular vectors and values.
    """

    base: float
    delta: float
    rounding: float
    rank: int | None
    left: Float32Array
    sizes: Float64Array
    right: Float32Array


def change_of(pair: Pair) -> Change:
    """What of `Δ` is more than the rounding of its storage type (randomised SVD, Halko et al. 2011, arXiv 0909.4061).

    An edit that was stored by rounding each number has a remainder of `ulp² / 12` in each. Such noise has singular
    values up to the largest norms of its rows and columns together; what lies above comes from something else.

    Raises:
        VerifyError: one of the matrices holds NaN or infinity.
    """
    rows, columns = pair.base.rows, pair.base.columns
    wide = min(SKETCH, rows, columns)
    side = np.random.default_rng(0).standard_normal((columns, wide)).astype(np.float32)
    norms, row_noise, column_noise = np.zeros(2), np.zeros(rows), np.zeros(columns)
    left = np.empty((rows, wide), np.float32)
    for at, base, other in pair.blocks():
        delta = _sizes(at, base, other, pair.steps(at, other), norms, row_noise, column_noise)
        left[at] = delta @ side
    if not np.isfinite(norms).all():
        for matrix, fd in ((pair.base, pair.files[0]), (pair.other, pair.files[1])):
            matrix.require_finite(fd)
    for _ in range(_ROUNDS):
        side = np.zeros((columns, wide), np.float32)
        q = _orthonormal(left)
        for at, base, other in pair.blocks():
            side += (other - base).astype(np.float32).T @ q[at]
        side = _orthonormal(side)
        for at, base, other in pair.blocks():
            left[at] = (other - base).astype(np.float32) @ side
    u, sizes, v = np.linalg.svd(left.astype(np.float64), full_matrices=False)
    noise = float(row_noise.sum())
    least = max(_ABOVE * (np.sqrt(row_noise.max()) + np.sqrt(column_noise.max())), pair.part * sizes[0])
    rank = int((sizes > least).sum())
    beside = float(norms[1] - np.square(sizes[:rank]).sum())
    told = wide < SKETCH or (rank < wide and beside <= 2 * noise + pair.part**2 * norms[1])
    k = min(rank, _KEPT if told else _KEPT_OF_MANY)
    return Change(
        float(norms[0]), float(norms[1]), min(noise, beside) if told else noise, rank if told else None,
        u[:, :k].astype(np.float32), sizes[:k], (side @ v.T)[:, :k].astype(np.float32),
    )  # fmt: skip


def _sizes(
    rows: Rows,
    base: Array,
    other: Array,
    steps: Float32Array,
    norms: Float64Array,
    row_noise: Float64Array,
    column_noise: Float64Array,
) -> Float32Array:
    """Add a block to the sums, and return its difference."""
    delta: Float32Array = (other - base).astype(np.float32)
    norms += np.vdot(base, base), np.vdot(delta, delta)
    # Rounding is no more than the change: a row without one was not written, coarse codes hardly move.
    noise, change = np.square(steps, dtype=np.float64) / 12, np.square(delta, dtype=np.float64)
    row_noise[rows] = np.minimum(noise.sum(axis=1), change.sum(axis=1))
    column_noise += np.minimum(noise.sum(axis=0), change.sum(axis=0))
    return delta


def _orthonormal(columns: Float32Array) -> Float32Array:
    return np.linalg.qr(columns.astype(np.float64))[0].astype(np.float32)


@dataclass(frozen=True)
class AlongBasis:
    """Of a change and a basis `D`: squared norms of `DᵀW` and `DᵀΔ`, and their product `⟨DᵀW, DᵀΔ⟩`."""

    base: float
    delta: float
    product: float

    @classmethod
    def together(cls, parts: Iterable[AlongBasis]) -> AlongBasis:
        """That of several matrices."""
        return cls(*np.sum([(p.base, p.delta, p.product) for p in parts] or [(0.0, 0.0, 0.0)], axis=0).tolist())

    @property
    def strength(self) -> float | None:
        """`s` of the `W' = W − s·D DᵀW` that is nearest to what was done along `D`.

        None where the base has far less along it than the change: nothing was taken from what is not there.
        """
        return -self.product / self.base if self.base * 100 > self.delta else None


def along_basis(pair: Pair, basis: Float32Array, by_rows: bool) -> AlongBasis:
    """What a change does along orthonormal columns `basis`, of rows' width where `by_rows`, else of columns'."""
    if by_rows:
        parts = np.zeros(3)
        for _, base, other in pair.blocks():
            parts += _products(base @ basis, other @ basis)
        return AlongBasis(*parts.tolist())
    before, after = (np.zeros((basis.shape[1], pair.base.columns)) for _ in range(2))
    for rows, base, other in pair.blocks():
        before += basis[rows].T @ base
        after += basis[rows].T @ other
    return AlongBasis(*_products(before, after))


def _products(before: Array, after: Array) -> tuple[float, float, float]:
    change = after - before
    return float(np.vdot(before, before)), float(np.vdot(change, change)), float(np.vdot(before, change))
