"""Directions as llama.cpp's control vectors: what it adds to the stream, behind which block, in a GGUF.

Owns that file and what its numbers mean. Never knows models or weights, nor which file a person means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.checkpoint.gguf_names import new_writer
from abliterate.direction.direction import Direction
from abliterate.errors import CheckpointError, UnsupportedError, UsageError

#: What is added, `[d_model]`, by the layer behind which it is.
Added = dict[int, npt.NDArray[np.float32]]
ARCHITECTURE = "controlvector"
_NAME = re.compile(r"direction\.(\d+)")


def control_vector(found: Direction, layer: int | None = None, length: float | None = None) -> Added:
    """`g r̂` behind the layer at which `r̂` was found, of several directions each behind its own.

    `g` is how much further along `r̂` the mean of harmful prompts lies there than that of harmless ones, or `length`.
    `layer` names another layer; where each layer has a direction of its own, that of this one is taken. llama.cpp
    adds nothing behind layer 0.

    Raises:
        UsageError: it is not known where the direction was found, or that is layer 0; or there is no such layer.
    """
    if found.layers is not None and layer is not None and not 0 <= layer < len(found.layers):
        raise UsageError(f"--layer {layer}: there are directions of layers 0 to {len(found.layers) - 1}")
    parts = found.parts or [{"layer": found.layer, "scale": found.scale}]
    rows = np.atleast_2d(found.vector if found.layers is None or layer is None else found.layers[layer])
    if len(parts) != len(rows):  # a person's own basis
        parts = parts * len(rows)
    added: Added = {}
    for row, part in zip(rows, parts, strict=True):
        at = part["layer"] if layer is None else layer
        if at is None:
            raise UsageError("where the direction was found is not known; name the layer to add it behind with --layer")
        if at < 1:
            raise UsageError(f"layer {at}: llama.cpp adds nothing behind the first block; name another with --layer")
        size = part["scale"] if length is None else length
        added[at] = added.get(at, np.zeros_like(row)) + np.float32(size) * row
    return added


def write_control_vector(path: Path, added: Mapping[int, npt.NDArray[np.float32]], model: str) -> None:
    """Write what `--control-vector` of llama.cpp loads; `model` is the type of the model it is for.

    Raises:
        UnsupportedError: the `gguf` package is not installed.
    """
    partial = path.with_name(f"{path.name}.partial")
    writer = new_writer(partial, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(added))
    for layer, vector in sorted(added.items()):
        writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(vector, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def read_control_vector(path: Path) -> Added:
    """What a file adds, layers behind which that is nothing left out.

    Raises:
        CheckpointError: no such file, a damaged one, or one that llama.cpp would not take.
        UnsupportedError: it holds a model.
    """
    try:
        file = read_gguf(path)
        if (what := file.metadata.get("general.architecture")) != ARCHITECTURE:
            raise UnsupportedError(
                f"{path}: a GGUF of '{what!s:.40}'; expected a control vector, or directions of a run or of select"
            )
        added: Added = {}
        for tensor in file.tensors.values():
            named = _NAME.fullmatch(tensor.name)
            if named is None or not int(named[1]) or tensor.dtype != "F32" or len(tensor.shape) != 1:
                raise CheckpointError(
                    f"{path}: '{tensor.name}' is {tensor.dtype} of shape {list(tensor.shape)}; expected direction.N "
                    "from N = 1 on, F32 [d_model]"
                )
            vector = np.fromfile(path, "<f4", tensor.shape[0], offset=tensor.offset).astype(np.float32)
            if not np.isfinite(vector).all():
                raise CheckpointError(f"{path}: '{tensor.name}' holds NaN or infinity; make it again")
            if vector.any():
                added[int(named[1])] = vector
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not added or len({v.shape for v in added.values()}) > 1:
        raise CheckpointError(f"{path}: holds no directions, or such of several widths; make it again")
    return added
