"""Write docs/json.md from the schemas in the package, or with --check say whether it is up to date.

uv run python scripts/json_reference.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated import write_or_check

from abliterate.errors import AbliterateError

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT / "src" / "abliterate" / "schemas"
TARGET = ROOT / "docs" / "json.md"
#: In the order in which a person meets them.
KINDS = (
    "run", "activations", "observed", "direction", "evaluation", "inspection", "restored", "comparison", "benchmarks",
    "resistance", "page", "card", "exported",
)  # fmt: skip
INTRO = """# JSON

What every verb prints with `--json`, and what the files in its output hold. Written by `scripts/json_reference.py`
from the schemas in the package; do not edit.

- **One object** on standard output, and nothing else there: what there is to say meanwhile goes to standard error.
  It is indented and in ASCII (`\\u2016` for `‖`), so that it comes through any pipe; files are in UTF-8.
- **Three fields** say what it is: `tool`, always `abliterate`; `kind`; and `schema`, the version of that kind. That
  number rises where a field goes or means something else. Fields may be added without it: ignore what you do not know.
- **Numbers** have full precision but where rounding is named below. JSON knows no NaN and no infinity: a figure that is
  not finite is null, like one that does not apply.

## Errors

Where a command fails, standard output stays empty, so what is there is always a result. The message is the last line on
standard error where that is no terminal (an option that is not known or no number gets a usage line and a box, as on a
terminal), and the exit code says what kind of mistake it was. Lines before it tell what a run that takes longer than
half a minute is doing.

| code | what it means |
| --- | --- |
| 0 | done |
| 1 | a bug of ours, with a traceback |
{codes}
| 130 | interrupted from the keyboard |

## The schemas

`src/abliterate/schemas/KIND.json`, in an installed package the folder `schemas` beside `abliterate/__init__.py`: JSON
Schema 2020-12. They refer to each other by file name, and allow no field that they do not describe, so they fit what
this version writes. In Python, with `pip install jsonschema`:

```python
import json, pathlib, abliterate, jsonschema, referencing

folder = pathlib.Path(abliterate.__file__).parent / "schemas"
schemas = [(f.name, json.loads(f.read_text(encoding="utf-8"))) for f in folder.glob("*.json")]
registry = referencing.Registry().with_contents(schemas)
result = json.load(open("out/abliteration/run.json", encoding="utf-8"))
validator = jsonschema.Draft202012Validator({{"$ref": f"{{result['kind']}}.json"}}, registry=registry)
validator.validate(result)
```

In the tables `x[]` stands for each item of a list, `x.*` for each value of an object whose keys are names; fields
marked *optional* may be absent.
"""


def load(file: str) -> dict[str, Any]:
    """One schema file."""
    value: dict[str, Any] = json.loads((SCHEMAS / file).read_text(encoding="utf-8"))
    return value


def resolved(node: dict[str, Any], file: str) -> tuple[dict[str, Any], str]:
    """A schema with its references followed, and the file it lies in; what stands beside a reference goes first."""
    while "$ref" in node:
        place, _, pointer = node["$ref"].partition("#")
        file = place or file
        found: Any = load(file)
        for part in pointer.strip("/").split("/"):
            found = found[part] if part else found
        node = {**found, **{k: v for k, v in node.items() if k != "$ref"}}
    return node, file


def kind_of_value(node: dict[str, Any], file: str) -> str:
    """The JSON type in words."""
    if "const" in node:
        return f"`{json.dumps(node['const'])}`"
    if "enum" in node:
        return " or ".join(f"`{json.dumps(v)}`" for v in node["enum"])
    if "anyOf" in node and "type" not in node:
        return " or ".join(kind_of_value(*resolved(option, file)) for option in node["anyOf"])
    types = node["type"] if isinstance(node["type"], list) else [node["type"]]
    if "array" in types and "items" in node:
        items = kind_of_value(*resolved(node["items"], file)).replace(" or null", "/null")
        types = [f"array of {items}" if t == "array" else t for t in types]
    return " or ".join(types)


def rows(
    node: dict[str, Any], file: str, home: str, told: dict[str, str], path: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Field, type and description of everything below an object.

    What another file describes is only named, and so is what was `told` before under the same reference.
    """
    required = node.get("required", node.get("properties", {}).keys() if "anyOf" in node else ())
    below = list(node.get("properties", {}).items())
    if isinstance(node.get("additionalProperties"), dict):
        below.append(("*", node["additionalProperties"]))
    for name, child in below:
        found, where = resolved(child, file)
        field = f"{path}{name}"
        optional = "" if name in required or name == "*" else ", *optional*"
        nested, inner = inside(found, where)
        what, kind, before = found.get("description", ""), where.removesuffix(".json"), told.get(child.get("$ref", ""))
        if nested and where != home:
            what += f" Fields as in [{kind}](#{kind})."
        elif nested and before:
            what += f" Fields as in `{before}`."
        if what or name != "*":
            yield field, kind_of_value(found, where) + optional, what
        if nested and where == home and not before:
            told |= {child["$ref"]: field} if "$ref" in child else {}
            yield from rows(nested, inner, home, told, field + ("[]." if "array" in str(found.get("type")) else "."))


def inside(node: dict[str, Any], file: str) -> tuple[dict[str, Any], str]:
    """The object in a schema whose fields are to be listed: itself, or its items; empty where there is none."""
    if isinstance(node.get("items"), dict):
        return inside(*resolved(node["items"], file))
    extra = node.get("additionalProperties")
    if isinstance(extra, dict):
        of, where = resolved(extra, file)
        return (node, file) if inside(of, where)[0] else ({}, file)
    return (node, file) if node.get("properties") else ({}, file)


def section(kind: str) -> str:
    """One kind of result."""
    file = f"{kind}.json"
    schema = load(file)
    number = schema["properties"]["schema"]["const"]
    lines = [f"## {kind}", "", f"`{schema['title']}`, schema {number}. {schema['description']}", ""]
    lines += ["| field | type | what it is |", "| --- | --- | --- |"]
    lines += [f"| `{field}` | {what} | {told} |" for field, what, told in rows(schema, file, file, {})]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The whole page."""
    kinds = sorted(AbliterateError.__subclasses__(), key=lambda kind: kind.exit_code)
    codes = [f"| {kind.exit_code} | {(kind.__doc__ or '').strip()} |" for kind in kinds]
    return "\n".join([INTRO.format(codes="\n".join(codes)), *map(section, KINDS)])


def main() -> None:
    """Write or check."""
    if {f.stem for f in SCHEMAS.glob("*.json")} != set(KINDS):
        sys.exit("scripts/json_reference.py: KINDS are not the files in src/abliterate/schemas")
    write_or_check(TARGET, reference())


if __name__ == "__main__":
    main()
