"""The base back, bit for bit, from an edited checkpoint and what its edit left beside it.

Owns the note that names files and hashes, and the order of restoring. Never reads the base.
"""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64decode, b64encode
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from abliterate.checkpoint.codecs import Float32Array
from abliterate.checkpoint.folder import read_json
from abliterate.checkpoint.gguf_copy import data_pieces, head_from
from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.checkpoint.layout import Layout, in_place, joined
from abliterate.checkpoint.matrix import Matrix
from abliterate.checkpoint.naming import RECORDS, RENAMED, records_of
from abliterate.checkpoint.storage import matrices
from abliterate.checkpoint.stream import copy_file, sync, tensor_sha256
from abliterate.edit.files import BASE
from abliterate.edit.retype import kept_whole, restore_whole
from abliterate.edit.shard import Workers
from abliterate.edit.sidecar import read_records, restore
from abliterate.edit.untie import BASE_FILES
from abliterate.errors import CheckpointError, VerifyError
from abliterate.model.progress import Progress, silent

#: In the folder of records: the note, and the folder of the sidecars, one for each file of weights.
NOTE, SIDECARS = "undo.json", "undo"
SCHEMA = 3


def place_of(name: str, records: str) -> str:
    """Where a side file of the base goes: records of an earlier edit make room in `records` for those of this one."""
    return f"{records}/base/{name.removeprefix(RECORDS + '/')}" if name.startswith(f"{RECORDS}/") else name


def base_name(checkpoint: Checkpoint, name: str) -> str:
    """A side file's name in a note: records are called the same there beside a GGUF and in a folder."""
    own = f"{checkpoint.records}/"
    return f"{RECORDS}/{name.removeprefix(own)}" if name.startswith(own) else name


@dataclass(frozen=True)
class Header:
    """How the header of a GGUF of the base comes out of that of the edited one.

    `pieces` follow one another: bytes in base64, or ranges `[start, stop)` of the edited file. `size` is the base's.
    """

    size: int
    pieces: list[str | list[int]]

    @classmethod
    def of(cls, base: Path, edited: Path) -> Header:
        """That of a base and what was written of it."""
        source = read_gguf(base)
        pieces = head_from(source, read_gguf(edited))
        return cls(source.size, [b64encode(p).decode() if isinstance(p, bytes) else list(p) for p in pieces])

    def layout(self, edited: Path, kept: Path | None) -> Layout:
        """The base's file with its header alone; `kept` holds tensors that have another type in the edited one.

        Raises:
            ValueError: the header is none that this file can have had.
        """
        found, own, copied, at = read_gguf(edited), [], [], 0
        for piece in self.pieces:
            if isinstance(piece, str):
                own.append((at, b64decode(piece, validate=True)))
                at += len(own[-1][1])
                continue
            start, stop = piece
            if not 0 <= start < stop <= found.data:
                raise ValueError(f"{start} to {stop} are no bytes of a header")
            copied.append((start, stop, at))
            at += stop - start
        most = at + found.size - found.data + (kept.stat().st_size if kept is not None else 0)
        if not at <= self.size <= most:
            raise ValueError(f"a base of {self.size:,} bytes, which cannot be")
        return Layout(self.size, tuple(own), tuple(copied), {})


@dataclass(frozen=True)
class RestoredFile:
    """One file of weights: its name in the base and in the edited checkpoint, its sidecar, its edited tensors.

    `tensors` holds name, residual axis and the hash that the base's bytes have; `sidecar` is None where none is edited.
    Of a GGUF there is the way back of its `header` too.
    """

    file: str
    stored_as: str
    sidecar: str | None
    tensors: list[tuple[str, int, str]]
    header: Header | None = None


@dataclass(frozen=True)
class WayBack:
    """What it takes to restore the base: its fingerprint, its files of weights, the hashes of its side files."""

    base: str
    files: list[RestoredFile]
    side_files: dict[str, str]

    def save(self, records: Path) -> None:
        """Write the note into the folder of records of an edited checkpoint."""
        value = asdict(self)
        text = json.dumps({"schema": SCHEMA, "sha256": note_sha256(value), **value}, indent=1)
        records.mkdir(exist_ok=True)
        (records / NOTE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> WayBack:
        """Read what `save` wrote, and check that it is about this checkpoint and leads to no file elsewhere.

        Raises:
            CheckpointError: there is none, or one that is damaged.
        """
        path = checkpoint.path / checkpoint.records / NOTE
        if f"{checkpoint.records}/{NOTE}" not in checkpoint.side_files:
            gguf = checkpoint.format == "gguf"
            renamed = f"; {RENAMED}" if gguf else ""
            raise CheckpointError(
                f"{checkpoint.source}: {'there is' if gguf else 'holds'} no {checkpoint.records}/{NOTE}"
                f"{' beside it' if gguf else ''}; only edits made with it (not --no-undo) can be taken back{renamed}"
            )
        try:
            value = read_json(path)
            if value.pop("schema") != SCHEMA:
                raise ValueError("another schema; use the version that wrote it")
            if value.pop("sha256") != note_sha256(value):
                raise ValueError("not as it was written; its hash is another")
            _require_of(checkpoint, value["base"], len(value["files"]))
            files = [_restored_file(checkpoint, i, **f) for i, f in enumerate(value["files"])]
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


def _require_of(checkpoint: Checkpoint, base: object, files: int) -> None:
    """Check that a note is of this GGUF, which names its base as the note does.

    Raises:
        ValueError: it is of another file.
    """
    if checkpoint.format == "gguf":
        stated = read_gguf(checkpoint.source).metadata.get(BASE)
        if stated != base or files != len(checkpoint.shards):
            raise ValueError(f"it is of another file than {checkpoint.source.name}, whose {BASE} is {stated!r:.80}")


def _restored_file(
    checkpoint: Checkpoint,
    i: int,
    file: str,
    stored_as: str,
    sidecar: str | None,
    tensors: list[list[Any]],
    header: dict[str, Any] | None = None,
) -> RestoredFile:
    """The `i`-th file as the note describes it; a GGUF may have another name by now.

    Raises:
        ValueError: the checkpoint has no such file, sidecar or tensor.
    """
    if checkpoint.format == "gguf":
        stored_as = checkpoint.shards[i]
    if stored_as not in checkpoint.shards or (header is None) == (checkpoint.format == "gguf"):
        raise ValueError(f"{stored_as!r} is no file of this checkpoint, or has no header")
    if tensors and f"{checkpoint.records}/{sidecar}" not in checkpoint.side_files:
        raise ValueError(f"its {sidecar!r} is missing")
    for name, axis, _ in tensors:
        tensor = checkpoint.tensors.get(name)
        if tensor is None or tensor.file != stored_as or type(axis) is not int or axis not in range(len(tensor.shape)):
            raise ValueError(f"{name!r} with axis {axis!r} is not a tensor of {stored_as}")
    known = Header(int(header["size"]), list(header["pieces"])) if header is not None else None
    edited = [(name, axis, h) for name, axis, h in tensors]
    return RestoredFile(file, stored_as, sidecar if tensors else None, edited, known)


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
    checkpoint: Checkpoint,
    way_back: WayBack,
    out: Path,
    progress: Progress = silent,
    threads: int = 2,
    names: tuple[str, ...] = (),
) -> None:
    """Write the base of an edited `checkpoint` into the existing folder `out`, every hash of it checked.

    Its files of weights are called `names`, if not as the base's were.

    Raises:
        CheckpointError: the way back is damaged.
        VerifyError: what comes out is not the base: the edited weights were changed since.
        ResourceError: the disk is full.
    """
    names = names or tuple(file.file for file in way_back.files)
    for name, sha256 in way_back.side_files.items():
        _restore_side_file(checkpoint, out, records_of(names[0] if names else ""), name, sha256)
    with Workers.start(threads) as workers:
        jobs: list[Future[None]] = [
            workers.compute.submit(_restore_weights, checkpoint, file, out / name, progress)
            for file, name in zip(way_back.files, names, strict=True)
        ]
        for job in jobs:
            job.result()
    sync(out)
    if open_checkpoint(out / names[0] if checkpoint.format == "gguf" else out).fingerprint != way_back.base:
        raise VerifyError(
            f"{checkpoint.source}: what comes out is not the base that was edited; files of it were changed since"
        )


def _restore_side_file(checkpoint: Checkpoint, out: Path, records: str, name: str, sha256: str) -> None:
    """A file that is not weights, to folder `out` or its `records`: as the edit set it aside, or as it still is."""
    places = (f"{BASE_FILES}/{name}", place_of(name, checkpoint.records))
    source = next((p for p in places if p in checkpoint.side_files), None)
    if source is None or file_sha256(checkpoint.path / source) != sha256:
        raise VerifyError(
            f"{checkpoint.path / name}: not as it was when the edit was made; the base cannot be restored from it"
        )
    inside = name.removeprefix(f"{RECORDS}/")
    copy_file(checkpoint.path / source, out / (name if inside == name else f"{records}/{inside}"))


def _restore_weights(checkpoint: Checkpoint, file: RestoredFile, target: Path, progress: Progress) -> None:
    base = _restore_unedited(checkpoint, file, target)
    old, new = os.open(checkpoint.path / file.stored_as, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        if file.sidecar is not None:
            pieces = []
            for name, axis, _ in file.tensors:
                tensor = checkpoint.tensors[name]
                shift = base[name].offset - tensor.offset
                pieces.append([replace(m, shift=shift) for m in matrices(checkpoint, tensor, axis)])
            _restore_rows(checkpoint.path / checkpoint.records / file.sidecar, pieces, old, new)
        for name, _, sha256 in file.tensors:
            if tensor_sha256(new, base[name]) != sha256:
                raise VerifyError(
                    f"{file.stored_as}: '{name}' cannot be restored: it was changed since the edit, or "
                    f"{checkpoint.records}/{file.sidecar} was"
                )
            progress(1)
        os.fsync(new)
    finally:
        os.close(old)
        os.close(new)


def _restore_unedited(checkpoint: Checkpoint, file: RestoredFile, target: Path) -> dict[str, TensorInfo]:
    """Write a file of the base without what moved in its edited tensors; where its tensors lie.

    Raises:
        CheckpointError: the way back is damaged.
    """
    source, names = checkpoint.path / file.stored_as, {name for name, *_ in file.tensors}
    of_file = {name: t for name, t in checkpoint.tensors.items() if t.file == file.stored_as}
    if file.header is None:
        in_place(of_file, names, source.stat().st_size).write(source, target)
        return of_file
    kept = kept_whole(checkpoint.path / checkpoint.records / file.sidecar) if file.sidecar is not None else None
    kept = kept if kept is not None and kept.is_file() else None
    try:
        file.header.layout(source, kept).write(source, target)
        base = read_gguf(target).tensors
        if {n: t.shape for n, t in base.items()} != {n: t.shape for n, t in of_file.items()}:
            raise ValueError("the base's header is of other tensors")
    except (ValueError, TypeError, CheckpointError) as error:
        raise CheckpointError(f"{checkpoint.path / checkpoint.records / NOTE}: damaged: {error}") from None
    retyped = {name for name, tensor in base.items() if tensor.dtype != of_file[name].dtype}
    if retyped - names or (retyped and kept is None):
        raise CheckpointError(f"{source}: the bytes of '{min(retyped)}' of the base are not beside it")
    pieces = joined(data_pieces(read_gguf(source), base, names))
    Layout(file.header.size, (), tuple(pieces), base).copy(source, target)
    if retyped and kept is not None:
        restore_whole(kept, target, retyped)
    return base


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
