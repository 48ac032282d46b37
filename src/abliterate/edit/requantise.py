"""The projection of a matrix of a block type: codes move under the scales they have, all other bytes stay.

Owns the way from file to file. Never knows which tensor it works on; which codes move is `code_moves`' affair.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from abliterate.checkpoint.codecs import Float32Array, Raw
from abliterate.checkpoint.ggml_blocks import Blocks, Grid
from abliterate.checkpoint.matrix import Matrix
from abliterate.edit.code_moves import Sought, settle
from abliterate.edit.projection import Along, Removal, Removed, Undo, norm_scale

#: Numbers settled at a time: few enough for a core's cache.
_TILE = 1 << 17


class Edited(NamedTuple):
    """Rows as they are stored now, and what was asked of them.

    `asked` `[k, columns]` (`[k, rows]` where the residual axis runs along rows) is what was taken out before rounding,
    more than the edit takes; `scale` brings norms back.
    """

    raw: Raw
    asked: Float32Array
    scale: Float32Array | None
    removed: Removed


def move_columns(matrix: Matrix, source: int, target: int, removal: Removal, undo: Undo | None = None) -> Removed:
    """`W' = W − s·D (Dᵀ W)` for a matrix whose rows are the residual axis, file to file, all of it at once.

    Raises:
        VerifyError: the matrix holds NaN or infinity.
    """
    codec, rows = _blocks(matrix), np.arange(matrix.rows)
    before = matrix.read(source, rows)
    edited = _edit(matrix, before, source, removal, turned=False)
    matrix.write(target, rows, edited.raw)
    if undo is not None:
        scale = None if edited.scale is None else edited.scale[None, :]
        for some in matrix.blocks():
            along = Along(removal.basis[some], edited.asked, scale)
            undo(some, before[some], codec.decode(edited.raw[some], some), along)
    return edited.removed


def move_rows(matrix: Matrix, source: int, target: int, removal: Removal, undo: Undo | None = None) -> Removed:
    """`W' = W − s·(W D) Dᵀ` for a matrix whose columns are the residual axis, such as an embedding, file to file.

    Raises:
        VerifyError: as for `move_columns`.
    """
    codec, total = _blocks(matrix), np.zeros(3)
    for rows in matrix.blocks():
        before = matrix.read(source, rows)
        edited = _edit(matrix, before, source, removal, turned=True)
        matrix.write(target, rows, edited.raw)
        if undo is not None:
            scale = None if edited.scale is None else edited.scale[:, None]
            along = Along(edited.asked.T, removal.basis.T, scale)
            undo(rows, before, codec.decode(edited.raw, rows), along)
        total += edited.removed
    return Removed(*total.tolist())


def encode(old: Matrix, new: Matrix, source: int, target: int, removal: Removal, by_rows: bool) -> Removed:
    """The projection of a matrix of any type into one of a block type, file to file.

    llama.cpp's encoder chooses the scales for the exact result, and codes move until it has the component it should.

    Raises:
        UnsupportedError: the encoder is not installed.
        VerifyError: as for `move_columns`.
    """
    total = np.zeros(3)
    for rows in old.blocks() if by_rows else [np.arange(old.rows)]:
        edited = _edit(old, old.read(source, rows), source, removal, by_rows, _blocks(new))
        new.write(target, rows, edited.raw)
        total += edited.removed
    return Removed(*total.tolist())


def _blocks(matrix: Matrix) -> Blocks:
    assert isinstance(matrix.codec, Blocks)
    return matrix.codec


def _edit(
    matrix: Matrix, before: Raw, source: int, removal: Removal, turned: bool, into: Blocks | None = None
) -> Edited:
    """Stored rows with the directions taken out of their columns, or where `turned` out of themselves.

    They keep their scales, or are stored anew `into` another type.
    """
    codec, d, rows = into or _blocks(matrix), removal.basis.astype(np.float32), np.arange(len(before))
    grid = codec.grid(before) if into is None else None
    values = matrix.codec.decode(before, rows) if grid is None else grid.values()
    along = ((values @ d).T if turned else d.T @ values).astype(np.float64)
    norm = float(np.vdot(values, values))
    if not np.isfinite(norm):
        matrix.require_finite(source)
    taken = (removal.strength * (along - removal.offset)).astype(np.float32)
    change, scale = taken.T @ -d.T if turned else -d @ taken, None
    if removal.keep_norms:
        scale = norm_scale(np.einsum("ij,ij->i" if turned else "ij,ij->j", values, values), along, removal)
        across = scale[:, None] if turned else scale
        change = change * across + values * (across - 1)
    if grid is None:
        exact = values + change
        stored = exact.copy()
        before = codec.round(stored, rows)
        change, grid = exact - stored, codec.grid(before)
    unit = np.linalg.norm(along, axis=0).astype(np.float32)
    numbers, multipliers, left = _settled(codec, grid, change, d, np.maximum(unit, unit.mean()), turned)
    asked = taken - (multipliers if scale is None else multipliers / scale)
    return Edited(codec.packed(numbers, before), asked, scale, Removed(norm, float(np.vdot(along, along)), left))


def _settled(
    codec: Blocks, grid: Grid, change: Float32Array, d: Float32Array, unit: Float32Array, turned: bool
) -> tuple[Float32Array, Float32Array, float]:
    """The numbers of `grid` with `change` `[n, columns]` made, tile by tile; multipliers; the square of what is left.

    The numbers are overwritten.
    """
    numbers, step, _ = grid
    multipliers, left = np.empty((d.shape[1], len(unit)), np.float32), 0.0
    if turned:
        numbers, step, change = numbers.T, step.T, change.T
    width = max(1, _TILE // len(d))
    for start in range(0, len(unit), width):
        tile = slice(start, start + width)
        now, by, asked = (np.ascontiguousarray(x[:, tile]) for x in (numbers, step, change))
        sought = Sought.of(now, by, asked, d, unit[tile])
        numbers[:, tile], multipliers[:, tile] = settle(codec, sought)
        left += float(np.square(sought.left(numbers[:, tile])).sum())
    return grid.numbers, multipliers, left
