"""Copy a GGUF file with keys added and tensors in other types, a few megabytes in memory at a time.

Owns the layout of the new file. Never changes a byte of what it copies, and never knows what the tensors hold.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from abliterate.checkpoint.gguf_file import MAGIC, NUMBERS, STRING, GgufFile, aligned, stored_bytes
from abliterate.checkpoint.matrix import write_all
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.checkpoint.stream import copy_range, create
from abliterate.errors import UnsupportedError

Added = Mapping[str, str | int | float | bool]
#: Magic, version, and how many tensors and keys there are.
_OPENING = struct.Struct("<4sIQQ")


def copy_gguf(
    source: GgufFile,
    target: Path,
    added: Added,
    types: Mapping[str, str] | None = None,
    left: Collection[str] = (),
) -> dict[str, TensorInfo]:
    """Write a copy of a file with the keys `added`, in place of those of these names; its table of tensors.

    All other metadata are copied byte by byte, and so are the tensors, but for those in `left` and those that `types`
    gives another type: they are zeros, to be filled at the places of the table.

    Raises:
        UnsupportedError: a tensor's rows are no whole number of blocks of the type it is to have.
        ResourceError: the disk is full.
        VerifyError: the source ends before its tensors.
    """
    head, spans = _keys(source, added)
    retyped = {n: _retyped(source, t, (types or {}).get(n, t.dtype)) for n, t in source.tensors.items()}
    table_at = _OPENING.size + sum(stop - start for start, stop in spans) + len(head)
    table, offset = bytearray(), 0
    for name, tensor in retyped.items():
        table += _entry(tensor, offset)
        retyped[name] = replace(tensor, file=target.name, offset=offset)
        offset = aligned(offset + tensor.nbytes, source.alignment)
    data = aligned(table_at + len(table), source.alignment)
    found = {name: replace(tensor, offset=data + tensor.offset) for name, tensor in retyped.items()}
    n_keys = len(source.metadata) - len(source.metadata.keys() & added.keys()) + len(added)
    pieces = list(_runs(_pieces(source, found, left)))
    create(target, max([data + offset, *(to + stop - start for start, stop, to in pieces)]))
    old, new = os.open(source.path, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        opening = _OPENING.pack(MAGIC, source.version, len(found), n_keys)
        write_all(new, memoryview(opening), 0, target.name)
        to = _OPENING.size
        for start, stop in spans:
            copy_range(old, new, start, stop, source.path.name, to)
            to += stop - start
        write_all(new, memoryview(head + table), to, target.name)
        for start, stop, to in pieces:
            copy_range(old, new, start, stop, source.path.name, to)
    finally:
        os.close(old)
        os.close(new)
    return found


def _keys(source: GgufFile, added: Added) -> tuple[bytes, list[tuple[int, int]]]:
    """The added keys as bytes, and the spans of those that stay."""
    head = b"".join(_text(key) + _value(value) for key, value in added.items())
    return head, [span for key, span in source.spans.items() if key not in added]


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: str | int | float | bool) -> bytes:
    """The number of a value's kind, and the value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    kind, code = (7, "<B") if isinstance(value, bool) else (11, "<q") if isinstance(value, int) else (12, "<d")
    return struct.pack("<I", kind) + struct.pack(code, value)


def _retyped(source: GgufFile, tensor: TensorInfo, dtype: str) -> TensorInfo:
    nbytes = stored_bytes(dtype, tensor.shape) if dtype in NUMBERS else None
    if nbytes is None:
        raise UnsupportedError(
            f"{source.path}: tensor '{tensor.name}' of shape {list(tensor.shape)} cannot be stored as {dtype}, of "
            "which a row must be a whole number of blocks; choose another type"
        )
    return replace(tensor, dtype=dtype, nbytes=nbytes)


def _entry(tensor: TensorInfo, offset: int) -> bytes:
    """A tensor's row in the table, `offset` from where the data begin."""
    axes = tensor.shape[::-1]
    numbers = struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, NUMBERS[tensor.dtype], offset)
    return _text(tensor.name) + numbers


def _pieces(source: GgufFile, found: Mapping[str, TensorInfo], left: Collection[str]) -> Iterator[tuple[int, int, int]]:
    """What is copied of the data: bytes `[start, stop)` of the source and the place they go to, what pads them too."""
    ends = [*[t.offset for t in source.tensors.values()][1:], source.size]
    for (name, old), end in zip(source.tensors.items(), ends, strict=False):  # a part may have no tensors
        new = found[name]
        if new.dtype != old.dtype:
            continue
        start = old.offset + old.nbytes if name in left else old.offset
        yield start, end, new.offset + start - old.offset


def _runs(pieces: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Pieces that follow one another on both sides as one."""
    run: tuple[int, int, int] | None = None
    for start, stop, to in pieces:
        if run is not None and run[1] == start and run[2] + run[1] - run[0] == to:
            run = run[0], stop, run[2]
            continue
        if run is not None:
            yield run
        run = start, stop, to
    if run is not None:
        yield run
