"""A stored matrix: rows read from and written to a file as numbers, a block at a time.

Owns positioned reads and writes. Never knows why a matrix is rewritten.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint.codecs import Array, Codec, Raw
from abliterate.errors import ResourceError, VerifyError

#: Numbers in one block: few enough for a core's cache, so many that calls do not count.
BLOCK = 1 << 19
Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Matrix:
    """`rows x columns` numbers at byte `offset` of `file`, part of tensor `name`.

    `stride` bytes lie from one row to the next where the matrix is some of the columns of a wider one. What is written
    goes `shift` bytes further on, where the file it is written to has it there.
    """

    name: str
    file: str
    offset: int
    rows: int
    columns: int
    codec: Codec
    stride: int | None = None
    shift: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return self.codec.row_bytes(self.columns)

    def blocks(self, size: int | None = None) -> Iterator[Rows]:
        """All rows in order, in blocks of about `size` numbers."""
        step = max(1, (size or BLOCK) // max(1, self.columns))
        for start in range(0, self.rows, step):
            yield np.arange(start, min(self.rows, start + step))

    def announce(self, fd: int) -> None:
        """Ask the kernel to read all of it ahead, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, self.offset, self.rows * (self.stride or self.row_bytes), os.POSIX_FADV_WILLNEED)

    def read(self, fd: int, rows: Rows) -> Raw:
        """The raw bytes `[n, row_bytes]` of `rows`, which are in rising order.

        Raises:
            VerifyError: the file ends before them.
        """
        raw = np.empty((len(rows), self.row_bytes), dtype=np.uint8)
        for first, last, at in self._runs(rows):
            wanted = memoryview(raw[first:last]).cast("B")  # type: ignore[arg-type]
            if os.preadv(fd, [wanted], at) != len(wanted):
                raise VerifyError(
                    f"{self.file}: ended while tensor '{self.name}' was read; did the file change meanwhile?"
                )
        return raw

    def values(self, fd: int, rows: Rows) -> Array:
        """The numbers of `rows`, `[n, columns]`."""
        return self.codec.decode(self.read(fd, rows), rows)

    def write(self, fd: int, rows: Rows, raw: Raw) -> None:
        """Store the raw bytes of `rows`, which are in rising order.

        Raises:
            ResourceError: the disk is full.
        """
        raw = np.ascontiguousarray(raw)
        for first, last, at in self._runs(rows):
            write_all(fd, memoryview(raw[first:last]).cast("B"), at + self.shift, self.file)  # type: ignore[arg-type]

    def _runs(self, rows: Rows) -> Iterator[tuple[int, int, int]]:
        """Half-open ranges of places in `rows` whose bytes follow one another, and where in the file they begin."""
        stride = self.stride or self.row_bytes
        apart = np.diff(rows) != 1 if stride == self.row_bytes else np.ones(len(rows) - 1, dtype=bool)
        start = 0
        for end in (*(np.flatnonzero(apart) + 1).tolist(), len(rows)):
            if end > start:
                yield start, end, self.offset + int(rows[start]) * stride
            start = end

    def require_finite(self, fd: int) -> None:
        """Look at every number.

        Raises:
            VerifyError: one is NaN or infinity; names its row.
        """
        for rows in self.blocks():
            finite = np.isfinite(self.values(fd, rows)).all(axis=1)
            if not finite.all():
                raise VerifyError(
                    f"{self.file}: tensor '{self.name}' holds NaN or infinity, first in row "
                    f"{rows[int(np.argmin(finite))]}; the checkpoint is damaged: nothing was written"
                )


def write_all(fd: int, data: memoryview, offset: int, file: str) -> None:
    """Write all of `data` at `offset`.

    Raises:
        ResourceError: the disk does not take it.
    """
    while len(data):
        try:
            done = os.pwrite(fd, data, offset)
        except OSError as error:
            raise ResourceError(f"{file}: cannot write ({error.strerror}); free some disk space") from None
        data, offset = data[done:], offset + done
