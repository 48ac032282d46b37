"""Write a complete edited checkpoint, file by file.

Owns the order of writing and the way back; nothing here renames the folder into place (the caller owns that), so an
interrupted edit is never loadable as a result.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.codecs import Float32Array
from abliterate.checkpoint.layout import Layout
from abliterate.checkpoint.naming import records_of
from abliterate.checkpoint.storage import whole
from abliterate.checkpoint.stream import copy_file, forget, sync
from abliterate.edit.files import layouts, provenance
from abliterate.edit.plan import EditPlan
from abliterate.edit.projection import Removal, orthonormal
from abliterate.edit.shard import EditRecord, PlannedTensor, ShardEdit, Workers
from abliterate.edit.undo import SIDECARS, Header, RestoredFile, WayBack, base_name, file_sha256, place_of
from abliterate.edit.untie import moved, untie
from abliterate.edit.writers import ResidualWriter
from abliterate.errors import VerifyError
from abliterate.model.progress import Progress, silent

#: Threads at most; each holds a few blocks of numbers.
THREADS = min(4, os.cpu_count() or 1)


class Journal(Protocol):
    """Remembers which files are finished, so that an edit can go on after it was killed."""

    def done(self, step: str) -> bool:
        """Whether a step's result is kept."""
        ...

    def read(self, step: str) -> Any:
        """A step's result as plain values."""
        ...

    def write(self, step: str, value: Any) -> None:
        """Keep a step's result; it survives the process."""
        ...


class Forgetful:
    """A journal for edits that need not go on."""

    def __init__(self) -> None:
        self._results: dict[str, Any] = {}

    def done(self, step: str) -> bool:
        """Whether a step's result is kept."""
        return step in self._results

    def read(self, step: str) -> Any:
        """A step's result."""
        return self._results[step]

    def write(self, step: str, value: Any) -> None:
        """Keep a step's result."""
        self._results[step] = value


def apply_edit(
    checkpoint: Checkpoint,
    plan: EditPlan,
    directions: Float32Array,
    out: Path,
    strength: float = 1.0,
    progress: Progress = silent,
    *,
    keep_norms: bool = False,
    offset: float = 0.0,
    undo: bool = False,
    journal: Journal | None = None,
    names: tuple[str, ...] = (),
) -> list[EditRecord]:
    """Write the edited checkpoint into folder `out`; one record for each edited tensor, in file order.

    Shards keep their order and headers; every byte outside the planned tensors equals the source, but for the few keys
    that a GGUF's header gets, and where its tensors lie. Arithmetic is float32 with one cast back, whose remainder is
    carried along the directions. A few blocks of rows are held for each thread.

    Args:
        checkpoint: what to edit; never written to.
        plan: which tensors.
        directions: `[d_model]` or `[k, d_model]`, whose span is removed, or `[n_layers, k, d_model]` of each layer.
        out: an existing folder.
        strength: 1 removes, 2 reflects, below 0 adds; times each writer's own.
        progress: called with the number of tensors done.
        keep_norms: scale what each input writes back to the norm it had.
        offset: what the token embedding keeps along the direction instead of nothing.
        undo: keep what `undo` needs to restore the base bit for bit.
        journal: files that it says are finished are not written again.
        names: what the files of weights are called in `out`, if not as in the checkpoint.

    Raises:
        VerifyError: a tensor to edit holds NaN or infinity, the directions do not fit, or a source file changed.
        ResourceError: the disk is full.
    """
    check_fits(checkpoint, plan, directions)
    kept: Journal = journal or Forgetful()
    names = names or checkpoint.shards
    records = out / records_of(names[0])
    files = layouts(checkpoint, plan, names, provenance(checkpoint, plan, directions, strength))
    by_shard: dict[str, list[PlannedTensor]] = defaultdict(list)
    for writer in plan.writers:
        removal = removal_of(checkpoint, writer, directions, strength, keep_norms, offset)
        shard = checkpoint.tensors[writer.tensor].file
        stored = files[checkpoint.shards.index(shard)].tensors[writer.tensor]
        by_shard[shard].append(PlannedTensor(checkpoint, writer, removal, stored))
    for name in checkpoint.side_files:
        copy_file(checkpoint.path / name, out / place_of(base_name(checkpoint, name), records.name))
    targets = [out / name for name in names]
    results = _write_files(checkpoint, by_shard, files, targets, kept, records if undo else None, progress)
    if undo:
        _way_back(checkpoint, plan, results, out, names).save(records)
    if plan.untied is not None:
        untie(checkpoint, plan.untied, out)
    sync(out)
    return [EditRecord(**record) for result in results.values() for record in result["records"]]


def _write_files(
    checkpoint: Checkpoint,
    by_shard: dict[str, list[PlannedTensor]],
    files: list[Layout],
    targets: list[Path],
    kept: Journal,
    records: Path | None,
    progress: Progress,
) -> dict[str, Any]:
    """Every file of weights that is not finished yet; of each the records of its tensors and their hashes before.

    What leads back goes into the folder `records`, if there is to be any.
    """
    steps = {shard: f"edit {i}" for i, shard in enumerate(checkpoint.shards)}
    with Workers.start(THREADS) as workers, ExitStack() as begun:
        waiting: deque[tuple[str, Path, ShardEdit]] = deque()
        synced: list[Future[None]] = []

        def finish(step: str, target: Path, edit: ShardEdit) -> None:
            done, before = edit.finish(progress)
            edit.close()
            result = {"records": [asdict(r) for r in done], "before": before}
            synced.append(workers.after.submit(_keep, target, kept.write, step, result))

        for i, (shard, step) in enumerate(steps.items()):
            if kept.done(step):
                progress(len(by_shard[shard]))
                continue
            way_back = records / SIDECARS / f"{i:05d}.undo" if records is not None else None
            edit = ShardEdit(checkpoint.path / shard, targets[i], by_shard[shard], workers, way_back, files[i])
            waiting.append((step, targets[i], begun.enter_context(closing(edit))))
            if len(waiting) > 1:  # so that the workers always have jobs
                finish(*waiting.popleft())
        while waiting:
            finish(*waiting.popleft())
        for future in synced:
            future.result()
    return {shard: kept.read(step) for shard, step in steps.items()}


def removal_of(
    checkpoint: Checkpoint,
    writer: ResidualWriter,
    directions: Float32Array,
    strength: float,
    keep_norms: bool = False,
    offset: float = 0.0,
) -> Removal:
    """What to take out of one writer: `strength` times its own, the norm between it and the stream considered.

    Of directions `[n_layers, k, d_model]` those of its layer, or of layer 0 outside the blocks. The token embedding
    alone keeps `offset`: what every row of it has, every token of the stream has, as no other writer changes it.
    """
    own = directions[writer.layer or 0] if directions.ndim == 3 else directions
    basis = orthonormal(own, gain_of(checkpoint, writer), writer.centred)
    return Removal(basis, strength * writer.strength, keep_norms, offset if writer.module == "embed" else 0.0)


def _keep(target: Path, write: Callable[[str, Any], None], step: str, result: dict[str, Any]) -> None:
    """A file is finished when its data is on disk; memory need not hold it any more."""
    sync(target)
    with target.open("rb") as file:
        forget(file.fileno())
    write(step, result)


def _way_back(
    checkpoint: Checkpoint, plan: EditPlan, results: dict[str, Any], out: Path, names: tuple[str, ...]
) -> WayBack:
    axes = {w.tensor: w.axis for w in plan.writers}
    files = [
        RestoredFile(
            shard,
            moved(checkpoint).get(name, name) if plan.untied else name,
            f"{SIDECARS}/{i:05d}.undo" if result["before"] else None,
            [(tensor, axes[tensor], sha256) for tensor, sha256 in result["before"].items()],
            Header.of(checkpoint.path / shard, out / name) if checkpoint.format == "gguf" else None,
        )
        for i, ((shard, result), name) in enumerate(zip(results.items(), names, strict=True))
    ]
    side_files = {base_name(checkpoint, n): file_sha256(checkpoint.path / n) for n in checkpoint.side_files}
    return WayBack(checkpoint.fingerprint, files, side_files)


def check_fits(checkpoint: Checkpoint, plan: EditPlan, directions: Float32Array) -> None:
    """Check that the plan is of this checkpoint, and the directions of its width and number of layers.

    Raises:
        VerifyError: they are not.
    """
    if plan.source != checkpoint.fingerprint:
        raise VerifyError(f"{checkpoint.path}: changed since the edit was planned; plan again")
    if directions.ndim == 3 and len(directions) != checkpoint.n_layers:
        raise VerifyError(
            f"{checkpoint.path}: has {checkpoint.n_layers} layers, and there are directions of {len(directions)}: they "
            "are of another model"
        )
    for writer in plan.writers:
        width, d_model = checkpoint.tensors[writer.tensor].shape[writer.axis], directions.shape[-1]
        if width != d_model:
            raise VerifyError(
                f"the direction has d_model {d_model}, tensor '{writer.tensor}' has {width}; "
                "the direction is of another model"
            )


def gain_of(checkpoint: Checkpoint, writer: ResidualWriter) -> Float32Array | None:
    """The gain `[d_model]` between a writer and the stream."""
    if writer.gain is None:
        return None
    tensor = checkpoint.tensors[writer.gain]
    matrix = whole(tensor)
    width = checkpoint.tensors[writer.tensor].shape[writer.axis]
    if matrix is None or tensor.shape != (width,):
        raise VerifyError(
            f"{tensor.file}: the gain '{tensor.name}' is stored as {tensor.dtype} of shape {list(tensor.shape)}; "
            f"expected {width} numbers"
        )
    fd = os.open(checkpoint.path / tensor.file, os.O_RDONLY)
    try:
        gain: Float32Array = matrix.values(fd, np.arange(matrix.rows))[:, 0].astype(np.float32)
        gain += np.float32(writer.gain_offset)
    finally:
        os.close(fd)
    if not np.isfinite(gain).all() or not gain.any():
        raise VerifyError(
            f"{tensor.file}: the gain '{tensor.name}' holds NaN or infinity, or only noughts; the checkpoint is damaged"
        )
    return gain
