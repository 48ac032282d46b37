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
from contextlib import suppress
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
#: Numbers in one block, and bytes of one record unpacked: many times what any edit writes.
_MOST_NUMBERS, _MOST_BYTES = 1 << 22, 1 << 28


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
            predicted = matrix.codec.words(along.restored(after), rows, before)
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
        parts = [rows.astype("<u4"), factor.astype("<f4"), _planes(np.diff(where, prepend=where[:1])), _planes(rest)]
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
        try:
            self._file.flush()
        except OSError as error:
            raise ResourceError(f"{self._path}: cannot write ({error.strerror}); free some disk space") from None
        create(self._path, self._file.tell())
        with self._path.open("r+b") as file:
            at = 0
            for *_, offset, size in sorted(self._records, key=lambda record: record[:2]):
                copy_range(self._file.fileno(), file.fileno(), offset, offset + size, self._path.name, to=at)
                at += size
            os.fsync(file.fileno())

    def close(self) -> None:
        """Let go of what is not finished."""
        with suppress(OSError):  # what a full disk did not take is not needed either
            self._file.close()


def _planes(words: Array) -> Raw:
    """The lowest bytes of all words, then the next ones: a fifth less to store, packed in half the time."""
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, words.itemsize).T)


def _words(planes: bytes, dtype: np.typing.DTypeLike) -> Array:
    """What `_planes` took apart."""
    width = np.dtype(dtype).itemsize
    return np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(width, -1).T).view(dtype).ravel()


def read_records(path: Path, pieces: list[list[Matrix]]) -> Iterator[Record]:
    """Every record of a sidecar in the order written, each of a size that its piece of its tensor can have.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or of other tensors.
    """
    try:
        with path.open("rb") as file:
            while head := file.read(_HEAD.size):
                tensor, piece, n, k, columns, scaled, differ, first, size = _HEAD.unpack(head)
                matrix = pieces[tensor][piece]
                sizes = [4 * n, 4 * k * (n or columns), 4 * (n or columns) * scaled, 4 * differ]
                most = sum(sizes) + 8 * differ  # a word that differs has 8 bytes at most
                large = n > matrix.rows or (n > 1 and n * matrix.columns > _MOST_NUMBERS) or differ > n * matrix.columns
                if large or columns != (0 if n else matrix.columns) or not k or max(most, size) > _MOST_BYTES:
                    raise ValueError(f"a record does not fit tensor '{matrix.name}'")
                data = _decompressed(file.read(size), most)
                record = _unpacked((tensor, piece), (n, k, columns, scaled), sizes, first, data)
                if n and not (np.diff(record.rows, append=matrix.rows) > 0).all():
                    raise ValueError(f"a record names rows that tensor '{matrix.name}' does not have")
                yield record
    except (OSError, struct.error, zstandard.ZstdError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: the way back is damaged ({error})") from None


def _decompressed(packed: bytes, most: int) -> bytes:
    """The bytes of a frame, which says beforehand that they are no more than `most`."""
    if not 0 <= zstandard.frame_content_size(packed) <= most:
        raise ValueError("a record unpacks to more than it can hold")
    return zstandard.decompress(packed)


def _unpacked(
    whose: tuple[int, int], shape: tuple[int, int, int, bool], sizes: list[int], first: int, data: bytes
) -> Record:
    n, k, columns, scaled = shape
    a, b, c, e = np.cumsum(sizes).tolist()
    where = np.cumsum(_words(data[c:e], "<u4"), dtype=np.int64) + first
    factor = np.frombuffer(data[a:b], "<f4").reshape((n, k) if n else (k, columns))
    scale = np.frombuffer(data[b:c], "<f4").reshape((n, 1) if n else (1, columns)) if scaled else None
    return Record(*whose, np.frombuffer(data[:a], "<u4").astype(np.intp), factor, scale, where, data[e:])


def restore(matrix: Matrix, record: Record, right: Float32Array, scale: Float32Array | None, edited: Raw) -> Raw:
    """The raw rows before the edit, from the edited ones and their record.

    Raises:
        ValueError, IndexError: they do not fit each other.
    """
    values = matrix.codec.decode(edited, record.rows)
    along = Along(record.factor, right, record.scale if record.scale is not None else scale)
    with np.errstate(all="ignore"):  # numbers of a damaged record; the hash tells of them
        words = np.ascontiguousarray(matrix.codec.words(along.restored(values), record.rows, edited))
    words.ravel()[record.where] += _words(record.rest, words.dtype)
    return words.view(np.uint8)
