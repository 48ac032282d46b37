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
from abliterate.checkpoint.ggml_blocks import LAYOUTS, Blocks
from abliterate.checkpoint.matrix import BLOCK, Matrix
from abliterate.checkpoint.storage import PANEL
from abliterate.edit.apply import THREADS
from abliterate.edit.plan import EditPlan
from abliterate.edit.projection import Removal, orthonormal, project_columns
from abliterate.edit.requantise import move_columns
from abliterate.edit.retype import larger

#: Blocks of numbers that a thread holds at once, panels where codes move, and what Python, NumPy and the tables of
#: names take, in bytes.
_BLOCKS_HELD, _PANELS_HELD, _FLOOR = 10, 7, 40_000_000
#: What keeping the way back adds to the time of an edited number, and its share of the edited bytes; measured. Where
#: codes move it adds hardly any time.
_UNDO_TIME, _UNDO_DISK = 2.0, 0.05
_PROBE = 32 << 20
#: A byte that makes an ordinary number of any type.
_SOME_SCALE = 0x2C


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
    types = [(math.prod(t.shape), plan.retyped.get(t.name, t.dtype)) for t in edited]
    codes = [(numbers, dtype) for numbers, dtype in types if dtype in LAYOUTS]
    moved = sum(numbers for numbers, _ in codes)
    seconds = disk * _seconds_of_a_byte(where)
    if codes:
        seconds += moved * _seconds_of_a_number(Blocks(max(codes)[1])) / THREADS
    if rest := sum(numbers for numbers, _ in types) - moved:
        seconds += rest * _seconds_of_a_number(Plain("BF16")) * (_UNDO_TIME if undo else 1) / THREADS
    held = _PANELS_HELD * PANEL if codes else _BLOCKS_HELD * BLOCK
    return Estimate(disk, _FLOOR + THREADS * 4 * held, seconds)


def _seconds_of_a_number(codec: Blocks | Plain) -> float:
    rows, columns = 1024, 1024
    matrix = Matrix("made up", "made up", 0, rows, columns, codec)
    random = np.random.default_rng(0)
    removal = Removal(orthonormal(random.normal(size=rows).astype(np.float32)))
    raw = np.full(rows * matrix.row_bytes, _SOME_SCALE, np.uint8)
    project = project_columns
    if isinstance(codec, Blocks):
        project, blocks = move_columns, raw.reshape(-1, codec.layout.nbytes)
        for offset, nbytes, *_ in codec.layout.planes:
            blocks[:, offset : offset + nbytes] = random.integers(0, 256, (len(blocks), nbytes))
    with tempfile.TemporaryFile() as file, threadpool_limits(1, user_api="blas"):
        os.pwrite(file.fileno(), raw.tobytes(), 0)
        project(matrix, file.fileno(), file.fileno(), removal)
        os.pwrite(file.fileno(), raw.tobytes(), 0)
        start = time.perf_counter()
        project(matrix, file.fileno(), file.fileno(), removal)
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
