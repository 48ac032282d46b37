"""What an edit will take here: disk, memory and time, before any weight is read.

Owns the yardstick: a made-up matrix projected in memory, and a file written where the result would go.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.codecs import Plain
from abliterate.checkpoint.matrix import BLOCK, Matrix
from abliterate.edit.apply import THREADS
from abliterate.edit.plan import EditPlan
from abliterate.edit.projection import Removal, orthonormal, project_columns
from abliterate.edit.retype import larger

#: Blocks of numbers that a thread holds at once, and what Python, NumPy and the tables of names take, in bytes.
_BLOCKS_HELD, _FLOOR = 10, 40_000_000
#: What keeping the way back adds to the time of an edited number, and its share of the edited bytes; measured.
_UNDO_TIME, _UNDO_DISK = 2.0, 0.05
_PROBE = 32 << 20


@dataclass(frozen=True)
class Estimate:
    """Bytes of disk that OUT takes, bytes of memory at most, seconds; the last from a measurement here, ± a half."""

    disk: int
    memory: int
    seconds: float


def estimate(checkpoint: Checkpoint, plan: EditPlan, where: Path, undo: bool = True) -> Estimate:
    """What `edit` would take with its result in folder `where`, or the nearest folder above it that exists."""
    edited = [checkpoint.tensors[w.tensor] for w in plan.writers]
    files = sum((checkpoint.path / f).stat().st_size for f in (*checkpoint.shards, *checkpoint.side_files))
    head = checkpoint.tensors[plan.untied.embedding].nbytes if plan.untied is not None else 0
    disk = files + head + larger(checkpoint, plan.retyped) + int(_UNDO_DISK * undo * sum(t.nbytes for t in edited))
    numbers = sum(math.prod(t.shape) for t in edited)
    of_number = _seconds_of_a_number() * (_UNDO_TIME if undo else 1) / THREADS
    return Estimate(
        disk, _FLOOR + THREADS * _BLOCKS_HELD * 4 * BLOCK, numbers * of_number + disk * _seconds_of_a_byte(where)
    )


def _seconds_of_a_number() -> float:
    rows, columns = 2048, 1024
    matrix = Matrix("made up", "made up", 0, rows, columns, Plain("BF16"))
    removal = Removal(orthonormal(np.random.default_rng(0).normal(size=rows).astype(np.float32)))
    with tempfile.TemporaryFile() as file, threadpool_limits(1, user_api="blas"):
        os.pwrite(file.fileno(), bytes(rows * matrix.row_bytes), 0)
        project_columns(matrix, file.fileno(), file.fileno(), removal)
        start = time.perf_counter()
        project_columns(matrix, file.fileno(), file.fileno(), removal)
        return (time.perf_counter() - start) / (rows * columns)


def _seconds_of_a_byte(where: Path) -> float:
    while not where.is_dir():
        where = where.parent
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            start = time.perf_counter()
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
            return (time.perf_counter() - start) / _PROBE
    except OSError:
        return 0.0  # cannot be written to: `edit` will say so
