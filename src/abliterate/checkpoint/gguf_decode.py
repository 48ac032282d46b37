"""The numbers of a GGUF's tensors, whatever ggml's type they are stored in.

Owns reading and decoding, a few megabytes of codes at a time. Never knows what a tensor means.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from abliterate.checkpoint import ggml
from abliterate.checkpoint.codecs import PLAIN, Float32Array, Plain
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import VerifyError

#: Bytes that are read and decoded at once.
_PIECE = 16 << 20


def decoded(folder: Path, tensor: TensorInfo) -> Float32Array:
    """The numbers of a tensor in its shape, as llama.cpp reads them.

    Raises:
        UnsupportedError: a type that is no float by itself, and llama.cpp's decoder cannot be reached.
        VerifyError: the file ends before the tensor does.
    """
    columns, n = tensor.shape[-1] if tensor.shape else 1, math.prod(tensor.shape[:-1])
    values: Float32Array = np.empty((n, columns), dtype=np.float32)
    row_bytes = tensor.nbytes // n
    step = max(1, _PIECE // row_bytes)
    for start in range(0, n, step):
        rows = np.arange(start, min(n, start + step))
        nbytes, at = len(rows) * row_bytes, tensor.offset + start * row_bytes
        raw = np.fromfile(folder / tensor.file, np.uint8, nbytes, offset=at)
        if raw.size < nbytes:
            raise VerifyError(
                f"{folder / tensor.file}: ended while tensor '{tensor.name}' was read; did the file change meanwhile?"
            )
        raw, into = raw.reshape(len(rows), row_bytes), values[start : start + len(rows)]
        plain = tensor.dtype in PLAIN
        into[:] = Plain(tensor.dtype).decode(raw, rows) if plain else ggml.decode(raw, tensor.dtype, columns)
    return values.reshape(tensor.shape)
