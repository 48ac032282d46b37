"""What differs between two checkpoints beside their tensors: settings, tokenizer, chat template, as lines of text.

Owns what a difference looks like in each kind of file; never reads weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path
from typing import Any

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.gguf_file import Listed, read_gguf, read_list
from abliterate.checkpoint.naming import RECORDS

#: Settings that say which program wrote a file, and nothing of the model.
_WRITTEN_BY = ("transformers_version", "_name_or_path", "_from_model_config")
#: Most lines of one file, and characters of one value.
_LINES, _LONG = 40, 60
_TEXT = (".json", ".jinja", ".txt", ".md", ".py", ".model", ".yaml", ".yml")
_ABSENT = object()


def side_differences(base: Checkpoint, other: Checkpoint) -> dict[str, list[str]]:
    """For each side file that is not the same in both, what differs, as lines; records of an edit are left out.

    Settings are named by their path with both values, texts shown as a unified difference, others by their sizes. Of
    two GGUFs it is their metadata.
    """
    if base.format == "gguf":
        lines = list(_metadata(base.source, other.source))
        return {"metadata": _first(lines)} if lines else {}
    one, two = (
        {name for name in c.side_files if not name.startswith(f"{RECORDS}/") and name != "README.md"}
        for c in (base, other)
    )
    found = {name: ["only in the base"] for name in sorted(one - two)}
    found |= {name: ["only in the other"] for name in sorted(two - one)}
    for name in sorted(one & two):
        lines = list(_differences(base.path / name, other.path / name))
        if lines:
            found[name] = _first(lines)
    return found


def _first(lines: list[str]) -> list[str]:
    """As many as are shown, and how many more there are."""
    return lines[:_LINES] + ([f"… and {len(lines) - _LINES} more"] if len(lines) > _LINES else [])


def _metadata(one: Path, two: Path) -> Iterator[str]:
    """What differs between the metadata of two GGUFs."""
    parts = [read_gguf(path) for path in (one, two)]
    before, after = (
        {
            key: read_list(part.path, value) if isinstance(value, Listed) else value
            for key, value in part.metadata.items()
            if not key.startswith("abliterate.")
        }
        for part in parts
    )
    yield from _settings(before, after, "")


def _differences(one: Path, two: Path) -> Iterator[str]:
    before, after = one.read_bytes(), two.read_bytes()
    if before == after or not one.name.endswith(_TEXT):
        if before != after:
            yield f"{len(before):,} and {len(after):,} bytes"
        return
    try:
        texts = before.decode(), after.decode()
        values = [json.loads(text) for text in texts] if one.suffix == ".json" else []
    except ValueError:
        yield f"{len(before):,} and {len(after):,} bytes; not readable"
        return
    if values:
        yield from _settings(values[0], values[1], "")
    else:
        yield from _text(*texts)


def _settings(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(k for k in after if k not in before)]:
            if path or key not in _WRITTEN_BY:
                name = f"{path}.{key}" if path else str(key)
                yield from _settings(before.get(key, _ABSENT), after.get(key, _ABSENT), name)
    elif isinstance(before, list) and isinstance(after, list) and max(len(before), len(after)) > 8:
        if before != after:
            common = sum(a == b for a, b in zip(before, after, strict=False))
            yield f"{path}: {len(before):,} and {len(after):,} entries, {common:,} the same"
    elif before != after:
        if isinstance(before, str) and isinstance(after, str) and "\n" in before + after:
            yield f"{path}:"
            yield from _text(before, after)
        else:
            yield f"{path}: {_short(before)} → {_short(after)}"


def _text(before: str, after: str) -> Iterator[str]:
    for line in list(unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=1))[2:]:
        yield line if len(line) <= 2 * _LONG else line[: 2 * _LONG] + "…"


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONG else text[:_LONG] + "…"
