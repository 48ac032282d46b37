"""Write one file of an edited checkpoint: the planned tensors projected on their way, every other byte copied.

Owns which thread does what. Never knows about other files, or where directions come from.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from abliterate.checkpoint import Checkpoint, TensorInfo
from abliterate.checkpoint.ggml_blocks import LAYOUTS
from abliterate.checkpoint.layout import Layout
from abliterate.checkpoint.storage import IN_PIECES, by_rows, matrices
from abliterate.checkpoint.stream import copy_range, forget, tensor_sha256
from abliterate.edit.projection import Removal, Removed, project_columns, project_rows
from abliterate.edit.requantise import encode, move_columns, move_rows
from abliterate.edit.retype import keep_whole, kept_whole, panels, reencode
from abliterate.edit.sidecar import Sidecar
from abliterate.edit.writers import ResidualWriter
from abliterate.model.progress import Progress

#: Bytes copied by one thread at a time.
_COPY = 256 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What happened to one tensor: norms, the leak after the cast, the hash of its new bytes, the strength of it all.

    `leak` is what the cast left or put back along the directions, relative to what was there:
    `‖Dᵀ(stored − exact)‖ / ‖Dᵀ W‖`. At strength 1 `Dᵀ exact` is zero.
    """

    tensor: str
    role: str
    layer: int | None
    norm_before: float
    norm_removed: float
    leak: float
    sha256: str
    strength: float


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to edit, what to take out of it, and where it lies when it is `stored`, perhaps in another type."""

    checkpoint: Checkpoint
    writer: ResidualWriter
    removal: Removal
    stored: TensorInfo

    @property
    def info(self) -> TensorInfo:
        """Where it lies."""
        return self.checkpoint.tensors[self.writer.tensor]

    @property
    def retyped(self) -> bool:
        """Whether it is stored in another type."""
        return self.stored.dtype != self.info.dtype

    def jobs(self) -> int:
        """Into how many pieces its work falls; block-scaled ones share scales that only one thread should hold."""
        if self.retyped or self.info.dtype not in IN_PIECES:
            return 1
        return sum(1 for _ in matrices(self.checkpoint, self.info, self.writer.axis))

    def edit(
        self, number: int, job: tuple[int, int], source: int, target: int, sidecar: Sidecar | None
    ) -> list[Removed]:
        """Project the pieces that fall to job `i` of `n`, from file to file; `number` is the tensor's in its file.

        One that gets a block type is encoded from its exact result; one that gets floats is written in them first, and
        projected where it lies then.
        """
        along_rows, info, shift = by_rows(self.info, self.writer.axis), self.info, self.stored.offset - self.info.offset
        if self.retyped and self.stored.dtype in LAYOUTS:
            pairs = panels(info, self.stored, along_rows)
            return [encode(old, new, source, target, self.removal, along_rows) for old, new in pairs]
        if self.retyped:
            reencode(info, self.stored, source, target)
            source, info, shift, sidecar = target, self.stored, 0, None
        if info.dtype in LAYOUTS:
            project = move_rows if along_rows else move_columns
        else:
            project = project_rows if along_rows else project_columns
        removed = []
        for i, piece in enumerate(matrices(self.checkpoint, info, self.writer.axis)):
            if i % job[1] == job[0]:
                matrix = replace(piece, shift=shift)
                matrix.announce(source)
                undo = sidecar.piece(number, i, matrix) if sidecar is not None else None
                removed.append(project(matrix, source, target, self.removal, undo))
        return removed

    def record(self, parts: list[Removed], sha256: str) -> EditRecord:
        """What happened, from what happened to the pieces."""
        norm, removed, left = np.sqrt(np.sum(parts, axis=0)).tolist()
        w = self.writer
        leak, strength = left / removed if removed else 0.0, self.removal.strength
        return EditRecord(w.tensor, w.role, w.layer, norm, removed, leak, sha256, strength)


@dataclass(frozen=True)
class Workers:
    """The threads of an edit: `compute` for projecting, `copy` beside it, `after` for forcing to disk.

    Copying is the disk's work and the kernel's, projecting the cores': one must not wait for the other.
    """

    compute: ThreadPoolExecutor
    copy: ThreadPoolExecutor
    after: ThreadPoolExecutor

    @classmethod
    @contextmanager
    def start(cls, threads: int) -> Iterator[Workers]:
        """Threads that drop what they have not begun as soon as something fails.

        Blocks are too small for a matrix product to be shared out as well: that alone would make an edit twice as slow.
        """
        workers = cls(ThreadPoolExecutor(threads), ThreadPoolExecutor(1), ThreadPoolExecutor(1))
        try:
            with threadpool_limits(1, user_api="blas"):
                yield workers
        finally:
            for pool in (workers.compute, workers.copy, workers.after):
                pool.shutdown(wait=True, cancel_futures=True)


class ShardEdit:
    """One file on its way: its jobs are with the workers from the start, `finish` waits for them.

    So the workers can have the jobs of the next file before this one is done.

    Raises:
        ResourceError: the disk is full.
    """

    def __init__(
        self, source: Path, target: Path, tensors: list[PlannedTensor], workers: Workers, way_back: Path | None,
        layout: Layout,
    ) -> None:  # fmt: skip
        layout.begin(target)
        self._tensors, self._futures = tensors, list[Future[Any]]()
        jobs = [tensor.jobs() for tensor in tensors]
        self._left, self._lock, self._hashes = list(jobs), threading.Lock(), dict[str, tuple[str, str | None]]()
        with ExitStack() as opened:
            self._old, self._new = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
            opened.callback(os.close, self._old)
            opened.callback(os.close, self._new)
            self._sidecar = opened.enter_context(closing(Sidecar(way_back))) if way_back and tensors else None
            opened.callback(self._stop)
            self._edits = [
                [self._submit(workers.compute, self._edit, number, (job, of)) for job in range(of)]
                for number, of in enumerate(jobs)
            ]
            for start, stop, to in layout.copied:
                for at in range(start, stop, _COPY):
                    end, place = min(stop, at + _COPY), to + at - start
                    self._submit(workers.copy, copy_range, self._old, self._new, at, end, source.name, place)
            if way_back and (retyped := {t.info.name for t in tensors if t.retyped}):
                self._submit(workers.copy, keep_whole, source, kept_whole(way_back), retyped)
            self.close = opened.pop_all().close

    def _submit(self, pool: ThreadPoolExecutor, job: Callable[..., T], *arguments: Any) -> Future[T]:
        self._futures.append(pool.submit(job, *arguments))
        return self._futures[-1]

    def _edit(self, number: int, job: tuple[int, int]) -> list[Removed]:
        """A job; the last one of a tensor takes its hashes too, while the kernel still has it in memory."""
        tensor = self._tensors[number]
        removed = tensor.edit(number, job, self._old, self._new, self._sidecar)
        with self._lock:
            self._left[number] -= 1
            last = not self._left[number]
        if last:
            before = tensor_sha256(self._old, tensor.info) if self._sidecar is not None else None
            self._hashes[tensor.info.name] = tensor_sha256(self._new, tensor.stored), before
            forget(self._old, tensor.info.offset, tensor.info.nbytes)
            forget(self._new, tensor.stored.offset, tensor.stored.nbytes)
        return removed

    def finish(self, progress: Progress) -> tuple[list[EditRecord], dict[str, str]]:
        """The records of the file's tensors and, with a way back, their hashes before, when all of it is written.

        Raises:
            VerifyError: a tensor holds NaN or infinity, or the source changed meanwhile.
            ResourceError: the disk is full.
        """
        records, hashes_before = [], {}
        for tensor, parts in zip(self._tensors, self._edits, strict=True):
            removed = [r for part in parts for r in part.result()]
            after, before = self._hashes[tensor.info.name]
            records.append(tensor.record(removed, after))
            if before is not None:
                hashes_before[tensor.info.name] = before
            progress(1)
        for future in self._futures:
            future.result()
        if self._sidecar is not None:
            self._sidecar.finish()
        return records, hashes_before

    def _stop(self) -> None:
        """Where something failed, no thread may go on with a file number that is free for others."""
        for future in self._futures:
            future.cancel()
        wait(self._futures)
