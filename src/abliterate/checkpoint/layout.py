"""A file that is made of another one's bytes: which ranges go where, and what it has of its own.

Owns that list and carrying it out. Never knows a file format, or why some bytes are left to be filled.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoint.matrix import write_all
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.checkpoint.stream import copy_range, create, gaps

#: Bytes `[start, stop)` of the other file, and the place they go to.
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """A file of `size` bytes: bytes of its `own` by their place, pieces that are `copied`, and where its `tensors` lie.

    What neither gives is nought, to be filled.
    """

    size: int
    own: tuple[tuple[int, bytes], ...]
    copied: tuple[Piece, ...]
    tensors: dict[str, TensorInfo]

    def begin(self, target: Path) -> None:
        """Make the file with its own bytes alone; what was there is replaced.

        Raises:
            ResourceError: the disk is full.
        """
        create(target, self.size)
        with target.open("r+b") as file:
            for place, data in self.own:
                write_all(file.fileno(), memoryview(data), place, target.name)

    def write(self, source: Path, target: Path) -> None:
        """Make the file with all that is copied to it from `source`.

        Raises:
            ResourceError: the disk is full.
            VerifyError: the source ends before what is to be copied.
        """
        self.begin(target)
        self.copy(source, target)

    def copy(self, source: Path, target: Path) -> None:
        """Copy the pieces to a file that is there.

        Raises:
            ResourceError, VerifyError: as for `write`.
        """
        old, new = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
        try:
            for start, stop, to in self.copied:
                copy_range(old, new, start, stop, source.name, to)
        finally:
            os.close(old)
            os.close(new)


def in_place(tensors: Mapping[str, TensorInfo], left: Collection[str], size: int) -> Layout:
    """A file of the same layout, all of it copied but for the tensors `left`."""
    taken = ((t.offset, t.offset + t.nbytes) for name, t in tensors.items() if name in left)
    return Layout(size, (), tuple((start, stop, start) for start, stop in gaps(taken, size)), dict(tensors))


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces that follow one another on both sides as one; empty ones left out."""
    run: Piece | None = None
    for start, stop, to in pieces:
        if start == stop:
            continue
        if run is not None and run[1] == start and run[2] + run[1] - run[0] == to:
            run = run[0], stop, run[2]
            continue
        if run is not None:
            yield run
        run = start, stop, to
    if run is not None:
        yield run
