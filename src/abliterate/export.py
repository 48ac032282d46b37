"""Directions in the forms of other programs: `export`.

Owns which file of directions a person means, and what is told of it. Never runs or edits a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.naming import RECORDS, records_of
from abliterate.direction.control_vector import control_vector, write_control_vector
from abliterate.direction.given import directions_at, load_given
from abliterate.errors import AbliterateError, UsageError
from abliterate.workspace import check_output, writable

FORMATS = ("control-vector",)
#: What a control vector is for where nothing says it; llama.cpp does not look at it.
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Exported:
    """What was written: the file, the type of the model it is for, and `{layer, length}` of each vector in it."""

    output: str
    format: str
    model_type: str
    vectors: list[dict[str, Any]]


def export(
    directions: str | Path,
    output: str | Path,
    *,
    format: str = "control-vector",
    layer: int | None = None,
    scale: float | None = None,
) -> Exported:
    """Write the directions of a file, or of a run's folder or record, as `format` into the new file `output`.

    A control vector adds `g r̂` behind the layer at which `r̂` was found, or `layer`; `g` is the gap between both
    prompt sets there, or `scale`.

    Raises:
        AbliterateError: as its kinds say.
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format}: expected {', '.join(FORMATS)}")
    if scale is not None and not (np.isfinite(scale) and scale):
        raise UsageError(f"--scale {scale:g}: expected the length of what is added; not 0, which adds nothing")
    target = Path(output).expanduser()
    if target.suffix != ".gguf":
        raise UsageError(f"--output {output}: control vectors are GGUF files; give it a name that ends in .gguf")
    check_output(target, None)
    source = directions_at(Path(directions).expanduser())
    added = control_vector(load_given(source), layer, scale)
    writable(target)
    model_type = _model_type(source)
    write_control_vector(target, added, model_type)
    vectors = [{"layer": at, "length": float(np.linalg.norm(v))} for at, v in sorted(added.items())]
    return Exported(str(output), format, model_type, vectors)


def _model_type(source: Path) -> str:
    """What kind of model the records are of in which a file of directions lies."""
    records = source.absolute().parent
    inside = [records.parent] if records.name == RECORDS else []
    beside = sorted(p for p in records.parent.glob("*.gguf") if records_of(p.name) == records.name)
    try:
        return next((open_checkpoint(model).model_type for model in inside + beside), _UNKNOWN) or _UNKNOWN
    except AbliterateError:
        return _UNKNOWN
