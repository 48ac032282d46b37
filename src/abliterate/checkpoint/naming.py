"""What the files of a result are called: its weights, and the folder of the records of its edit.

Owns the names of a GGUF's parts and of what lies beside them. Never looks at a disk.
"""

from __future__ import annotations

import re
from pathlib import Path

#: The folder in which an edited checkpoint carries the record of its edit.
RECORDS = "abliteration"
#: The page of charts in it, and the directions that were taken out.
PAGE, DIRECTIONS = "report.html", "directions.safetensors"
#: What to do where the records of a GGUF are not found.
RENAMED = "where the file was renamed, rename the folder of its records too"
#: A part of a split GGUF: what all parts have in common, which one it is, and how many there are.
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def is_gguf(name: str) -> bool:
    """Whether a file of this name is a GGUF, by its ending."""
    return name.lower().endswith(".gguf")


def gguf_names(name: str, parts: int) -> tuple[str, ...]:
    """The names of a GGUF's files where it is called `name` (or its first part is): one, or one for each part."""
    return (name,) if parts < 2 else tuple(f"{_stem(name)}-{i + 1:05d}-of-{parts:05d}.gguf" for i in range(parts))


def records_of(name: str) -> str:
    """The folder of records of the result `name`: one beside a GGUF, called after it, or one inside a folder."""
    return f"{_stem(name)}.{RECORDS}" if is_gguf(name) else RECORDS


def records_at(result: Path) -> Path:
    """Where the records of a result lie."""
    return result.parent / records_of(result.name) if is_gguf(result.name) else result / RECORDS


def _stem(name: str) -> str:
    part = PART.fullmatch(name)
    return part[1] if part is not None else name[: -len(".gguf")]
