"""Small files of our own: a few arrays and one JSON note, in safetensors.

Owns the envelope (kind and schema number); never knows what the arrays mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from abliterate.errors import CheckpointError

SCHEMA = 1
_KEY = "abliterate"


def save_arrays(path: Path, kind: str, arrays: dict[str, npt.NDArray[Any]], note: Mapping[str, Any]) -> None:
    """Write `arrays` and `note`; the same values give the same bytes."""
    # One metadata entry: safetensors writes several in random order.
    envelope = json.dumps({"kind": kind, "schema": SCHEMA, **note}, ensure_ascii=False)
    # Stored as they lie in memory: a transposed view would come back with its numbers in another order.
    stored = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    path.write_bytes(save(stored, metadata={_KEY: envelope}))


def load_arrays(path: Path, kind: str) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Any]]:
    """The arrays and the note that `save_arrays` wrote.

    Raises:
        CheckpointError: no such file, or it holds something else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            note = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            if note.pop("kind", None) != kind or note.pop("schema", None) != SCHEMA:
                raise CheckpointError(f"{path}: does not hold {kind} of schema {SCHEMA}; make it again")
            return {name: file.get_tensor(name) for name in file.keys()}, note  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as {kind} ({error})") from None
