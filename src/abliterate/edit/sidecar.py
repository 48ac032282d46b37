"""The way back: what an edit takes from the weights, kept beside them so that the base can be restored bit for bit.

Owns the sidecar's file. It holds no copy of the weights: each block of rows is predicted from the edited one and the
low-rank factors that were taken out, and only what rounding made of the prediction is stored, compressed.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zstandard

from abliterate.checkpoint.codecs import Array, Codec, Float32Array, Raw
from abliterate.checkpoint.matrix import Matrix, Rows
from abliterate.checkpoint.stream import copy_range, create
from abliterate.edit.projection import Along, Undo
from abliterate.errors import CheckpointError, ResourceError

#: Of a record: tensor, piece of it, rows in the block (0: factors that hold for the piece), k, columns, scaled, bytes.
_HEAD = struct.Struct("<IIIHI?Q")
_LEVEL = 1


class Record(NamedTuple):
    """One record as it is read back: a block of rows, or (no rows) the right factor of its piece."""

    tensor: int
    piece: int
    rows: Rows
    factor: Float32Array
    scale: Float32Array | None
    rest: bytes


class Sidecar:
    """Writes the sidecar of one file of weights; `piece` may be called and used by several threads."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = path, threading.Lock()
        self._file: BinaryIO = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed by `close`
        self._records: list[tuple[int, int, int, int]] = []  # tensor, piece, offset, bytes

    def piece(self, tensor: int, piece: int, matrix: Matrix) -> Undo:
        """The recorder of one matrix, the `piece`-th of the `tensor`-th edited tensor."""
        begun = False

        def record(rows: Rows, before: Raw, after: Array, along: Along) -> None:
            nonlocal begun
            by_row = along.scale is not None and along.scale.shape[0] == len(rows) and along.scale.shape[1] == 1
            if not begun:
                begun = True
                shared = None if by_row else along.scale
                self._write(tensor, piece, np.empty(0, np.intp), along.right, shared, b"")
            predicted = matrix.codec.round(along.restored(after), rows)
            word = _word(matrix.codec, matrix.columns)
            rest = before.view(word) - np.ascontiguousarray(predicted).view(word)
            self._write(tensor, piece, rows, along.left, along.scale if by_row else None, rest.tobytes())

        return record

    def _write(
        self, tensor: int, piece: int, rows: Rows, factor: Float32Array, scale: Float32Array | None, rest: bytes
    ) -> None:
        parts = [rows.astype("<u4").tobytes(), np.ascontiguousarray(factor, "<f4").tobytes()]
        if scale is not None:
            parts.append(np.ascontiguousarray(scale, "<f4").tobytes())
        packed = zstandard.compress(b"".join((*parts, rest)), _LEVEL)
        k, columns = (factor.shape[1], 0) if len(rows) else factor.shape
        head = _HEAD.pack(tensor, piece, len(rows), k, columns, scale is not None, len(packed))
        try:
            with self._lock:
                self._records.append((tensor, piece, self._file.tell(), len(head) + len(packed)))
                self._file.write(head + packed)
        except OSError as error:
            raise ResourceError(f"{self._path}: cannot write ({error.strerror}); free some disk space") from None

    def finish(self) -> None:
        """Put the records in order of tensors and pieces, whichever thread was first, and force them to disk.

        Raises:
            ResourceError: the disk is full.
        """
        self._file.flush()
        create(self._path, self._file.tell())
        with self._path.open("r+b") as file:
            at = 0
            for *_, offset, size in sorted(self._records, key=lambda record: record[:2]):
                copy_range(self._file.fileno(), file.fileno(), offset, offset + size, self._path.name, to=at)
                at += size
            os.fsync(file.fileno())

    def close(self) -> None:
        """Let go of what is not finished."""
        self._file.close()


def read_records(path: Path) -> Iterator[Record]:
    """Every record of a sidecar in the order written.

    Raises:
        CheckpointError: the file is missing, cut short or damaged.
    """
    try:
        with path.open("rb") as file:
            while head := file.read(_HEAD.size):
                tensor, piece, n, k, columns, scaled, size = _HEAD.unpack(head)
                yield _unpacked(tensor, piece, n, k, columns, scaled, file.read(size))
    except (OSError, struct.error, zstandard.ZstdError, ValueError) as error:
        raise CheckpointError(f"{path}: the way back is damaged ({error})") from None


def _unpacked(tensor: int, piece: int, n: int, k: int, columns: int, scaled: bool, packed: bytes) -> Record:
    data = zstandard.decompress(packed)
    sizes = [4 * n, 4 * k * (n or columns), 4 * (n or columns) * scaled]
    a, b, c = np.cumsum(sizes).tolist()
    factor = np.frombuffer(data[a:b], "<f4").reshape((n, k) if n else (k, columns))
    scale = np.frombuffer(data[b:c], "<f4").reshape((n, 1) if n else (1, columns)) if scaled else None
    return Record(tensor, piece, np.frombuffer(data[:a], "<u4").astype(np.intp), factor, scale, data[c:])


def restore(matrix: Matrix, record: Record, right: Float32Array, scale: Float32Array | None, edited: Raw) -> Raw:
    """The raw rows before the edit, from the edited ones and their record."""
    values = matrix.codec.decode(edited, record.rows)
    along = Along(record.factor, right, record.scale if record.scale is not None else scale)
    predicted = np.ascontiguousarray(matrix.codec.round(along.restored(values), record.rows))
    word = _word(matrix.codec, matrix.columns)
    total: Array = predicted.view(word) + np.frombuffer(record.rest, word).reshape(len(record.rows), -1)
    return total.view(np.uint8)


def _word(codec: Codec, columns: int) -> np.dtype[Any]:
    """The unsigned integer as wide as one element, so that neighbours on the grid differ by one."""
    return np.dtype(f"<u{max(1, codec.row_bytes(columns) // max(1, columns))}")
