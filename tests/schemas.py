"""The schemas of the package, and whether a JSON text is what they describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from referencing import Registry

import abliterate

FOLDER = Path(abliterate.__file__).parent / "schemas"
SCHEMAS: dict[str, dict[str, Any]] = {f.name: json.loads(f.read_text(encoding="utf-8")) for f in FOLDER.glob("*.json")}
_REGISTRY: Registry[Any] = Registry().with_contents(SCHEMAS.items())
_VALIDATORS = {name: Draft202012Validator({"$ref": name}, registry=_REGISTRY) for name in SCHEMAS}


def problems(value: dict[str, Any], kind: str) -> list[str]:
    """What is wrong with a result that is to be of a kind."""
    found = _VALIDATORS[f"{kind}.json"].iter_errors(value)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


def strict(text: str) -> dict[str, Any]:
    """The one object in a text that is JSON after RFC 8259; NaN and infinity are not."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    value = json.loads(text, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def valid(text: str, kind: str) -> dict[str, Any]:
    """The object in a text, which is of a kind and has nothing that is not described."""
    value = strict(text)
    assert value["kind"] == kind and not problems(value, kind), problems(value, kind)
    return value
