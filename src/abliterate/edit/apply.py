"""Write a complete edited checkpoint: every file copied, the planned tensors projected in place.

Owns the order of writing: a shard is copied, then patched in blocks; nothing here renames the folder into
place (the caller owns that), so an interrupted edit is never loadable as a result.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint import Checkpoint, TensorInfo
from abliterate.checkpoint.dtypes import Float32Array, decode
from abliterate.checkpoint.folder import RECORDS
from abliterate.checkpoint.stream import copy_file, matrices, read_rows, row_blocks, sync, write_rows
from abliterate.edit.plan import EditPlan
from abliterate.edit.projection import Removed, normalise, project_columns, project_rows
from abliterate.edit.writers import ResidualWriter
from abliterate.errors import VerifyError
from abliterate.model.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What happened to one tensor: norms, the leak after the cast, the hash of its new bytes."""

    tensor: str
    role: str
    layer: int | None
    norm_before: float
    norm_removed: float
    leak: float
    sha256: str


def apply_edit(
    checkpoint: Checkpoint,
    plan: EditPlan,
    direction: npt.NDArray[np.float32],
    out: Path,
    strength: float = 1.0,
    progress: Progress = silent,
) -> list[EditRecord]:
    """Write the edited checkpoint into folder `out`; one record for each edited tensor, in file order.

    Shards keep their names, order and headers; every byte outside the planned tensors equals the source.
    Arithmetic is float32 with one cast back. At most a few blocks of rows are held.

    Raises:
        VerifyError: a tensor to edit holds NaN or infinity, or the direction does not fit; names it.
        ResourceError: the disk is full.
    """
    _check(checkpoint, plan, direction)
    for name in checkpoint.side_files:
        copy_file(checkpoint.path / name, out / _place(name))
    by_shard: dict[str, list[ResidualWriter]] = defaultdict(list)
    for writer in plan.writers:
        by_shard[checkpoint.tensors[writer.tensor].file].append(writer)
    records = []
    for shard in checkpoint.shards:
        copy_file(checkpoint.path / shard, out / shard)
        fd = os.open(out / shard, os.O_RDWR)
        try:
            for writer in by_shard[shard]:
                records.append(_edit_tensor(checkpoint, writer, direction, fd, strength))
                progress(1)
        finally:
            os.close(fd)
        sync(out / shard)
    sync(out)
    return records


def _check(checkpoint: Checkpoint, plan: EditPlan, direction: npt.NDArray[np.float32]) -> None:
    if plan.source != checkpoint.fingerprint:
        raise VerifyError(f"{checkpoint.path}: changed since the edit was planned; plan again")
    for writer in plan.writers:
        tensor = checkpoint.tensors[writer.tensor]
        if tensor.shape[writer.axis] != len(direction):
            raise VerifyError(
                f"the direction has d_model {len(direction)}, tensor '{tensor.name}' has {tensor.shape[writer.axis]}; "
                "the direction is of another model"
            )


def _place(name: str) -> str:
    """Where a side file goes: the records of an earlier edit make room for those of this one."""
    return f"{RECORDS}/base/{name.removeprefix(RECORDS + '/')}" if name.startswith(f"{RECORDS}/") else name


def _edit_tensor(
    checkpoint: Checkpoint, writer: ResidualWriter, direction: Float32Array, fd: int, strength: float
) -> EditRecord:
    """Project one tensor of an open, already copied shard in place."""
    tensor = checkpoint.tensors[writer.tensor]
    digest = hashlib.sha256()

    d = normalise(direction, _gain(checkpoint, writer), writer.centred)
    parts = list[Removed]()
    for matrix in matrices(tensor, writer.axis):

        def blocks(matrix: TensorInfo = matrix) -> Iterator[tuple[int, Float32Array]]:
            for start, stop in row_blocks(matrix):
                yield start, read_rows(fd, matrix, start, stop)

        def store(start: int, rows: Float32Array, matrix: TensorInfo = matrix) -> Float32Array:
            raw = write_rows(fd, matrix, start, rows)
            digest.update(raw)
            return decode(raw, matrix.dtype).reshape(rows.shape)

        # The last axis of a matrix lies along its rows; a vector is a matrix of one column.
        rows_are_written = len(tensor.shape) > 1 and writer.axis == len(tensor.shape) - 1
        parts.append((project_rows if rows_are_written else project_columns)(blocks, store, d, strength))
    norm, removed = (float(np.linalg.norm([getattr(p, n) for p in parts])) for n in ("norm", "removed"))
    left = float(np.linalg.norm([p.leak * p.removed for p in parts]))
    leak = left / removed if removed else 0.0
    return EditRecord(writer.tensor, writer.role, writer.layer, norm, removed, leak, digest.hexdigest())


def _gain(checkpoint: Checkpoint, writer: ResidualWriter) -> Float32Array | None:
    """The gain `[d_model]` between a writer and the stream."""
    if writer.gain is None:
        return None
    tensor: TensorInfo = checkpoint.tensors[writer.gain]
    fd = os.open(checkpoint.path / tensor.file, os.O_RDONLY)
    try:
        return read_rows(fd, tensor, 0, tensor.shape[0])[:, 0] + np.float32(writer.gain_offset)
    finally:
        os.close(fd)
