"""Write one file of an edited checkpoint: the planned tensors projected on their way, every other byte copied.

Owns which thread does what. Never knows about other files, or where directions come from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from abliterate.checkpoint import Checkpoint, TensorInfo
from abliterate.checkpoint.codecs import PLAIN
from abliterate.checkpoint.storage import by_rows, matrices
from abliterate.checkpoint.stream import copy_range, create, gaps, tensor_sha256
from abliterate.edit.projection import Removal, Removed, project_columns, project_rows
from abliterate.edit.sidecar import Sidecar
from abliterate.edit.writers import ResidualWriter
from abliterate.model.progress import Progress

#: Bytes copied by one thread at a time.
_COPY = 256 << 20


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What happened to one tensor: norms, the leak after the cast, the hash of its new bytes.

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


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor to edit, and what to take out of it."""

    checkpoint: Checkpoint
    writer: ResidualWriter
    removal: Removal

    @property
    def info(self) -> TensorInfo:
        """Where it lies."""
        return self.checkpoint.tensors[self.writer.tensor]

    def jobs(self) -> int:
        """Into how many pieces its work falls; block-scaled ones share scales that only one thread should hold."""
        return sum(1 for _ in matrices(self.checkpoint, self.info, self.writer.axis)) if self.info.dtype in PLAIN else 1

    def edit(
        self, number: int, job: tuple[int, int], source: int, target: int, sidecar: Sidecar | None
    ) -> list[Removed]:
        """Project the pieces that fall to job `i` of `n`, from file to file; `number` is the tensor's in its file."""
        project = project_rows if by_rows(self.info, self.writer.axis) else project_columns
        removed = []
        for i, matrix in enumerate(matrices(self.checkpoint, self.info, self.writer.axis)):
            if i % job[1] == job[0]:
                matrix.announce(source)
                undo = sidecar.piece(number, i, matrix) if sidecar is not None else None
                removed.append(project(matrix, source, target, self.removal, undo))
        return removed

    def record(self, parts: list[Removed], sha256: str) -> EditRecord:
        """What happened, from what happened to the pieces."""
        norm, removed, left = np.sqrt(np.sum(parts, axis=0)).tolist()
        w = self.writer
        return EditRecord(w.tensor, w.role, w.layer, norm, removed, left / removed if removed else 0.0, sha256)


@dataclass(frozen=True)
class Workers:
    """The threads of an edit: `compute` for projecting, `copy` beside it, `after` for hashing and forcing to disk.

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
        workers = cls(ThreadPoolExecutor(threads), ThreadPoolExecutor(1), ThreadPoolExecutor(2))
        try:
            with threadpool_limits(1, user_api="blas"):
                yield workers
        finally:
            for pool in (workers.compute, workers.copy, workers.after):
                pool.shutdown(wait=True, cancel_futures=True)


def write_shard(
    source: Path,
    target: Path,
    tensors: list[PlannedTensor],
    workers: Workers,
    way_back: Path | None,
    progress: Progress,
) -> tuple[list[EditRecord], dict[str, str]]:
    """Write `target` from `source`; the records of its tensors, and with a `way_back` their hashes before.

    Raises:
        VerifyError: a tensor holds NaN or infinity, or the source changed meanwhile.
        ResourceError: the disk is full.
    """
    create(target, source.stat().st_size)
    old, new = os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
    sidecar = Sidecar(way_back) if way_back is not None and tensors else None
    futures: list[Future[Any]] = []

    def submit(pool: ThreadPoolExecutor, *job: Any) -> Future[Any]:
        futures.append(pool.submit(*job))
        return futures[-1]

    try:
        edits = [
            [submit(workers.compute, t.edit, i, (job, jobs), old, new, sidecar) for job in range(jobs)]
            for i, (t, jobs) in enumerate((t, t.jobs()) for t in tensors)
        ]
        edited = [(t.info.offset, t.info.offset + t.info.nbytes) for t in tensors]
        for start, stop in gaps(edited, os.fstat(new).st_size):
            for at in range(start, stop, _COPY):
                submit(workers.copy, copy_range, old, new, at, min(stop, at + _COPY), source.name)
        removed, after, before = [], [], []
        for tensor, parts in zip(tensors, edits, strict=True):
            removed.append([r for part in parts for r in part.result()])
            after.append(submit(workers.after, tensor_sha256, new, tensor.info))
            before.append(submit(workers.after, tensor_sha256, old, tensor.info) if sidecar is not None else None)
            progress(1)
        for future in futures:
            future.result()
        if sidecar is not None:
            sidecar.finish()
        records = [t.record(r, f.result()) for t, r, f in zip(tensors, removed, after, strict=True)]
        return records, {t.info.name: f.result() for t, f in zip(tensors, before, strict=True) if f is not None}
    finally:
        # Where something failed, no thread may go on with a file number that is free for others.
        for future in futures:
            future.cancel()
        wait(futures)
        if sidecar is not None:
            sidecar.close()
        os.close(old)
        os.close(new)
