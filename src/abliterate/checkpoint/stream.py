"""Read and rewrite single tensors of a shard in blocks of rows, and copy files.

Owns positioned reads and writes; holds one block at a time. Never knows why a tensor is rewritten.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from abliterate.checkpoint.dtypes import Float32Array, decode, encode, itemsize
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import ResourceError, VerifyError

#: Bytes of stored data per block; three or four float32 copies of one block are alive at a time.
BLOCK_BYTES = 4 << 20


def row_blocks(tensor: TensorInfo) -> Iterator[tuple[int, int]]:
    """Half-open row ranges of about `BLOCK_BYTES` that cover a tensor; a vector is one row per element."""
    rows = tensor.shape[0] if tensor.shape else 1
    per_row = max(1, tensor.nbytes // max(1, rows))
    step = max(1, BLOCK_BYTES // per_row)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def matrices(tensor: TensorInfo, axis: int) -> Iterator[TensorInfo]:
    """A tensor as matrices with `axis` as their rows, or as their columns where it is the last one.

    A fused tensor of experts `[E, d_model, d_ff]` is one matrix for each expert; `[E, d_ff, d_model]`, stored in one
    piece, is one matrix of `E x d_ff` rows.
    """
    shape = tensor.shape
    if axis == len(shape) - 1 and len(shape) > 1:
        yield replace(tensor, shape=(math.prod(shape[:-1]), shape[-1]))
        return
    nbytes = tensor.nbytes // max(1, math.prod(shape[:axis]))
    for i in range(math.prod(shape[:axis])):
        inner = (shape[axis], math.prod(shape[axis + 1 :]))
        yield replace(tensor, shape=inner, offset=tensor.offset + i * nbytes, nbytes=nbytes)


def read_rows(fd: int, tensor: TensorInfo, start: int, stop: int) -> Float32Array:
    """Rows `[start, stop)` of a tensor as float32 `[rows, columns]`.

    Raises:
        VerifyError: the rows hold NaN or infinity, or the file ends within them.
    """
    columns = _columns(tensor)
    width = columns * itemsize(tensor.dtype)
    raw = os.pread(fd, (stop - start) * width, tensor.offset + start * width)
    if len(raw) != (stop - start) * width:
        raise VerifyError(f"{tensor.file}: ended while tensor '{tensor.name}' was read; did the file change meanwhile?")
    rows = decode(raw, tensor.dtype).reshape(stop - start, columns)
    if not np.isfinite(rows).all():
        raise VerifyError(
            f"{tensor.file}: tensor '{tensor.name}' holds NaN or infinity, first in row "
            f"{start + int(np.argmin(np.isfinite(rows).all(1)))}; the checkpoint is damaged: nothing was written"
        )
    return rows


def write_rows(fd: int, tensor: TensorInfo, start: int, rows: Float32Array) -> bytes:
    """Store `rows` from row `start` on in the tensor's own type; returns the bytes written.

    Raises:
        VerifyError: a value does not fit the type.
    """
    raw = encode(rows, tensor.dtype)
    if not np.isfinite(decode(raw, tensor.dtype)).all():
        raise VerifyError(f"{tensor.file}: the edit of tensor '{tensor.name}' overflows {tensor.dtype}")
    offset = tensor.offset + start * _columns(tensor) * itemsize(tensor.dtype)
    if os.pwrite(fd, raw, offset) != len(raw):
        raise ResourceError(f"{tensor.file}: the disk took only part of tensor '{tensor.name}'; is it full?")
    return raw


def _columns(tensor: TensorInfo) -> int:
    return int(np.prod(tensor.shape[1:], dtype=np.int64)) if len(tensor.shape) > 1 else 1


def tensor_sha256(folder: Path, tensor: TensorInfo) -> str:
    """Hash of a tensor's stored bytes."""
    digest = hashlib.sha256()
    with (folder / tensor.file).open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.nbytes
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes (through symbolic links) to a new file, never sharing storage that is written later.

    Raises:
        ResourceError: the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise ResourceError(f"{target}: cannot write ({error.strerror})") from None


def sync(path: Path) -> None:
    """Force a file's or folder's data to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def require_disk(folder: Path, nbytes: int) -> None:
    """Check that `folder` (or its nearest existing parent) has room for `nbytes` more.

    Raises:
        ResourceError: it has not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ResourceError(
            f"{folder}: the result needs {nbytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
            "free some space or choose another output"
        )
