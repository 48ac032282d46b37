"""The layout of a copy of a GGUF file with keys added and tensors in other types, and the way back to its header.

Owns the header of the new file. Never changes a byte of what is copied, and never knows what the tensors hold.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from abliterate.checkpoint.gguf_file import MAGIC, NUMBERS, STRING, GgufFile, aligned, stored_bytes
from abliterate.checkpoint.layout import Layout, Piece, joined
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import UnsupportedError

Added = Mapping[str, str | int | float | bool]
#: A header in pieces: bytes of its own, and ranges `[start, stop)` of the header of a copy.
Head = list[bytes | tuple[int, int]]
#: Magic, version, and how many tensors and keys there are.
_OPENING = struct.Struct("<4sIQQ")


def lay_out_copy(
    source: GgufFile,
    name: str,
    added: Added,
    types: Mapping[str, str] | None = None,
    left: Collection[str] = (),
) -> Layout:
    """A copy called `name` with the keys `added`, in place of those of these names.

    All other metadata are copied byte by byte, and so are the tensors, but for those in `left` and those that `types`
    gives another type: they are noughts, to be filled at the places of the table.

    Raises:
        UnsupportedError: a tensor's rows are no whole number of blocks of the type it is to have.
    """
    head, spans = _keys(source, added)
    retyped = {n: _retyped(source, t, (types or {}).get(n, t.dtype)) for n, t in source.tensors.items()}
    table_at = _OPENING.size + sum(stop - start for start, stop in spans) + len(head)
    table, offset = bytearray(), 0
    for tensor in retyped.values():
        table += _entry(tensor, offset)
        offset = aligned(offset + tensor.nbytes, source.alignment)
    data, offset = aligned(table_at + len(table), source.alignment), 0
    found: dict[str, TensorInfo] = {}
    for key, tensor in retyped.items():
        found[key] = replace(tensor, file=name, offset=data + offset)
        offset = aligned(offset + tensor.nbytes, source.alignment)
    n_keys = len(source.metadata) - len(source.metadata.keys() & added.keys()) + len(added)
    pieces, to = list[Piece](), _OPENING.size
    for start, stop in spans:
        pieces.append((start, stop, to))
        to += stop - start
    pieces += data_pieces(source, found, left)
    size = max([data + offset, *(to + stop - start for start, stop, to in pieces)])
    opening = _OPENING.pack(MAGIC, source.version, len(found), n_keys)
    return Layout(size, ((0, opening), (table_at - len(head), head + bytes(table))), tuple(joined(pieces)), found)


def head_from(source: GgufFile, copy: GgufFile) -> Head:
    """The header of `source`, all up to its tensors, out of that of a `copy` with keys added."""
    pieces, at, whole = Head(), 0, min(source.data, source.size)
    with source.path.open("rb") as old, copy.path.open("rb") as new:

        def own(start: int, stop: int) -> bytes:
            old.seek(start)
            return old.read(stop - start)

        for key, (start, stop) in source.spans.items():
            first, last = copy.spans.get(key, (0, 0))
            new.seek(first)
            if last - first == stop - start and new.read(last - first) == own(start, stop):
                pieces += [own(at, start), (first, last)]
                at = stop
        pieces.append(own(at, whole))
    return _together(pieces)


def _together(pieces: Head) -> Head:
    """Ranges that follow one another as one, without empty pieces."""
    found = Head()
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, tuple) and isinstance(last, tuple) and last[1] == piece[0]:
            found[-1] = last[0], piece[1]
        elif piece:
            found.append(piece)
    return found


def data_pieces(source: GgufFile, found: Mapping[str, TensorInfo], left: Collection[str]) -> Iterator[Piece]:
    """What of a file's data is copied to where its tensors are `found`: those not in `left`, and what pads all.

    A tensor in another type is not, nor what pads it.
    """
    for name, (old, end) in padded(source).items():
        new = found[name]
        if new.dtype == old.dtype:
            start = old.offset + old.nbytes if name in left else old.offset
            yield start, end, new.offset + start - old.offset


def padded(source: GgufFile) -> dict[str, tuple[TensorInfo, int]]:
    """Each tensor, and where what pads it ends."""
    ends = [*[t.offset for t in source.tensors.values()][1:], source.size]
    return {name: (t, end) for (name, t), end in zip(source.tensors.items(), ends, strict=False)}  # maybe no tensors


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
