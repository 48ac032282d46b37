"""The block types of ggml: where codes, scales and minima lie in their bytes, and which numbers they stand for.

Owns the layouts, and codes as numbers under the scales they have. Never knows files, or why a code is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint import ggml
from abliterate.checkpoint.codecs import Array, Float32Array, Raw

#: What scales of a block give: the step of its codes and what is added to all, both `[..., groups]`.
Scales = tuple[Float32Array, Float32Array | None]


class Plane(NamedTuple):
    """Bytes that hold `bits` bits of every code of a block.

    `width` bytes in a row hold the lowest of their fields for as many codes in a row, then the next field for the next
    `width` codes, and so on; then come the next `width` bytes.
    """

    offset: int
    nbytes: int
    width: int
    bits: int


class Grid(NamedTuple):
    """Stored rows taken apart, each `[n, columns]`: the value is `numbers * step + offset`."""

    numbers: Float32Array
    step: Float32Array
    offset: Float32Array | None

    def values(self) -> Float32Array:
        """What is stored, as ggml computes it; a damaged scale shows as NaN, which the caller looks for."""
        with np.errstate(all="ignore"):
            values = self.numbers * self.step
            return values if self.offset is None else np.add(values, self.offset, out=values)


@dataclass(frozen=True)
class Layout:
    """One type: codes in a block and its bytes, planes from low bits to high, scales, what a code stands for.

    `numbers` are those of codes 0, 1, 2 …
    """

    size: int
    nbytes: int
    planes: tuple[Plane, ...]
    scales: Callable[[Raw], Scales]
    numbers: Float32Array


def _half(blocks: Raw, at: int) -> Float32Array:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2").astype(np.float32)


def _scale(blocks: Raw) -> Scales:
    return _half(blocks, 0), None


def _scale_and_offset(blocks: Raw) -> Scales:
    return _half(blocks, 0), _half(blocks, 2)


def _power_of_two(blocks: Raw) -> Scales:
    # Half of what the format says, because the numbers below are twice what E2M1 codes stand for.
    return np.ldexp(np.float32(1), blocks[..., :1].astype(np.int32) - 128), None


def _q2_k(blocks: Raw) -> Scales:
    both = blocks[..., :16]
    return _half(blocks, 80) * (both & 15), -(_half(blocks, 82) * (both >> 4))


def _q3_k(blocks: Raw) -> Scales:
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    four = np.concatenate([low & 15, low >> 4], axis=-1)
    two = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return _half(blocks, 108) * ((four | two << 4).astype(np.float32) - 32), None


def _q4_k(blocks: Raw) -> Scales:
    first, second, rest = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scale = np.concatenate([first & 63, rest & 15 | first >> 2 & 48], axis=-1)
    least = np.concatenate([second & 63, rest >> 4 | second >> 2 & 48], axis=-1)
    return _half(blocks, 0) * scale, -(_half(blocks, 2) * least)


def _q6_k(blocks: Raw) -> Scales:
    return _half(blocks, 208) * np.ascontiguousarray(blocks[..., 192:208]).view(np.int8), None


def _iq4_xs(blocks: Raw) -> Scales:
    high, low = np.ascontiguousarray(blocks[..., 2:4]).view("<u2"), blocks[..., 4:8]
    four = np.stack([low & 15, low >> 4], axis=-1).reshape(*low.shape[:-1], 8)
    two = high >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    return _half(blocks, 0) * ((four | two << 4).astype(np.float32) - 32), None


def _counted(first: int, last: int) -> Float32Array:
    return np.arange(first, last + 1, dtype=np.float32)


_IQ4: Float32Array = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
_E2M1_TWICE: Float32Array = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)
_NIBBLES_16 = (Plane(2, 16, 16, 4),)

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(32, 18, _NIBBLES_16, _scale, _counted(-8, 7)),
    "Q4_1": Layout(32, 20, (Plane(4, 16, 16, 4),), _scale_and_offset, _counted(0, 15)),
    "Q5_0": Layout(32, 22, (Plane(6, 16, 16, 4), Plane(2, 4, 1, 1)), _scale, _counted(-16, 15)),
    "Q5_1": Layout(32, 24, (Plane(8, 16, 16, 4), Plane(4, 4, 1, 1)), _scale_and_offset, _counted(0, 31)),
    "Q8_0": Layout(32, 34, (Plane(2, 32, 32, 8),), _scale, np.arange(256, dtype=np.uint8).view(np.int8).astype("<f4")),
    "Q2_K": Layout(256, 84, (Plane(16, 64, 32, 2),), _q2_k, _counted(0, 3)),
    "Q3_K": Layout(256, 110, (Plane(32, 64, 32, 2), Plane(0, 32, 32, 1)), _q3_k, _counted(-4, 3)),
    "Q4_K": Layout(256, 144, (Plane(16, 128, 32, 4),), _q4_k, _counted(0, 15)),
    "Q5_K": Layout(256, 176, (Plane(48, 128, 32, 4), Plane(16, 32, 32, 1)), _q4_k, _counted(0, 31)),
    "Q6_K": Layout(256, 210, (Plane(0, 128, 64, 4), Plane(128, 64, 32, 2)), _q6_k, _counted(-32, 31)),
    "IQ4_NL": Layout(32, 18, _NIBBLES_16, _scale, _IQ4),
    "IQ4_XS": Layout(256, 136, (Plane(8, 128, 16, 4),), _iq4_xs, _IQ4),
    "MXFP4": Layout(32, 17, (Plane(1, 16, 16, 4),), _power_of_two, _E2M1_TWICE),
}


class Blocks:
    """Codec of a block type.

    Its scales lie among the codes: `round` lets ggml choose them anew, `words` keeps those of a stored form.
    """

    exact, work = False, np.float32

    def __init__(self, dtype: str) -> None:
        self.dtype, self.layout = dtype, LAYOUTS[dtype]
        #: The different numbers that codes stand for, rising.
        self.levels: Float32Array = np.unique(self.layout.numbers)
        self._even = bool((np.diff(self.levels) == 1).all())
        # The level next to y is the same for all y of one half-open half: levels are whole, so midpoints are halves.
        self._first = int(2 * self.levels[0])
        halves = np.arange(self._first, int(2 * self.levels[-1]) + 1) / 2 + 0.25
        self._nearest = self.levels[np.abs(halves[:, None] - self.levels).argmin(axis=1)]
        # Of each whole number between the levels, as far as it is one: the level above, the one below, its lowest code.
        whole = np.searchsorted(self.levels, np.arange(self.levels[0], self.levels[-1] + 1))
        self._above = self.levels[np.minimum(whole + 1, len(self.levels) - 1)]
        self._below = self.levels[np.maximum(whole - 1, 0)]
        self._code = np.zeros(int(self.levels[-1] - self.levels[0]) + 1, dtype=np.uint8)
        for code in reversed(range(len(self.layout.numbers))):
            self._code[int(self.layout.numbers[code] - self.levels[0])] = code

    def row_bytes(self, columns: int) -> int:
        """Bytes of one stored row."""
        return columns // self.layout.size * self.layout.nbytes

    def decode(self, raw: Raw, rows: npt.NDArray[np.intp]) -> Array:  # noqa: ARG002
        """Number times step plus offset."""
        return self.grid(raw).values()

    def grid(self, raw: Raw) -> Grid:
        """Stored rows `[n, row_bytes]` taken apart."""
        codes = self._codes(raw)
        numbers = codes.astype(np.float32) + self.levels[0] if self._plain else self.layout.numbers[codes]
        with np.errstate(all="ignore"):  # as in `Grid.values`
            step, offset = self.layout.scales(self._in_blocks(raw))
        return Grid(numbers, _spread(step, numbers), None if offset is None else _spread(offset, numbers))

    @property
    def _plain(self) -> bool:
        """Whether codes are numbers but for where they start."""
        return self._even and self.layout.numbers[0] == self.levels[0]

    def nearest(self, numbers: Float32Array) -> None:
        """Each number to the level next to it, in place."""
        if self._even:
            np.rint(numbers, out=numbers)
            np.clip(numbers, self.levels[0], self.levels[-1], out=numbers)
            return
        numbers *= 2
        numbers -= self._first
        np.clip(numbers, 0, len(self._nearest) - 1, out=numbers)
        np.take(self._nearest, numbers.astype(np.intp), out=numbers, mode="clip")

    def beside(self, numbers: Float32Array, towards: Float32Array) -> Float32Array:
        """The next level up or down from each, by the sign of `towards`; the same where there is none."""
        if self._even:
            return np.clip(numbers + np.sign(towards), self.levels[0], self.levels[-1])
        place = (numbers - self.levels[0]).astype(np.intp)
        return np.where(towards > 0, self._above[place], np.where(towards < 0, self._below[place], numbers))

    def packed(self, numbers: Float32Array, like: Raw) -> Raw:
        """Levels `[n, columns]` as stored rows with the scales of `like`; where they are its own, so are the bytes."""
        above = numbers - self.levels[0]
        codes: Raw = above.astype(np.uint8) if self._plain else self._code[above.astype(np.intp)]
        if len(self.levels) < len(self.layout.numbers):  # two codes for nought
            before = self._codes(like)
            codes = np.where(self.layout.numbers[before] == numbers, before, codes)
        raw = like.copy()
        blocks = self._in_blocks(raw)
        shift = 0
        for offset, nbytes, width, bits in self.layout.planes:
            fields = codes.reshape(*blocks.shape[:2], nbytes // width, 8 // bits, width)
            held = np.zeros((*blocks.shape[:2], nbytes // width, width), np.uint8)
            for i in range(8 // bits):
                held |= (fields[..., i, :] >> shift & (1 << bits) - 1) << bits * i
            blocks[..., offset : offset + nbytes] = held.reshape(*blocks.shape[:2], nbytes)
            shift += bits
        return raw

    def round(self, values: Array, rows: npt.NDArray[np.intp]) -> Raw:
        """As llama.cpp's encoder stores them, with scales of its choice.

        Raises:
            UnsupportedError: the encoder is not installed.
        """
        raw = ggml.encode(values, self.dtype, self.row_bytes(values.shape[1]))
        values[...] = self.decode(raw, rows)
        return raw

    def words(self, values: Array, rows: npt.NDArray[np.intp], like: Raw) -> Array:  # noqa: ARG002
        """The bytes of the nearest codes under the scales of `like`; codes whose step is nought stay."""
        numbers, step, offset = self.grid(like)
        wanted = values if offset is None else values - offset
        np.divide(wanted, step, out=numbers, where=step != 0)
        self.nearest(np.nan_to_num(numbers, copy=False))
        return self.packed(numbers, like)

    def _in_blocks(self, raw: Raw) -> Raw:
        return raw.reshape(len(raw), -1, self.layout.nbytes)

    def _codes(self, raw: Raw) -> Raw:
        blocks = self._in_blocks(raw)
        codes = np.zeros((*blocks.shape[:2], self.layout.size), np.uint8)
        shift = 0
        for offset, nbytes, width, bits in self.layout.planes:
            held = blocks[..., offset : offset + nbytes].reshape(*blocks.shape[:2], nbytes // width, width)
            fields = codes.reshape(*blocks.shape[:2], nbytes // width, 8 // bits, width)
            for i in range(8 // bits):
                fields[..., i, :] |= (held >> bits * i & (1 << bits) - 1) << shift
            shift += bits
        return codes.reshape(len(raw), -1)


def _spread(groups: Float32Array, numbers: Float32Array) -> Float32Array:
    """What holds for a group, for each number of it."""
    across = groups.reshape(len(numbers), -1)
    return np.repeat(across, numbers.shape[1] // across.shape[1], axis=1)
