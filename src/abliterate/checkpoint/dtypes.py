"""Sizes of the safetensors storage types, and exact codecs between the floating ones and float32.

Owns bits and bytes only; never knows what a tensor means.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

#: Bits per element of every type the safetensors format names.
BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

#: The types whose tensors can be edited: float32 holds their values, or all the digits an edit needs.
EDITABLE = ("F32", "F16", "BF16", "F64")

_NATIVE: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}


def itemsize(dtype: str) -> int:
    """Bytes per element of an editable storage type."""
    return BITS[dtype] // 8


def decode(raw: bytes | memoryview, dtype: str) -> Float32Array:
    """The flat float32 values of little-endian `raw` bytes stored as `dtype`."""
    stored: npt.NDArray[Any] = np.frombuffer(raw, dtype=_NATIVE[dtype])
    values: Float32Array = (
        (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else stored.astype(np.float32)
    )
    return values


def encode(values: Float32Array, dtype: str) -> bytes:
    """The little-endian bytes of `values` rounded once to `dtype`, to nearest, ties to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # float16 overflow shows as infinity, which the caller checks
            return values.astype(_NATIVE[dtype]).tobytes()
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adding 0x7FFF plus the lowest kept bit carries exactly when rounding up is right; NaN is never passed.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (rounded >> np.uint32(16)).astype(np.uint16).tobytes()
