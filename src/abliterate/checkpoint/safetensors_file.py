"""Read and check the header of one safetensors file.

Owns the file format: a length, a JSON table of tensors, one buffer that the tensors tile exactly.
Never reads tensor data, and never knows about models or folders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from abliterate.checkpoint.codecs import BITS
from abliterate.errors import CheckpointError

#: The format's own bound on the JSON header, in bytes.
MAX_HEADER = 100_000_000
#: What no size may exceed: readers hold them in 64 bits.
_MOST_ELEMENTS = 1 << 63
#: Characters of a name; the longest known has a tenth of them.
_LONGEST_NAME = 1000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `offset` is absolute in `file` (a name within the checkpoint folder)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def _fail(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}; the file is damaged or not safetensors: download or convert it again")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file in file order, checked to tile its buffer without gap or overlap.

    Raises:
        CheckpointError: the file is truncated, overlapping, over-long or not safetensors.
    """
    size = path.stat().st_size
    table, start = _read_table(path, size)
    tensors = [_tensor(path, name, entry, start) for name, entry in table.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            word = "overlaps its neighbour" if tensor.offset < end else "leaves a hole before it"
            _fail(path, f"tensor '{tensor.name}' at byte {tensor.offset} {word} (expected byte {end})")
        end += tensor.nbytes
    if end != size:
        word = "truncated" if size < end else "followed by stray bytes"
        _fail(path, f"{word}: the header describes {end:,} bytes, the file has {size:,}")
    return {tensor.name: tensor for tensor in tensors}


def _read_table(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The parsed JSON header and the absolute offset of the buffer behind it."""
    if size < 8:
        _fail(path, f"only {size} bytes, too short for a header")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            _fail(path, f"header length {length:,} exceeds the format's {MAX_HEADER:,} bytes")
        if 8 + length > size:
            _fail(path, f"truncated: header of {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        _fail(path, f"header is not valid JSON ({error})")
    if not isinstance(table, dict):
        _fail(path, "header is not a JSON object")
    return table, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    for name in table:
        name.encode("utf-8")  # half a surrogate pair, written as an escape, is no text
    return table


def _short(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _elements(shape: list[int]) -> int | None:
    """The product of a shape, or None as soon as it is beyond what readers can hold; zeros do not save it."""
    total = 1
    for size in shape:
        total *= size
        if max(total, size) >= _MOST_ELEMENTS:
            return None
    return total


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One checked header entry."""
    if len(name) > _LONGEST_NAME:
        _fail(path, f"tensor '{name[:60]}…' has a name of {len(name):,} characters")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        _fail(path, f"tensor '{name}' lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _fail(path, f"tensor '{name}' has unknown dtype {_short(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        _fail(path, f"tensor '{name}' has shape {_short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _fail(path, f"tensor '{name}' has data_offsets {_short(offsets)}")
    begin, end = offsets
    elements = _elements(shape)
    if elements is None:
        _fail(path, f"tensor '{name}' has a shape of {len(shape)} axes with more elements than 64 bits count")
    if (end - begin) * 8 != elements * BITS[dtype]:
        _fail(path, f"tensor '{name}' spans {end - begin:,} bytes, its shape {_short(shape)} of {dtype} does not")
    return TensorInfo(name, dtype, tuple(shape), path.name, start + begin, end - begin)
