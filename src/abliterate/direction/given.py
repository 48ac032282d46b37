"""Directions that a person hands over: our own file, vectors in a `.npy`, or a control vector in a `.gguf`.

Owns which of them a file is, and how vectors of any length become a basis. Never knows models or weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from abliterate.checkpoint.naming import DIRECTIONS, is_gguf, records_at
from abliterate.direction.control_vector import read_control_vector
from abliterate.direction.direction import Direction
from abliterate.errors import CheckpointError, UsageError


def directions_at(path: Path) -> Path:
    """The file of directions that a path means: itself, or that among the records of a result, or beside its record."""
    if is_gguf(path.name) or path.is_dir():  # a GGUF may be a control vector, a folder that of the records
        return next((p for p in (records_at(path) / DIRECTIONS, path / DIRECTIONS) if p.is_file()), path)
    return path.with_name(DIRECTIONS) if path.name == "run.json" else path


def load_given(path: Path, layer: int | None = None) -> Direction:
    """What `Direction.save` wrote, the span of `[d_model]` or `[k, d_model]` in a `.npy`, or a control vector.

    A result, or its folder of records, stands for the directions that were taken out of it. Of directions that each
    layer has its own of, `layer` takes that of one layer for all.

    Raises:
        CheckpointError: no such file, or it holds no direction.
        UsageError: a layer is named, and the file has one direction for all, or none of that layer.
    """
    path = directions_at(path)
    if not path.is_file():
        what = "holds no directions" if path.is_dir() else "no such file"
        raise CheckpointError(
            f"{path}: {what}; expected what select or compare wrote, what run or edit made, a .npy, or a control "
            "vector in a .gguf"
        )
    if path.suffix == ".gguf":
        return _from_control_vector(path, layer)
    found = _from_npy(path) if path.suffix == ".npy" else Direction.load(path)
    if layer is None:
        return found
    if found.layers is None:
        raise UsageError(f"--layer {layer}: {path} holds what is taken out of all layers; leave --layer out")
    if not 0 <= layer < len(found.layers):
        raise UsageError(f"--layer {layer}: {path} has directions of layers 0 to {len(found.layers) - 1}")
    method = f"{found.method}, that of layer {layer} for all"
    return replace(found, vector=found.layers[layer], layers=None, layer=layer, method=method)


def _from_control_vector(path: Path, layer: int | None) -> Direction:
    """What llama.cpp adds behind layers as what is taken out of each; layer 0, behind which it adds none, as layer 1.

    `vector` is that of the layer with the longest one.

    Raises:
        UsageError: there is none of `layer`, or of some layers and not of others.
    """
    added = read_control_vector(path)
    last, method = max(added), f"given as control vector {path.name}"
    if layer is not None or len(added) == 1:
        at = last if layer is None else layer
        if at not in added:
            raise UsageError(f"--layer {at}: {path} has directions of layers {', '.join(map(str, sorted(added)))}")
        size = float(np.linalg.norm(added[at]))
        return Direction(added[at] / np.float32(size), None, None, size, f"{method}, that of layer {at} for all")
    if len(added) < last:
        missing = min(set(range(1, last)) - added.keys())
        raise UsageError(f"{path}: has no direction of layer {missing}, and one of layer {last}; take one with --layer")
    vectors = np.stack([added[max(1, i)] for i in range(last + 1)])
    sizes = np.linalg.norm(vectors, axis=1, keepdims=True)
    units, longest = vectors / sizes, int(sizes.argmax())
    return Direction(units[longest], None, None, float(sizes[longest, 0]), f"{method}, each layer's own", layers=units)


def _from_npy(path: Path) -> Direction:
    """Vectors of a person's own, made orthonormal; their span is what they say.

    Raises:
        CheckpointError: no such file, or not vectors of full rank.
    """
    try:
        given = np.lib.format.open_memmap(path, mode="r")  # a header that claims more than the file holds is refused
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a NumPy array of numbers ({error}); write it with numpy.save"
        ) from None
    if given.ndim not in (1, 2) or given.dtype.kind not in "fiu" or not given.size:
        raise CheckpointError(
            f"{path}: holds {given.dtype} of shape {list(given.shape)}; expected numbers, [d_model] or [k, d_model]"
        )
    if not np.isfinite(given).all():
        raise CheckpointError(f"{path}: holds NaN or infinity; make it again")
    wide = np.atleast_2d(given).astype(np.float64)
    sizes = np.linalg.svd(wide, compute_uv=False)
    if not wide.any():
        raise CheckpointError(f"{path}: holds zeros, which point nowhere; make it again")
    if len(wide) > wide.shape[1] or not sizes[-1] > 1e-6 * sizes[0]:
        raise CheckpointError(
            f"{path}: its {len(wide)} vectors of width {wide.shape[1]} span fewer directions than that; "
            "leave out those that depend on others"
        )
    q, triangle = np.linalg.qr(wide.T)
    unit = (q * np.sign(np.diag(triangle))).T.astype(np.float32)
    return Direction(unit[0] if given.ndim == 1 else unit, None, None, float(sizes[0]), f"given as {path.name}")
