"""Which codes of a block type move, and how far, so that a matrix has the component along a direction it should have.

Owns the arithmetic on a grid whose steps stay as they are. Never knows bytes, or where the direction came from.

For each column `j` the numbers `z` on the grid are sought that are nearest to the exact result `x` among those with
`Dᵀ (S z − x) = 0`, `S` the steps. Without that condition each would be rounded by itself: a rank-1 change is smaller
than half a step of 4 bits almost everywhere, and nothing would move. With it, Lagrange's multipliers `λ` say how: round
`x + D λ`, that is, ask for more than the edit takes, until what rounding passes on is what the edit takes. As `λ` grows
codes cross their midpoints in the order of what a move costs for what it gives, so no other choice of codes is nearer
to `x`, but for the last step of that staircase; that one is made up by single moves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint.codecs import Float32Array
from abliterate.checkpoint.ggml_blocks import Blocks

#: Of the component along the directions: what counts as nothing, and more than which is not left to single moves.
_NOTHING, _MUCH = 1e-3, 2e-3
#: Steps of a search for one multiplier (doublings, then halvings), turns over several directions, single moves.
_SEARCH, _TURNS, _SINGLE = 15, 2, 4
#: Steps below this are those of blocks that hold nothing; a smaller unit is as large as this, whose square is a float.
_LEAST_STEP, _LEAST_UNIT = 1e-30, np.float32(1e-15)


class Sought(NamedTuple):
    """A few columns of a matrix: `step` of the grid, `wanted` times step is what is sought, all `[n, columns]`.

    `target` is that product; where the step is nought it is what cannot be reached. `basis` is `[n, k]`, `unit`
    `[columns]` the size of the component along it that leaks are measured by.
    """

    step: Float32Array
    wanted: Float32Array
    target: Float32Array
    basis: Float32Array
    unit: Float32Array

    @classmethod
    def of(
        cls, numbers: Float32Array, step: Float32Array, change: Float32Array, basis: Float32Array, unit: Float32Array
    ) -> Sought:
        """What `change` asks of stored `numbers`."""
        wanted = np.divide(change, step, out=np.zeros_like(numbers), where=np.abs(step) > _LEAST_STEP)
        wanted += numbers
        return cls(step, wanted, numbers * step + change, basis, np.maximum(unit, _LEAST_UNIT))

    def left(self, numbers: Float32Array) -> Float32Array:
        """`Dᵀ (S z − x)`, `[k, columns]`."""
        return self.basis.T @ (numbers * self.step - self.target)

    def part(self, columns: npt.NDArray[np.intp]) -> Sought:
        """Some of the columns."""
        step, wanted, target = (x[:, columns] for x in (self.step, self.wanted, self.target))
        return Sought(step, wanted, target, self.basis, self.unit[columns])


def settle(codec: Blocks, sought: Sought) -> tuple[Float32Array, Float32Array]:
    """The numbers on the grid, `[n, columns]`, and the multipliers `λ`, `[k, columns]`, that led to most of them."""
    solid = np.abs(sought.step) > _LEAST_STEP
    inverse = np.divide(1, sought.step, out=np.zeros_like(sought.step), where=solid)
    push = [column[:, None] * inverse for column in sought.basis.T]
    near = sought.wanted.copy()
    multipliers = _raise(codec, sought, near, push)
    numbers = near.copy()
    codec.nearest(numbers)
    _move_singly(codec, sought, numbers)
    left = np.linalg.norm(sought.left(numbers), axis=0)
    poor = np.flatnonzero(left > _MUCH * sought.unit)
    if len(poor):
        # A row with a large share left more than single moves of the others make up: it stays, they are raised again.
        part, now, left = sought.part(poor), numbers[:, poor], left[poor]
        held = np.linalg.norm(sought.basis, axis=1)[:, None] * np.abs(part.step) > left
        again = np.where(held, now, near[:, poor])
        more = _raise(codec, part, again, [np.where(held, 0, p[:, poor]) for p in push])
        codec.nearest(again)
        _move_singly(codec, part, again)
        better = np.linalg.norm(part.left(again), axis=0) < left
        numbers[:, poor[better]] = again[:, better]
        multipliers[:, poor[better]] += more[:, better]
    return numbers, multipliers


def _raise(codec: Blocks, sought: Sought, near: Float32Array, push: list[Float32Array]) -> Float32Array:
    """Add `push @ λ` to `near` so that, rounded, it has nothing left along the directions; returns `λ`."""
    total = np.zeros((len(push), near.shape[1]), np.float32)
    scratch = np.empty_like(near)
    for _ in range(_TURNS if len(push) > 1 else 1):
        for i, along in enumerate(push):
            found = _root(partial(_left_along, codec, sought, i, near, along, scratch), near.shape[1])
            near += np.multiply(along, found, out=scratch)
            total[i] += found
    return total


def _left_along(
    codec: Blocks, sought: Sought, i: int, near: Float32Array, along: Float32Array, scratch: Float32Array,
    multiplier: Float32Array,
) -> Float32Array:  # fmt: skip
    """What is left along direction `i`, `[columns]`, of the levels next to `near + along * multiplier`."""
    np.multiply(along, multiplier, out=scratch)
    np.add(scratch, near, out=scratch)
    codec.nearest(scratch)
    np.multiply(scratch, sought.step, out=scratch)
    np.subtract(scratch, sought.target, out=scratch)
    left: Float32Array = sought.basis[:, i] @ scratch
    return left


def _root(left: Callable[[Float32Array], Float32Array], columns: int) -> Float32Array:
    """For each column where `left`, which never falls, is nearest to nought: away from nought twice as far each time
    until its sign turns, then between.
    """
    best = np.zeros(columns, np.float32)
    value = left(best)
    least, towards = np.abs(value), -np.sign(value)
    low, high, turned = best, best + 2 * towards * least, np.zeros(columns, dtype=bool)
    for _ in range(_SEARCH):
        tried = np.where(turned, (low + high) / 2, high)
        value = left(tried)
        nearer = np.abs(value) < least
        best, least = np.where(nearer, tried, best), np.where(nearer, np.abs(value), least)
        short = value * towards < 0
        high = np.where(short, np.where(turned, high, 2 * tried), tried)
        low, turned = np.where(short, tried, low), turned | ~short
    return best


def _move_singly(codec: Blocks, sought: Sought, numbers: Float32Array) -> None:
    """Move the one code of each column that brings what is left nearest to nothing at little cost, a few times."""
    each = np.arange(numbers.shape[1])
    shares = np.square(sought.basis).sum(axis=1)[:, None]
    typical = np.mean(np.square(sought.step)) * float(np.mean(np.diff(codec.levels))) ** 2
    weight = np.square(_NOTHING * sought.unit)
    for _ in range(_SINGLE):
        pull = sought.basis @ sought.left(numbers)
        moved = codec.beside(numbers, -pull * sought.step)
        by = (moved - numbers) * sought.step
        off = numbers * sought.step - sought.target
        # ‖left‖² after less before, and the same of the distance to x; the former in what counts as nothing.
        score = (2 * pull + shares * by) * by / weight + (2 * off + by) * by / max(typical, _LEAST_STEP)
        row = score.argmin(axis=0)
        better = score[row, each] < 0
        if not better.any():
            return
        numbers[row[better], each[better]] = moved[row[better], each[better]]
