"""The projection of one matrix, in blocks of rows: what is removed, how it is rounded, what is left.

Owns the arithmetic; never knows which tensor it works on or where the direction came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint.codecs import Array, Codec, Float32Array, Raw
from abliterate.checkpoint.matrix import BLOCK, Matrix, Rows
from abliterate.errors import VerifyError

#: Rows whose share of the direction is below this part of the average cannot take on what others leave.
_FLOOR = 0.02
#: One row in so many is kept for last, of each size of share, but as many as `_LAST` of them; blocks before hold no
#: more rows than that part either, so that what one leaves is little beside what those to come can take on.
_SPREAD, _LAST = 16, 32


class Removed(NamedTuple):
    """Squared Frobenius norms: of the matrix, of its component along the directions, of what the cast left there."""

    norm: float
    removed: float
    left: float


@dataclass(frozen=True)
class Removal:
    """What is taken out: orthonormal columns `basis` `[d_model, k]`, the strength, and whether norms are kept.

    `W' = W − s·D (Dᵀ W − offset)`: `offset` is what is left along each of them instead of nothing. With `keep_norms`
    each column of `W'` (what one input writes) is then scaled to the norm it had in `W`: unlike a scaling of rows, that
    leaves `Dᵀ W' = 0`.
    """

    basis: Float32Array
    strength: float = 1.0
    keep_norms: bool = False
    offset: float = 0.0


class Undo(Protocol):
    """Takes what is needed to go back from the stored rows of a matrix to those it had."""

    def __call__(self, rows: Rows, before: Raw, after: Array, along: Along) -> None:
        """`before` as it was stored, `after` as numbers; see `Along.restored`."""
        ...


@dataclass(frozen=True)
class Along:
    """What was taken from a block, factor by factor: `W ≈ W' / scale + left @ right`.

    `left` `[n, k]`, `right` `[k, columns]`, `scale` `[n, 1]` or `[1, columns]` or None.
    """

    left: Float32Array
    right: Float32Array
    scale: Float32Array | None

    def restored(self, after: Array) -> Array:
        """The numbers before the edit, but for rounding; by elementwise sums alone, so the same on any machine."""
        total: Array = self.left[:, :1] * self.right[:1]
        for i in range(1, self.left.shape[1]):
            total += self.left[:, i, None] * self.right[None, i, :]
        total += after if self.scale is None else after / self.scale
        return total


def orthonormal(directions: Float32Array, gain: Float32Array | None = None, centred: bool = False) -> Float32Array:
    """What to remove from a writer behind a normalisation with gain `g`: an orthonormal basis `[d_model, k]`.

    The stream receives `g ⊙ W x / rms(W x)`, so its component along `r̂` is `(g ⊙ r̂)ᵀ W x` up to a scalar: the basis
    spans `g ⊙ r̂ᵢ` for all directions `[k, d_model]`. Where the norm subtracts the mean first (`centred`, LayerNorm),
    so do they.
    """
    wide = np.atleast_2d(directions).astype(np.float64)
    if gain is not None:
        wide = wide * gain
    if centred:
        wide = wide - wide.mean(axis=1, keepdims=True)
    if len(wide) > 1:
        q, triangle = np.linalg.qr(wide.T)
        return (q * np.sign(np.diag(triangle))).astype(np.float32)
    return (wide.T / np.linalg.norm(wide)).astype(np.float32)


def project_columns(matrix: Matrix, source: int, target: int, removal: Removal, undo: Undo | None = None) -> Removed:
    """`W' = W − s·D (Dᵀ W)` for a matrix whose rows are the residual axis (arXiv 2406.11717, §2.4), file to file.

    Two passes: `Dᵀ W` is summed over all rows before the first one can change. See `_round_carrying` for the cast.

    Raises:
        VerifyError: the matrix holds NaN or infinity, or the result does not fit its type.
    """
    d = removal.basis.astype(matrix.codec.work)
    along, norms = np.zeros((d.shape[1], matrix.columns)), np.zeros(matrix.columns)
    norm = 0.0
    for rows in matrix.blocks():
        block = matrix.values(source, rows)
        along += d[rows].T @ block
        if removal.keep_norms:
            norms += np.einsum("ij,ij->j", block, block)
        norm += float(np.vdot(block, block))
    if not np.isfinite(along).all() or not np.isfinite(norm):
        matrix.require_finite(source)
    scale = norm_scale(norms, along, removal) if removal.keep_norms else None
    taken = (removal.strength * along).astype(d.dtype)

    def read(rows: Rows) -> tuple[Raw, Array]:
        raw = matrix.read(source, rows)
        return raw, matrix.codec.decode(raw, rows)

    def store(rows: Rows, before: Raw, raw: Raw, after: Array) -> None:
        matrix.write(target, rows, raw)
        if undo is not None:
            row_scale = None if scale is None else scale[None, :]
            undo(rows, before, after, Along(removal.basis[rows], taken.astype(np.float32), row_scale))

    order = _order(d, matrix.columns, carry=not matrix.codec.exact)
    kept = _round_carrying(matrix.codec, d, taken, scale, order, read, store, matrix.name)
    wanted = (1 - removal.strength) * along * (1 if scale is None else scale)
    return Removed(norm, float(np.vdot(along, along)), float(np.square(kept - wanted).sum()))


def project_rows(matrix: Matrix, source: int, target: int, removal: Removal, undo: Undo | None = None) -> Removed:
    """`W' = W − s·(W D) Dᵀ` for a matrix whose columns are the residual axis, such as an embedding, file to file.

    Raises:
        VerifyError: as for `project_columns`.
    """
    d, codec = removal.basis.astype(matrix.codec.work), matrix.codec
    total = np.zeros(3)
    order: list[tuple[Rows, Array | None]] = []
    for rows in matrix.blocks(BLOCK):
        order = order or list(_order(d, len(rows), carry=not codec.exact))
        before = matrix.read(source, rows)
        numbers = codec.decode(before, rows)
        along = (numbers @ d).T.astype(np.float64)
        norm = float(np.vdot(numbers, numbers))
        if not np.isfinite(norm):
            matrix.require_finite(source)
        norms = np.einsum("ij,ij->i", numbers, numbers) if removal.keep_norms else None
        scale = norm_scale(norms, along, removal) if norms is not None else None
        taken = (removal.strength * (along - removal.offset)).astype(d.dtype)
        # Stored words, turned so that the residual axis runs down, and back at the end.
        word = np.dtype(f"<u{matrix.row_bytes // matrix.columns}")
        turned = _turned(before.view(word))

        def read(columns: Rows, turned: Array = turned) -> tuple[Raw, Array]:
            raw = turned[columns].view(np.uint8)
            return raw, codec.decode(raw, columns)

        def store(columns: Rows, _before: Raw, raw: Raw, _after: Array, turned: Array = turned) -> None:
            turned[columns] = raw.view(turned.dtype)

        kept = _round_carrying(codec, d, taken, scale, order, read, store, matrix.name)
        edited = np.ascontiguousarray(turned.T).view(np.uint8)
        matrix.write(target, rows, edited)
        if undo is not None:
            along_rows = Along(taken.T.astype(np.float32), removal.basis.T, None if scale is None else scale[:, None])
            undo(rows, before, codec.decode(edited, rows), along_rows)
        wanted = (along - removal.strength * (along - removal.offset)) * (1 if scale is None else scale)
        total += np.array([norm, np.vdot(along, along), np.square(kept - wanted).sum()])
    return Removed(*total.tolist())


def _turned(words: Array) -> Array:
    """The transpose of `[n, columns]`, copied through rows that are a cache line longer.

    Rows whose length is a power of two fall on the same places of a core's cache: straight on it takes five times as
    long.
    """
    n, columns = words.shape
    longer = np.empty((n, columns + 64 // words.itemsize), words.dtype)[:, :columns]
    longer[...] = words
    return np.ascontiguousarray(longer.T)


def norm_scale(norms: npt.NDArray[np.float64], along: npt.NDArray[np.float64], removal: Removal) -> Float32Array:
    """What brings every column back to its norm: `‖w'‖² = ‖w‖² − (2s − s²) ‖Dᵀw‖²`. Columns left empty stay so."""
    s = removal.strength
    after = norms - (2 * s - s * s) * np.square(along).sum(axis=0)
    solid = after > 1e-6 * norms
    scale: Float32Array = np.sqrt(np.divide(norms, after, out=np.ones_like(norms), where=solid)).astype(np.float32)
    return scale


def _round_carrying(
    codec: Codec,
    d: Array,
    taken: Array,
    scale: Float32Array | None,
    order: Iterable[tuple[Rows, Array | None]],
    read: Callable[[Rows], tuple[Raw, Array]],
    store: Callable[[Rows, Raw, Raw, Array], None],
    name: str,
) -> npt.NDArray[np.float64]:
    """Store `T = (W − d @ taken) * scale`, rounded so that `dᵀ` of what is stored is `dᵀ T`; returns the former.

    Rounding each number by itself would bring 0.5 to 1% of the direction back in bfloat16. So what rounding some rows
    left along `d` is taken from the rows to come, in proportion to their share of what is left of the direction: a
    small part of a step of the grid, so that the rounding error as a whole hardly grows. A few rows are kept for last,
    in falling order of their share, so that the last error, which nothing corrects, is the smallest.
    """
    k, kept = len(taken), np.zeros(taken.shape)
    # What goes from a block in one product: what the edit takes, and below it dᵀ (stored − T) so far.
    out = np.concatenate([taken if scale is None else taken * scale, np.zeros(taken.shape, taken.dtype)])
    error, spare = out[k:], np.empty((0, taken.shape[1]), taken.dtype)
    for rows, correction in order:
        before, block = read(rows)
        share = d[rows]
        if scale is not None:
            block *= scale
        if len(spare) < len(rows):
            spare = np.empty(block.shape, block.dtype)
        factors = share if correction is None else np.concatenate([share, correction], axis=1)
        block -= np.matmul(factors, out[: factors.shape[1]], out=spare[: len(rows)])
        exact = None if correction is None else share.T @ block + (share.T @ correction) @ error
        raw = codec.round(block, rows)
        stored = share.T @ block
        if not np.isfinite(stored).all():
            raise VerifyError(f"the edit of tensor '{name}' overflows its storage type; nothing was written")
        kept += stored
        if exact is not None:
            error += stored - exact
        store(rows, before, raw, block)
    return kept


def _order(d: Array, columns: int, carry: bool) -> Iterator[tuple[Rows, Array | None]]:
    """Blocks of rows in the order to store them, each with what it takes on of the error so far, `[n, k]`."""
    n, step = len(d), max(1, BLOCK // max(1, columns))
    if not carry:
        for start in range(0, n, step):
            yield np.arange(start, min(n, start + step)), None
        return
    share = np.linalg.norm(d, axis=1)
    able = share >= _FLOOR * np.sqrt(d.shape[1] / n)
    rising = np.flatnonzero(able)[np.argsort(share[able], kind="stable")]
    last = rising[:: max(1, len(rising) // max(_LAST, len(rising) // _SPREAD))][::-1]
    order = np.concatenate([np.setdiff1d(np.arange(n), last), last])
    # left_over[i] = Σ_{j ≥ i} d_j d_jᵀ over the rows still to come, what can be taken on by them
    outer = d[order, :, None].astype(np.float64) * d[order, None, :] * able[order, None, None]
    left_over = np.cumsum(outer[::-1], axis=0)[::-1]
    energy = -np.trace(left_over, axis1=1, axis2=2)
    # With several directions the last few rows span not all of them: what they can hardly take on is left.
    ridge = _FLOOR**2 * d.shape[1] / n * np.eye(d.shape[1])
    start, spread = 0, max(1, n // _SPREAD)
    while start < n:
        if start < n - len(last):
            stop = min(n - len(last), start + min(step, spread))
        else:  # at most half of the direction that is left, so that others can correct what these leave
            stop = min(start + step, max(start + 1, int(np.searchsorted(energy, energy[start] / 2))))
        rows = np.sort(order[start:stop])
        correction = (d[rows] * able[rows, None]) @ np.linalg.inv(left_over[start] + ridge)
        yield rows, correction.astype(d.dtype)
        start = stop
