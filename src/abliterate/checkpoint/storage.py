"""A tensor of a checkpoint as matrices: which axis runs down, which scales belong to its codes.

Owns the layouts of fused, transposed and block-scaled tensors. Never knows why one axis is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np

from abliterate.checkpoint.codecs import FP8, PLAIN, Array, Codec, Plain, codec
from abliterate.checkpoint.ggml import Opaque
from abliterate.checkpoint.ggml_blocks import LAYOUTS, Blocks
from abliterate.checkpoint.matrix import Matrix
from abliterate.checkpoint.opened import Checkpoint
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import UnsupportedError

#: Bytes of one piece of a matrix that can be worked on in pieces.
PIECE = 64 << 20
#: Numbers of one panel of columns that can be worked on by itself.
PANEL = 1 << 22
#: The types whose matrices come in pieces that need nothing of one another.
IN_PIECES = (*PLAIN, *LAYOUTS)
#: What the scales of a tensor's codes are called: DeepSeek's blocks, per-tensor and per-channel FP8.
_FP8_SCALES = ("_scale_inv", "_scale")
_MXFP4_CODES, _MXFP4_SCALES = "_blocks", "_scales"
#: Scales of activations, which an edit of weights leaves as they are.
_INPUT_SCALES = (".input_scale", ".activation_scale", ".input_scale_ub")


def logical_name(checkpoint: Checkpoint, name: str) -> str | None:
    """The name of the weight that a stored tensor is, or None for scales, which belong to another tensor's codes."""
    tensors = checkpoint.tensors
    if name.endswith(_INPUT_SCALES):
        return None
    for suffix in (*_FP8_SCALES, _MXFP4_SCALES):
        stem = name.removesuffix(suffix)
        if stem != name and (stem in tensors or stem + _MXFP4_CODES in tensors):
            return None
    stem = name.removesuffix(_MXFP4_CODES)
    return stem if stem != name and stem + _MXFP4_SCALES in tensors else name


def stored_axis(tensor: TensorInfo, axis: int) -> int:
    """Where the axis of a weight lies in its stored form: MXFP4 experts are stored with their last two swapped."""
    return {1: 2, 2: 1}[axis] if tensor.name.endswith(_MXFP4_CODES) and axis in (1, 2) else axis


def by_rows(tensor: TensorInfo, axis: int) -> bool:
    """Whether `axis` lies along the rows of a tensor's matrices; a vector is a matrix of one column, so down them."""
    return len(tensor.shape) > 1 and axis == len(tensor.shape) - 1


def matrices(checkpoint: Checkpoint, tensor: TensorInfo, axis: int) -> Iterator[Matrix]:
    """A stored tensor as matrices with `axis` as their rows, or as their columns where it is the last one.

    A fused tensor of experts `[E, d_model, d_ff]` is one matrix for each expert; `[E, d_ff, d_model]`, stored in one
    piece, is one matrix of `E x d_ff` rows, and comes in pieces. A vector is a matrix of one column. Block types of
    ggml come in panels of columns where `axis` runs down: no column needs another.

    Raises:
        UnsupportedError: the storage type cannot be edited along this axis, or there is nothing to edit.
    """
    if not tensor.nbytes:
        raise UnsupportedError(f"{checkpoint.source}: tensor '{tensor.name}' of shape {list(tensor.shape)} is empty")
    if tensor.dtype in PLAIN:
        yield from _plain(tensor, axis)
        return
    if tensor.dtype in LAYOUTS:
        yield from _blocks(tensor, axis)
        return
    if checkpoint.format == "gguf":
        raise UnsupportedError(
            f"{checkpoint.source}: tensor '{tensor.name}' is stored as {tensor.dtype}, whose codes stand for several "
            "numbers at once and cannot be moved one by one; store those tensors in a larger type: --requantize Q4_K"
        )
    scales = _scales(checkpoint, tensor)
    if scales is None:
        raise UnsupportedError(
            f"{checkpoint.source}: tensor '{tensor.name}' is stored as {tensor.dtype} without scales that are known; "
            f"can edit {', '.join(IN_PIECES)}, and FP8 with *{_FP8_SCALES[0]} or *{_FP8_SCALES[1]}"
        )
    shape = (*tensor.shape[:-2], 2 * math.prod(tensor.shape[-2:])) if tensor.dtype == "U8" else tensor.shape
    if axis != len(shape) - 2:
        raise UnsupportedError(
            f"{checkpoint.source}: tensor '{tensor.name}': {tensor.dtype} cannot be edited on {axis=}"
        )
    n, (rows, columns) = math.prod(shape[:-2]), shape[-2:]
    for i in range(n):
        own = scales if scales.size == 1 else _of_matrix(scales, n, i, scales.shape[len(shape) - 2 :])
        how = codec(tensor.dtype, (rows, columns), own, _block(checkpoint)) if own is not None else None
        if how is None:
            raise UnsupportedError(
                f"{checkpoint.source}: tensor '{tensor.name}' of shape {list(tensor.shape)} has scales of shape "
                f"{list(scales.shape)}, which are neither one, nor one for each row, nor one for each block of "
                f"weight_block_size {_block(checkpoint)} in config.json"
            )
        yield Matrix(tensor.name, tensor.file, tensor.offset + i * (tensor.nbytes // n), rows, columns, how)


def _of_matrix(scales: Array, n: int, i: int, shape: tuple[int, ...]) -> Array | None:
    """The scales of matrix `i` of `n`, or None where they are not so many."""
    return scales.reshape(n, *shape)[i] if scales.size == n * math.prod(shape) else None


def _plain(tensor: TensorInfo, axis: int) -> Iterator[Matrix]:
    shape = tensor.shape
    how = codec(tensor.dtype, shape)
    assert how is not None
    if by_rows(tensor, axis):
        yield from _rows(Matrix(tensor.name, tensor.file, tensor.offset, math.prod(shape[:-1]), shape[-1], how))
        return
    columns, n = math.prod(shape[axis + 1 :]), math.prod(shape[:axis])
    for i in range(n):
        yield Matrix(tensor.name, tensor.file, tensor.offset + i * (tensor.nbytes // n), shape[axis], columns, how)


def _rows(matrix: Matrix) -> Iterator[Matrix]:
    """A matrix in pieces of rows."""
    step = max(1, PIECE // max(1, matrix.row_bytes))
    for start in range(0, matrix.rows, step):
        rows = min(step, matrix.rows - start)
        yield replace(matrix, offset=matrix.offset + start * matrix.row_bytes, rows=rows)


def _blocks(tensor: TensorInfo, axis: int) -> Iterator[Matrix]:
    shape, how = tensor.shape, Blocks(tensor.dtype)
    if by_rows(tensor, axis):
        yield from _rows(Matrix(tensor.name, tensor.file, tensor.offset, math.prod(shape[:-1]), shape[-1], how))
        return
    if axis != len(shape) - 2:
        raise UnsupportedError(f"{tensor.file}: tensor '{tensor.name}': {tensor.dtype} cannot be edited on {axis=}")
    n, (rows, columns), size = math.prod(shape[:-2]), shape[-2:], how.layout.size
    stride, width = how.row_bytes(columns), size * max(1, PANEL // (rows * size))
    for i in range(n):
        start = tensor.offset + i * rows * stride
        for first in range(0, columns, width):
            at, wide = start + how.row_bytes(first), min(width, columns - first)
            yield Matrix(tensor.name, tensor.file, at, rows, wide, how, stride)


def slices(tensor: TensorInfo) -> Iterator[Matrix]:
    """A GGUF's tensor of any type as its last two axes have it, each matrix whole: to be read, or written anew.

    A vector is a matrix of one row.
    """
    shape, dtype = (1, 1, *tensor.shape), tensor.dtype
    how: Codec = Plain(dtype) if dtype in PLAIN else Blocks(dtype) if dtype in LAYOUTS else Opaque(dtype)
    rows, columns = shape[-2:]
    for i in range(math.prod(shape[:-2])):
        yield Matrix(tensor.name, tensor.file, tensor.offset + i * rows * how.row_bytes(columns), rows, columns, how)


def whole(tensor: TensorInfo) -> Matrix | None:
    """A tensor as one matrix of numbers with its first axis down, or None where those need scales kept elsewhere."""
    if tensor.dtype not in IN_PIECES:
        return None
    shape = tensor.shape or (1,)
    how = Blocks(tensor.dtype) if tensor.dtype in LAYOUTS else codec(tensor.dtype, shape)
    return Matrix(tensor.name, tensor.file, tensor.offset, shape[0], math.prod(shape[1:]), how) if how else None


def _block(checkpoint: Checkpoint) -> tuple[int, int] | None:
    stated = checkpoint.config.get("quantization_config")
    size = stated.get("weight_block_size") if isinstance(stated, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
        return None
    return size[0], size[1]


def _scales(checkpoint: Checkpoint, tensor: TensorInfo) -> Array | None:
    """The scales that belong to a tensor's codes, as they are stored in shape; exponents as bytes for MXFP4."""
    if tensor.dtype == "U8" and tensor.name.endswith(_MXFP4_CODES):
        names: tuple[str, ...] = (tensor.name.removesuffix(_MXFP4_CODES) + _MXFP4_SCALES,)
    elif tensor.dtype in FP8:
        names = tuple(tensor.name + suffix for suffix in _FP8_SCALES)
    else:
        return None
    found = next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)
    if found is None:
        return None
    fd = os.open(checkpoint.path / found.file, os.O_RDONLY)
    try:
        raw = np.frombuffer(os.pread(fd, found.nbytes, found.offset), dtype=np.uint8)
    finally:
        os.close(fd)
    if found.dtype == "U8":
        return raw.reshape(found.shape)
    if found.dtype == "F8_E8M0":
        powers: Array = raw.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).reshape(found.shape)
        return powers
    how = codec(found.dtype, found.shape)
    if how is None:
        return None
    values: Array = how.decode(raw.reshape(1, -1), np.arange(1)).reshape(found.shape)
    return values
