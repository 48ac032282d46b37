"""The base back, bit for bit, from an edited checkpoint and what its edit left beside it.

Owns the note that names files and hashes, and the order of restoring. Never reads the base.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abliterate.checkpoint import Checkpoint, open_checkpoint
from abliterate.checkpoint.codecs import Float32Array
from abliterate.checkpoint.folder import RECORDS, read_json
from abliterate.checkpoint.matrix import Matrix
from abliterate.checkpoint.storage import matrices
from abliterate.checkpoint.stream import copy_file, copy_range, create, gaps, sync, tensor_sha256
from abliterate.edit.shard import Workers
from abliterate.edit.sidecar import read_records, restore
from abliterate.edit.untie import BASE_FILES
from abliterate.errors import CheckpointError, VerifyError
from abliterate.model.progress import Progress, silent

#: In the folder of records: the note, and the folder of the sidecars, one for each file of weights.
NOTE, SIDECARS = "undo.json", "undo"
SCHEMA = 3
#: Where the records of an earlier edit make room for those of the last.
EARLIER = f"{RECORDS}/base"


def place_of(name: str) -> str:
    """Where a side file of the base goes: the records of an earlier edit make room for those of this one."""
    return f"{EARLIER}/{name.removeprefix(RECORDS + '/')}" if name.startswith(f"{RECORDS}/") else name


@dataclass(frozen=True)
class RestoredFile:
    """One file of weights: its name in the base and in the edited checkpoint, its sidecar, its edited tensors.

    `tensors` holds name, residual axis and the hash that the base's bytes have; `sidecar` is None where none is edited.
    """

    file: str
    stored_as: str
    sidecar: str | None
    tensors: list[tuple[str, int, str]]


@dataclass(frozen=True)
class WayBack:
    """What it takes to restore the base: its fingerprint, its files of weights, the hashes of its side files."""

    base: str
    files: list[RestoredFile]
    side_files: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write the note into the records of an edited checkpoint."""
        value = asdict(self)
        text = json.dumps({"schema": SCHEMA, "sha256": note_sha256(value), **value}, indent=1)
        (folder / RECORDS / NOTE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> WayBack:
        """Read what `save` wrote, and check that it is about this checkpoint and leads to no file elsewhere.

        Raises:
            CheckpointError: there is none, or one that is damaged.
        """
        path = checkpoint.path / RECORDS / NOTE
        if f"{RECORDS}/{NOTE}" not in checkpoint.side_files:
            raise CheckpointError(
                f"{checkpoint.path}: holds no {RECORDS}/{NOTE}; only edits made with it (not --no-undo) can be "
                "taken back"
            )
        try:
            value = read_json(path)
            if value.pop("schema") != SCHEMA:
                raise ValueError("another schema; use the version that wrote it")
            if value.pop("sha256") != note_sha256(value):
                raise ValueError("not as it was written; its hash is another")
            files = [_restored_file(checkpoint, **f) for f in value["files"]]
            found = cls(value["base"], files, dict(value["side_files"]))
            names = [*(f.file for f in files), *found.side_files]
            if odd := [n for n in names if not _is_inside(n) or names.count(n) > 1]:
                raise ValueError(f"{odd[0]!r} is no place for a file of the base")
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None


def note_sha256(value: dict[str, Any]) -> str:
    """Hash of what a note says, however it is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _restored_file(
    checkpoint: Checkpoint, file: str, stored_as: str, sidecar: str | None, tensors: list[list[Any]]
) -> RestoredFile:
    """A file as the note describes it.

    Raises:
        ValueError: the checkpoint has no such file, sidecar or tensor.
    """
    if stored_as not in checkpoint.shards or (tensors and f"{RECORDS}/{sidecar}" not in checkpoint.side_files):
        raise ValueError(f"{stored_as!r} and {sidecar!r} are not files of this checkpoint")
    for name, axis, _ in tensors:
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.file != stored_as or type(axis) is not int or axis not in range(len(tensor.shape)):
            raise ValueError(f"{name!r} with axis {axis!r} is not a tensor of {stored_as}")
    return RestoredFile(file, stored_as, sidecar if tensors else None, [(name, axis, h) for name, axis, h in tensors])


def _is_inside(name: object) -> bool:
    """Whether this is the name of a file below whatever folder it is joined to."""
    return isinstance(name, str) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def file_sha256(path: Path) -> str:
    """Hash of a file that is not weights."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def undo_edit(
    checkpoint: Checkpoint, way_back: WayBack, out: Path, progress: Progress = silent, threads: int = 2
) -> None:
    """Write the base of an edited `checkpoint` into the existing folder `out`, every hash of it checked.

    Raises:
        CheckpointError: the way back is damaged.
        VerifyError: what comes out is not the base: the edited weights were changed since.
        ResourceError: the disk is full.
    """
    for name, sha256 in way_back.side_files.items():
        _restore_side_file(checkpoint, out, name, sha256)
    with Workers.start(threads) as workers:
        jobs: list[Future[None]] = [
            workers.compute.submit(_restore_weights, checkpoint, file, out, progress) for file in way_back.files
        ]
        for job in jobs:
            job.result()
    sync(out)
    if open_checkpoint(out).fingerprint != way_back.base:
        raise VerifyError(
            f"{checkpoint.path}: what comes out is not the base that was edited; files of it were changed since"
        )


def _restore_side_file(checkpoint: Checkpoint, out: Path, name: str, sha256: str) -> None:
    """A file that is not weights: as the edit set it aside, or as it still is."""
    source = next((p for p in (f"{BASE_FILES}/{name}", place_of(name)) if p in checkpoint.side_files), None)
    if source is None or file_sha256(checkpoint.path / source) != sha256:
        raise VerifyError(
            f"{checkpoint.path / name}: not as it was when the edit was made; the base cannot be restored from it"
        )
    copy_file(checkpoint.path / source, out / name)


def _restore_weights(checkpoint: Checkpoint, file: RestoredFile, out: Path, progress: Progress) -> None:
    target = out / file.file
    create(target, (checkpoint.path / file.stored_as).stat().st_size)
    old, new = os.open(checkpoint.path / file.stored_as, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        tensors = [checkpoint.tensors[name] for name, *_ in file.tensors]
        for start, stop in gaps(((t.offset, t.offset + t.nbytes) for t in tensors), os.fstat(new).st_size):
            copy_range(old, new, start, stop, file.stored_as)
        if file.sidecar is not None:
            axes = [axis for _, axis, _ in file.tensors]
            pieces = [list(matrices(checkpoint, t, axis)) for t, axis in zip(tensors, axes, strict=True)]
            _restore_rows(checkpoint.path / RECORDS / file.sidecar, pieces, old, new)
        for tensor, (name, _, sha256) in zip(tensors, file.tensors, strict=True):
            if tensor_sha256(new, tensor) != sha256:
                raise VerifyError(f"{file.stored_as}: '{name}' was changed since the edit, and cannot be restored")
            progress(1)
        os.fsync(new)
    finally:
        os.close(old)
        os.close(new)


def _restore_rows(sidecar: Path, pieces: list[list[Matrix]], old: int, new: int) -> None:
    shared: dict[tuple[int, int], tuple[Float32Array, Float32Array | None]] = {}
    for record in read_records(sidecar, pieces):
        matrix, whose = pieces[record.tensor][record.piece], (record.tensor, record.piece)
        if not len(record.rows):
            shared[whose] = record.factor, record.scale
            continue
        try:
            before = restore(matrix, record, *shared[whose], matrix.read(old, record.rows))
        except (LookupError, ValueError) as error:
            raise CheckpointError(f"{sidecar}: the way back is damaged ({matrix.name}: {error})") from None
        matrix.write(new, record.rows, before)
