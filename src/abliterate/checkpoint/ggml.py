"""ggml's own encoder and decoders, reached in the shared library that the `xllamacpp` wheel carries.

Owns finding that library and calling them. Never knows what is encoded, or why.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint.codecs import Array, Float32Array, Raw
from abliterate.checkpoint.gguf_file import NUMBERS, TYPES
from abliterate.errors import UnsupportedError

#: The types that ggml encodes by the activations they will meet (an importance matrix), which a file does not keep.
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
#: What brings the packages for GGUF files.
MEND = "pip install 'abliterate[gguf]' (in a clone: uv sync --extra gguf)"


def encode(values: Array, dtype: str, row_bytes: int) -> Raw:
    """The rows of `values` `[n, columns]` as llama.cpp stores them, `[n, row_bytes]`.

    Raises:
        UnsupportedError: the type needs an importance matrix, or the encoder cannot be reached.
    """
    if dtype in NEED_IMPORTANCE:
        raise UnsupportedError(
            f"{dtype} cannot be encoded without an importance matrix, which the file does not hold; store those "
            "tensors in a larger type: --requantize Q4_K"
        )
    llama = llama_cpp()
    block = c_function(llama, "ggml_blck_size", ctypes.c_int64, ctypes.c_int)(NUMBERS[dtype])
    if values.shape[1] % block:
        raise UnsupportedError(
            f"rows of {values.shape[1]} numbers do not fall into blocks of {block}, as {dtype} needs; choose a type "
            "with smaller blocks: Q4_0, Q5_0, Q8_0 or IQ4_NL for 32"
        )
    size = c_function(llama, "ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64)
    if size(NUMBERS[dtype], values.shape[1]) != row_bytes:
        raise UnsupportedError(
            f"{llama._name}: stores a row of {values.shape[1]} numbers as {dtype} in another way than known here "
            f"({row_bytes} bytes); install the release that was tested: {MEND}"
        )
    source = np.ascontiguousarray(values, dtype=np.float32)
    raw = np.empty((len(source), row_bytes), dtype=np.uint8)
    run = c_function(
        llama, "ggml_quantize_chunk", ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    run(NUMBERS[dtype], source.ctypes.data, raw.ctypes.data, 0, *source.shape, None)
    return raw


def decode(raw: Raw, dtype: str, columns: int) -> Float32Array:
    """The numbers `[n, columns]` of stored rows of any type that is not one float for each.

    Raises:
        UnsupportedError: the library cannot be reached, or does not know the type.
    """
    name = f"dequantize_row_{dtype.lower().replace('_k', '_K')}"
    run = c_function(llama_cpp(), name, None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    source, values = np.ascontiguousarray(raw), np.empty((len(raw), columns), dtype=np.float32)
    run(source.ctypes.data, values.ctypes.data, values.size)
    return values


class Opaque:
    """Codec of a block type whose codes stand for several numbers at once, so that none is moved by itself."""

    exact, work = False, np.float32

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        _, self._size, self._nbytes = TYPES[NUMBERS[dtype]]

    def row_bytes(self, columns: int) -> int:
        """Bytes of one stored row."""
        return columns // self._size * self._nbytes

    def decode(self, raw: Raw, rows: npt.NDArray[np.intp]) -> Array:  # noqa: ARG002
        """As llama.cpp reads them."""
        return decode(raw, self.dtype, raw.shape[1] // self._nbytes * self._size)

    def round(self, values: Array, rows: npt.NDArray[np.intp]) -> Raw:
        """As llama.cpp's encoder stores them."""
        raw = encode(values, self.dtype, self.row_bytes(values.shape[1]))
        values[...] = self.decode(raw, rows)
        return raw

    def words(self, values: Array, rows: npt.NDArray[np.intp], like: Raw) -> Array:  # noqa: ARG002
        """The bytes of that form."""
        return self.round(values, rows)


def c_function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the library by its name, the C type of its result and those of its arguments.

    Raises:
        UnsupportedError: it offers none of this name.
    """
    try:
        found = getattr(library, name)
    except AttributeError:
        raise UnsupportedError(
            f"{library._name}: does not offer {name}; install the release that was tested: {MEND}"
        ) from None
    found.restype, found.argtypes = result, list(arguments)
    called: Callable[..., Any] = found
    return called


@functools.lru_cache(maxsize=1)
def llama_cpp() -> ctypes.CDLL:
    """The wheel's extension module as a plain library: llama.cpp is linked into it. Nothing of Python's runs.

    Raises:
        UnsupportedError: it is not installed, or cannot be loaded.
    """
    spec = importlib.util.find_spec("xllamacpp")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if not folders:
        raise UnsupportedError(f"this takes llama.cpp, in the package xllamacpp, which is not installed: {MEND}")
    endings = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    places = [p for folder in folders for p in sorted(Path(folder).iterdir()) if p.name.endswith(endings)]
    for place in places:
        try:
            library = ctypes.CDLL(str(place))
        except OSError as error:
            raise UnsupportedError(f"{place}: cannot be loaded ({error}); install it again: {MEND}") from None
        if hasattr(library, "ggml_quantize_chunk"):
            return library
    raise UnsupportedError(f"{folders[0]}: holds no library that offers ggml_quantize_chunk; {MEND}")
