"""Tensors of a GGUF that get another type, as their own cannot be edited: which, how, and what leads back.

Owns the choice of types and the bytes that are kept of the base. Never projects anything.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from abliterate.checkpoint import Checkpoint, TensorInfo, ggml
from abliterate.checkpoint.ggml_blocks import LAYOUTS
from abliterate.checkpoint.gguf_copy import padded
from abliterate.checkpoint.gguf_file import NUMBERS, TYPES, read_gguf, stored_bytes
from abliterate.checkpoint.layout import Layout
from abliterate.checkpoint.matrix import Matrix
from abliterate.checkpoint.storage import IN_PIECES, PANEL, slices
from abliterate.checkpoint.stream import copy_range, sync
from abliterate.errors import CheckpointError, UnsupportedError, UsageError

#: What a tensor can be written in: floats, and the types that lose a direction by moves of their codes.
TARGETS = ("F32", "F16", "BF16", *LAYOUTS)
#: A number of columns that falls into blocks of every type.
_BLOCK = 256


def retyped(checkpoint: Checkpoint, names: Iterable[str], wanted: str) -> dict[str, str]:
    """The type `wanted` for those of the tensors whose own cannot be edited.

    Raises:
        UsageError: it is no such type, or the checkpoint is no GGUF.
        UnsupportedError: it is not larger than a tensor's own, or does not fit its rows, or llama.cpp is not installed.
    """
    dtype = next((name for name in TARGETS if name.lower() == wanted.lower()), None)
    if dtype is None:
        raise UsageError(f"--requantize {wanted[:40]}: expected one of {', '.join(TARGETS)}")
    if checkpoint.format != "gguf":
        raise UsageError(f"--requantize {wanted}: types of single tensors are a GGUF's; leave it out")
    found = {}
    for name in names:
        tensor = checkpoint.tensors[name]
        if tensor.dtype in IN_PIECES:
            continue
        _, size, nbytes = TYPES[NUMBERS[tensor.dtype]]
        as_wanted = stored_bytes(dtype, tensor.shape)
        if as_wanted is None or as_wanted < tensor.nbytes:
            why = "does not fall into its blocks" if as_wanted is None else f"is larger as {tensor.dtype} already"
            raise UnsupportedError(
                f"{checkpoint.source}: tensor '{name}' of shape {list(tensor.shape)} {why}; choose another type than "
                f"--requantize {dtype}: Q8_0, say"
            )
        ggml.decode(np.zeros((1, nbytes), np.uint8), tensor.dtype, size)  # raises where it cannot be reached
        found[name] = dtype
    return found


def larger(checkpoint: Checkpoint, types: Mapping[str, str]) -> int:
    """Bytes that a result takes beyond those of the checkpoint: larger types, and what is kept for the way back."""
    return sum(stored_bytes(dtype, checkpoint.tensors[name].shape) or 0 for name, dtype in types.items())


def reencode(old: TensorInfo, new: TensorInfo, source: int, target: int) -> None:
    """Write a tensor's numbers, from file to file, in the type of `new`."""
    for before, after in zip(slices(old), slices(new), strict=True):
        for rows in before.blocks():
            after.write(target, rows, after.codec.round(before.values(source, rows), rows))


def panels(old: TensorInfo, new: TensorInfo, by_rows: bool) -> Iterator[tuple[Matrix, Matrix]]:
    """A tensor in both types, in pieces that need nothing of one another: panels of columns, or (`by_rows`) whole."""
    for before, after in zip(slices(old), slices(new), strict=True):
        width = before.columns if by_rows else _BLOCK * max(1, PANEL // (_BLOCK * before.rows))
        for first in range(0, before.columns, width):
            wide = min(width, before.columns - first)
            yield _columns(before, first, wide), _columns(after, first, wide)


def _columns(matrix: Matrix, first: int, columns: int) -> Matrix:
    at = matrix.offset + matrix.codec.row_bytes(first)
    return replace(matrix, offset=at, columns=columns, stride=matrix.row_bytes)


def kept_whole(way_back: Path) -> Path:
    """Where the bytes of retyped tensors are kept, beside the sidecar of their file."""
    return way_back.with_suffix(".whole")


def keep_whole(source: Path, target: Path, names: Collection[str]) -> None:
    """Keep the bytes of the tensors of these names, and what pads them, one behind the other.

    Raises:
        ResourceError: the disk is full.
        VerifyError: the source changed meanwhile.
    """
    pieces, at = [], 0
    for tensor, end in (p for name, p in padded(read_gguf(source)).items() if name in names):
        pieces.append((tensor.offset, end, at))
        at += end - tensor.offset
    Layout(at, (), tuple(pieces), {}).write(source, target)
    sync(target)


def restore_whole(kept: Path, target: Path, names: Collection[str]) -> None:
    """Put the bytes that `keep_whole` kept to where the tensors lie in `target`.

    Raises:
        CheckpointError: they are not so many.
    """
    places = [p for name, p in padded(read_gguf(target)).items() if name in names]
    if sum(end - tensor.offset for tensor, end in places) != kept.stat().st_size:
        raise CheckpointError(f"{kept}: the way back is damaged: it has another size than the tensors it is of")
    at, old, new = 0, os.open(kept, os.O_RDONLY), os.open(target, os.O_RDWR)
    try:
        for tensor, end in places:
            copy_range(old, new, at, at + end - tensor.offset, kept.name, tensor.offset)
            at += end - tensor.offset
    finally:
        os.close(old)
        os.close(new)
