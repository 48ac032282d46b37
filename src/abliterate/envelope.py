"""A result as JSON: what it is and of which schema, in text that every parser reads.

Owns the envelope and the text; never knows what a result holds. `schemas/KIND.json` says that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

TOOL = "abliterate"
#: A list of numbers as `indent` writes it. No text of JSON holds a line's end, so none is found in one.
_NUMBERS = re.compile(r"\[\n([-+.,\deE\s]+)\]")


def enveloped(kind: str, value: Mapping[str, Any], schema: int = 1) -> dict[str, Any]:
    """`{tool, schema, kind, ...value}`.

    `schema` counts the changes of one kind that break readers: a field that goes, or means something else. A field
    that is added breaks none.
    """
    return {"tool": TOOL, "schema": schema, "kind": kind, **value}


def json_text(value: Any, *, escaped: bool = False) -> str:
    """Indented JSON after RFC 8259, which knows no NaN and no infinity: such a number becomes null.

    A list of numbers stands on one line. `escaped` leaves ASCII alone, which comes through a pipe of any encoding.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=escaped, allow_nan=False)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
