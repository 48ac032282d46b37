"""How stored bytes become numbers, and numbers stored bytes: one codec for each storage type.

Owns rounding to a type's grid, block scales included. Never knows where the bytes lie or what a tensor means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]

#: Bits per element of every type the safetensors format names.
BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

_PLAIN: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
}  # fmt: skip
#: The types whose elements are numbers by themselves.
PLAIN = tuple(_PLAIN)
#: The types whose elements are numbers only together with a scale.
FP8: dict[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
_FP4 = np.dtype(ml_dtypes.float4_e2m1fn)
_FP4_VALUES = np.arange(16, dtype=np.uint8).view(_FP4).astype(np.float32)


class Codec(Protocol):
    """Rows of a stored matrix as numbers, and back.

    `exact` where the grid is so fine that an edit needs no care for its rounding; `work` the type of the numbers.
    """

    exact: bool
    work: type[np.floating[Any]]

    def row_bytes(self, columns: int) -> int:
        """Bytes of one stored row."""
        ...

    def decode(self, raw: Raw, rows: npt.NDArray[np.intp]) -> Array:
        """The numbers `[n, columns]` of the raw bytes `[n, row_bytes]` of the given rows."""
        ...

    def round(self, values: Array, rows: npt.NDArray[np.intp]) -> Raw:
        """The nearest stored form of `values` `[n, columns]`, which is overwritten with what that form reads."""
        ...

    def words(self, values: Array, rows: npt.NDArray[np.intp], like: Raw) -> Array:
        """The same stored form as unsigned integers, one for each element (or byte); `values` is used up.

        Where scales lie among the codes, they are those of `like`, a stored form of the same rows.
        """
        ...


class Plain:
    """Elements that are numbers by themselves: float64, float32, float16, bfloat16."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.exact = dtype in ("F32", "F64")
        self.work: type[np.floating[Any]] = np.float64 if dtype == "F64" else np.float32

    def row_bytes(self, columns: int) -> int:
        """Bytes of one stored row."""
        return columns * _PLAIN[self.dtype].itemsize

    def decode(self, raw: Raw, rows: npt.NDArray[np.intp]) -> Array:  # noqa: ARG002
        """The numbers, float32 or wider."""
        stored = raw.view(_PLAIN[self.dtype])
        if self.dtype != "BF16":
            return stored.astype(self.work)
        wide = np.empty(stored.shape, dtype=np.uint32)
        np.left_shift(stored, np.uint32(16), out=wide, dtype=np.uint32, casting="unsafe")
        return wide.view(np.float32)

    def round(self, values: Array, rows: npt.NDArray[np.intp]) -> Raw:  # noqa: ARG002
        """To nearest, float16 ties to even, bfloat16 ties away from zero (as an edit's sums never tie)."""
        if self.dtype == "BF16":
            stored = np.ascontiguousarray(self._upper_halves(values))
            bits = values.view(np.uint32)
            bits &= np.uint32(0xFFFF0000)
            return stored.view(np.uint8)
        with np.errstate(over="ignore"):  # overflow shows as infinity, which the caller looks for
            stored = values.astype(_PLAIN[self.dtype])
        values[...] = stored
        return stored.view(np.uint8)

    def words(self, values: Array, rows: npt.NDArray[np.intp], like: Raw) -> Array:  # noqa: ARG002
        """The bits of the nearest numbers; of bfloat16 a view of the upper halves of `values`."""
        if self.dtype != "BF16":
            return self.round(values, rows).view(f"<u{_PLAIN[self.dtype].itemsize}")
        return self._upper_halves(values)

    @staticmethod
    def _upper_halves(values: Array) -> Array:
        bits = values.view(np.uint32)
        bits += np.uint32(0x8000)
        return values.view(np.uint16)[:, 1::2]


class Scaled:
    """FP8 codes times a scale: one for the tensor, for each row, or for each block of rows and columns.

    An edit keeps the scales, so that only codes change; values beyond the largest code take that code.
    """

    exact, work = False, np.float32

    def __init__(self, dtype: str, scales: Float32Array, block: tuple[int, int]) -> None:
        self.dtype, self.scales, self.block = FP8[dtype], scales, block
        self._largest = float(ml_dtypes.finfo(self.dtype).max)  # type: ignore[no-untyped-call]

    def row_bytes(self, columns: int) -> int:
        """One byte for each element."""
        return columns

    def _scale(self, rows: npt.NDArray[np.intp], columns: int) -> Float32Array:
        across = self.scales[rows // self.block[0]]
        return across if across.shape[1] == 1 else np.repeat(across, self.block[1], axis=1)[:, :columns]

    def decode(self, raw: Raw, rows: npt.NDArray[np.intp]) -> Array:
        """Code times scale."""
        return raw.view(self.dtype).astype(np.float32) * self._scale(rows, raw.shape[1])

    def round(self, values: Array, rows: npt.NDArray[np.intp]) -> Raw:
        """To the nearest code under the scales as they are."""
        scale = self._scale(rows, values.shape[1])
        codes = np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)
        # A NaN must stay one, so that the caller sees it: clip leaves it.
        stored = codes.clip(-self._largest, self._largest).astype(self.dtype)
        values[...] = stored.astype(np.float32) * scale
        return stored.view(np.uint8)

    def words(self, values: Array, rows: npt.NDArray[np.intp], like: Raw) -> Array:  # noqa: ARG002
        """The same; the scales are at hand."""
        return self.round(values, rows)


class Mxfp4:
    """Microscaling FP4 (OCP MX): two E2M1 codes in a byte, low half first, one power of two for 32 elements."""

    exact, work = False, np.float32
    BLOCK = 32

    def __init__(self, exponents: npt.NDArray[np.uint8]) -> None:
        self.exponents = exponents

    def row_bytes(self, columns: int) -> int:
        """Half a byte for each element."""
        return columns // 2

    def _scale(self, rows: npt.NDArray[np.intp]) -> Float32Array:
        scales: Float32Array = np.ldexp(np.float32(1), self.exponents[rows].astype(np.int32) - 127)
        return np.repeat(scales, self.BLOCK, axis=1)

    def decode(self, raw: Raw, rows: npt.NDArray[np.intp]) -> Array:
        """Code times the block's power of two."""
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
        values: Float32Array = _FP4_VALUES[codes] * self._scale(rows)
        return values

    def round(self, values: Array, rows: npt.NDArray[np.intp]) -> Raw:
        """To the nearest code under the block's power of two as it is."""
        scale = self._scale(rows)
        if not np.isfinite(values).all():
            return np.zeros((len(values), values.shape[1] // 2), np.uint8)  # has no code: the caller sees `values`
        codes = (values / scale).clip(-6, 6).astype(_FP4).view(np.uint8) & 15
        values[...] = _FP4_VALUES[codes] * scale
        packed: Raw = codes[:, 0::2] | np.left_shift(codes[:, 1::2], 4, dtype=np.uint8)
        return packed

    def words(self, values: Array, rows: npt.NDArray[np.intp], like: Raw) -> Array:  # noqa: ARG002
        """The same; the scales are at hand."""
        return self.round(values, rows)


def codec(
    dtype: str, shape: Sequence[int], scales: Array | None = None, block: tuple[int, int] | None = None
) -> Codec | None:
    """The codec of a matrix of `shape`; None where the type holds no numbers that can be edited.

    FP8 needs its `scales`: one number, one for each row, or one for each `block`; U8 codes with a byte for each 32
    are MXFP4.
    """
    if dtype in _PLAIN:
        return Plain(dtype)
    if scales is None:
        return None
    rows, columns = shape
    if dtype == "U8":
        fit = scales.dtype == np.uint8 and scales.shape == (rows, columns / Mxfp4.BLOCK)
        return Mxfp4(scales) if fit else None
    if dtype not in FP8:
        return None
    if scales.size == 1:
        return Scaled(dtype, scales.astype(np.float32).reshape(1, 1), (max(1, rows), max(1, columns)))
    if scales.size == rows:
        return Scaled(dtype, scales.astype(np.float32).reshape(rows, 1), (1, max(1, columns)))
    if block is None or scales.shape != (-(-rows // block[0]), -(-columns // block[1])):
        return None
    return Scaled(dtype, scales.astype(np.float32), block)
