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
from typing import BinaryIO, NamedTuple

import numpy as np
import zstandard

from abliterate.checkpoint.codecs import Array, Float32Array, Raw
from abliterate.checkpoint.matrix import Matrix, Rows
from abliterate.checkpoint.stream import copy_range, create
from abliterate.edit.projection import Along, Undo
from abliterate.errors import CheckpointError, ResourceError

#: Of a record: tensor, piece of it, rows in the block (0: factors that hold for the piece), k, columns, whether there
#: are scales, words that differ from the prediction, the first of them, bytes packed.
_HEAD = struct.Struct("<IIIHI?IIQ")
_LEVEL = 1


class Record(NamedTuple):
    """One record as it is read back: a block of rows, or (no rows) the right factor of its piece."""

    tensor: int
    piece: int
    rows: Rows
    factor: Float32Array
    scale: Float32Array | None
    where: Array
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
                none = np.empty(0, "<u4")
                self._write(tensor, piece, none, along.right, None if by_row else along.scale, none, none)
            predicted = matrix.codec.words(along.restored(after), rows)
            rest = (before.view(predicted.dtype) - predicted).ravel()
            # Mostly nought: where the others are, and what, goes through the compressor many times faster.
            where = np.flatnonzero(rest != 0).astype("<u4")
            self._write(tensor, piece, rows, along.left, along.scale if by_row else None, where, rest[where])

        return record

    def _write(
        self,
        tensor: int,
        piece: int,
        rows: Rows,
        factor: Float32Array,
        scale: Float32Array | None,
        where: Array,
        rest: Array,
    ) -> None:
        parts = [rows.astype("<u4"), factor.astype("<f4"), np.diff(where, prepend=where[:1]), rest]
        if scale is not None:
            parts.insert(2, scale.astype("<f4"))
        packed = zstandard.compress(b"".join(part.tobytes() for part in parts), _LEVEL)
        k, columns = (factor.shape[1], 0) if len(rows) else factor.shape
        first = int(where[0]) if len(where) else 0
        head = _HEAD.pack(tensor, piece, len(rows), k, columns, scale is not None, len(where), first, len(packed))
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
                tensor, piece, n, k, columns, scaled, differ, first, size = _HEAD.unpack(head)
                data = zstandard.decompress(file.read(size))
                yield _unpacked((tensor, piece), (n, k, columns, scaled), differ, first, data)
    except (OSError, struct.error, zstandard.ZstdError, ValueError) as error:
        raise CheckpointError(f"{path}: the way back is damaged ({error})") from None


def _unpacked(
    whose: tuple[int, int], shape: tuple[int, int, int, bool], differ: int, first: int, data: bytes
) -> Record:
    n, k, columns, scaled = shape
    sizes = [4 * n, 4 * k * (n or columns), 4 * (n or columns) * scaled, 4 * differ]
    a, b, c, e = np.cumsum(sizes).tolist()
    where = np.cumsum(np.frombuffer(data[c:e], "<u4"), dtype=np.int64) + first
    factor = np.frombuffer(data[a:b], "<f4").reshape((n, k) if n else (k, columns))
    scale = np.frombuffer(data[b:c], "<f4").reshape((n, 1) if n else (1, columns)) if scaled else None
    return Record(*whose, np.frombuffer(data[:a], "<u4").astype(np.intp), factor, scale, where, data[e:])


def restore(matrix: Matrix, record: Record, right: Float32Array, scale: Float32Array | None, edited: Raw) -> Raw:
    """The raw rows before the edit, from the edited ones and their record."""
    values = matrix.codec.decode(edited, record.rows)
    along = Along(record.factor, right, record.scale if record.scale is not None else scale)
    words = np.ascontiguousarray(matrix.codec.words(along.restored(values), record.rows))
    words.ravel()[record.where] += np.frombuffer(record.rest, words.dtype)
    return words.view(np.uint8)
