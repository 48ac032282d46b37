"""Which tensors of two checkpoints differ, and the change of each as that of matrices.

Owns the pairing by name and the reading of both, bounded in memory; never knows what the changes have in common.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from threadpoolctl import threadpool_limits

from abliterate.checkpoint import Checkpoint, TensorInfo
from abliterate.checkpoint.storage import IN_PIECES, logical_name, matrices, slices
from abliterate.compare.change import Change, Pair, change_of
from abliterate.errors import UnsupportedError, VerifyError
from abliterate.model.progress import Progress

_CHUNK = 4 << 20
_THREADS = os.cpu_count() or 1

T = TypeVar("T")


@dataclass(frozen=True)
class Names:
    """The tensors of two checkpoints by name: in both with one shape, in one only, in both with two shapes."""

    both: list[str]
    added: list[str]
    missing: list[str]
    reshaped: list[str]

    @classmethod
    def of(cls, base: Checkpoint, other: Checkpoint) -> Names:
        """Compare the tables."""
        common = [name for name in base.tensors if name in other.tensors]
        alike = [n for n in common if base.tensors[n].shape == other.tensors[n].shape]
        return cls(
            alike,
            [n for n in other.tensors if n not in base.tensors],
            [n for n in base.tensors if n not in other.tensors],
            [n for n in common if n not in set(alike)],
        )


@dataclass
class Files:
    """The open shards of both checkpoints."""

    base: Checkpoint
    other: Checkpoint
    _fds: dict[tuple[bool, str], int] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def opened(cls, base: Checkpoint, other: Checkpoint) -> Iterator[Files]:
        """Open them all."""
        with ExitStack() as stack:
            files = cls(base, other)
            for second, checkpoint in enumerate((base, other)):
                for shard in checkpoint.shards:
                    fd = os.open(checkpoint.path / shard, os.O_RDONLY)
                    stack.callback(os.close, fd)
                    files._fds[bool(second), shard] = fd
            yield files

    def tensors(self, name: str) -> tuple[TensorInfo, TensorInfo]:
        """A tensor in both."""
        return self.base.tensors[name], self.other.tensors[name]

    def fds(self, name: str) -> tuple[int, int]:
        """The files that hold it."""
        one, two = self.tensors(name)
        return self._fds[False, one.file], self._fds[True, two.file]

    def differ(self, name: str) -> bool:
        """Whether the stored bytes of a tensor differ, or their type."""
        (one, two), (first, second) = self.tensors(name), self.fds(name)
        if one.dtype != two.dtype:
            return True
        for at in range(0, one.nbytes, _CHUNK):
            size = min(_CHUNK, one.nbytes - at)
            a, b = os.pread(first, size, one.offset + at), os.pread(second, size, two.offset + at)
            if len(a) != size or len(b) != size:
                raise VerifyError(f"{one.file}: ended while '{name}' was read; did the file change meanwhile?")
            if a != b:
                return True
        return False

    def pairs(self, name: str) -> list[Pair]:
        """The matrices of a tensor in both, its last two axes down and across; a vector is a matrix of one column.

        Raises:
            UnsupportedError: the storage type holds no numbers that are known.
        """
        one, two = self.tensors(name)
        axis = max(0, len(one.shape) - 2)
        if not one.shape:
            raise UnsupportedError(f"{self.base.path}: tensor '{name}' is a single number")
        if self.base.format == "gguf" and len(one.shape) > 1:
            if two.dtype not in IN_PIECES:
                raise UnsupportedError(f"{self.other.source}: '{name}' is stored as {two.dtype}, without steps")
            found = zip(slices(one), slices(two), strict=True)
        else:
            found = zip(matrices(self.base, one, axis), matrices(self.other, two, axis), strict=True)
        return [Pair(a, b, self.fds(name), two.dtype) for a, b in found]


def changed(files: Files, names: list[str], progress: Progress) -> list[str]:
    """Those of the tensors whose bytes differ; scales count as their tensor's."""
    found = dict(zip(names, _each(files.differ, names, progress), strict=True))
    return [name for name in names if found[name]]


def changes(files: Files, names: list[str], progress: Progress) -> dict[str, list[Change] | None]:
    """The change of every matrix of the tensors; None where they hold no numbers that can be compared."""

    def of(name: str) -> list[Change] | None:
        if logical_name(files.base, name) is None:
            return None
        try:
            pairs = files.pairs(name)
        except UnsupportedError:
            return None
        return [change_of(pair) for pair in pairs]

    return dict(zip(names, _each(of, names, progress), strict=True))


def _each(work: Callable[[str], T], names: list[str], progress: Progress) -> list[T]:
    """Do it for all, on all cores; blocks are too small for a matrix product to be shared out as well."""

    def one(name: str) -> T:
        result = work(name)
        progress(1)
        return result

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, names))
