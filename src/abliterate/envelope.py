"""A result as JSON: what it is and of which schema, in text that every parser reads.

Owns the envelope and the text; never knows what a result holds. `schemas/KIND.json` says that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

TOOL = "abliterate"


def enveloped(kind: str, value: Mapping[str, Any], schema: int = 1) -> dict[str, Any]:
    """`{tool, schema, kind, ...value}`.

    `schema` counts the changes of one kind that break readers: a field that goes, or means something else. A field
    that is added breaks none.
    """
    return {"tool": TOOL, "schema": schema, "kind": kind, **value}


def json_text(value: Any, *, escaped: bool = False) -> str:
    """Indented JSON after RFC 8259, which knows no NaN and no infinity: such a number becomes null.

    `escaped` leaves ASCII alone in it, which comes through a pipe of any encoding.
    """
    return json.dumps(_finite(value), indent=2, ensure_ascii=escaped, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
