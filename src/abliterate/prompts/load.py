"""Read prompt sets: the built-in ones, txt, json, jsonl, csv, parquet; all rows or chosen ones.

Owns file formats and column names; never knows models, where files come from, or how a set is split.
"""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from abliterate.errors import PromptError
from abliterate.prompts.promptset import PromptSet, Splits
from abliterate.prompts.source import FORMATS, Where, find, listed

#: Column names under which a request is looked for, in this order.
COLUMNS = ("prompt", "text", "instruction", "goal", "question", "behavior", "request")
#: The same for a request's category.
CATEGORIES = ("category", "type")
#: Borderline: harmless to answer, though it sounds harmful.
Kind = Literal["harmful", "harmless", "borderline"]
Split = Literal["train", "validation", "test"]


def builtin(kind: Kind, part: Split) -> PromptSet:
    """One split of a built-in set; splits are by paraphrase family, so no near-duplicate crosses them."""
    text = (importlib.resources.files("abliterate.prompts") / "data" / f"{kind}.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == part]
    return PromptSet(f"built-in {kind}", tuple(r["prompt"] for r in rows), tuple(r["category"] for r in rows))


def builtin_splits(kind: Kind) -> Splits:
    """The three splits of a built-in set."""
    return Splits(builtin(kind, "train"), builtin(kind, "validation"), builtin(kind, "test"))


def load_prompts(source: str) -> PromptSet:
    """The prompts in a file, in a folder, or in a hub data set `org/name[@revision]` or a file of it `org/name/FILE`.

    Behind any of these, `:COLUMN=VALUE` takes only the rows whose COLUMN is VALUE: `xstest.csv:label=safe`.
    Of a folder or data set without a file named, the first readable file is taken.

    Raises:
        PromptError: no such file, unreadable, no column of requests, no such column or value, or empty.
        HubError: the hub is unreachable, or does not know the id, the revision or the file.
    """
    return _read(*find(source))


def _read(path: Path, name: str, where: Where | None) -> PromptSet:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"{path}: unknown format '{path.suffix}'; expected {', '.join(FORMATS)}")
    try:
        rows = list(enumerate(reader(path), 1))
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (csv.Error, json.JSONDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be opened ({error.strerror})") from None
    if where is not None and rows:
        rows = _chosen(rows, where, name)
        name = f"{name}:{where.column}={where.value}"
    pairs = [_request(row, path, i) for i, row in rows]
    kept = {prompt: category for prompt, category in reversed(pairs) if prompt}
    prompts = [p for p in dict.fromkeys(prompt for prompt, _ in pairs) if p]
    if not prompts:
        raise PromptError(
            f"{name}: no prompts in it; expected one request a line, or a column {', '.join(COLUMNS[:3])}"
        )
    return PromptSet(name, tuple(prompts), tuple(kept[p] for p in prompts))


def _chosen(rows: list[tuple[int, Any]], where: Where, name: str) -> list[tuple[int, Any]]:
    """The numbered rows that `where` wants."""
    records = [(number, row) for number, row in rows if isinstance(row, dict)]
    columns = [c for c in dict.fromkeys(column for _, row in records for column in row) if isinstance(c, str)]
    if where.column not in columns:
        there = f"it has {listed(columns)}" if columns else "its rows are plain text, without columns"
        raise PromptError(f"{name}: no column '{where.column}' to choose rows by; {there}")
    said = [(number, row, _said(row.get(where.column))) for number, row in records]
    chosen = [(number, row) for number, row, value in said if value == where.value]
    if not chosen:
        there = listed(dict.fromkeys(value for _, _, value in said))
        raise PromptError(f"{name}: no row with {where.column}={where.value}; the values there are {there}")
    return chosen


def _said(value: Any) -> str:
    """A cell as one would type it: text as it is, all else as JSON writes it."""
    if isinstance(value, str):
        return value.strip()
    return "" if value is None else json.dumps(value, default=str)


def _request(row: Any, path: Path, number: int) -> tuple[str, str]:
    """The request and category in one row: a string, or a record with one of `COLUMNS`."""
    if isinstance(row, str):
        return row.strip(), ""
    if isinstance(row, dict):
        for column in COLUMNS:
            if isinstance(row.get(column), str):
                return row[column].strip(), next((str(row[c]) for c in CATEGORIES if row.get(c)), "")
        if named := [column for column in COLUMNS if column in row]:
            value = row[named[0]]
            raise PromptError(f"{path}: row {number}: '{named[0]}' is {value!r:.40}; expected text")
        raise PromptError(f"{path}: row {number} has {sorted(map(str, row))}; expected a column {', '.join(COLUMNS)}")
    raise PromptError(f"{path}: row {number} is {type(row).__name__}; expected text or a record")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")


def _read_json(path: Path) -> list[Any]:
    value = json.loads(_text(path))
    if isinstance(value, dict):
        value = next((value[k] for k in ("prompts", "data", "rows") if isinstance(value.get(k), list)), [])
    return value if isinstance(value, list) else []


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise PromptError(f"{path}: line {number} is not JSON ({error.msg} at column {error.colno})") from None
    return rows


def _read_csv(path: Path) -> list[Any]:
    text = _text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    header = next(csv.reader(io.StringIO(text), delimiter=delimiter), [])
    if len(header) == 1 and header[0].strip().lower() not in COLUMNS:
        return [row[0] for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))


def _read_parquet(path: Path) -> list[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PromptError(f"{path}: reading parquet needs pyarrow; pip install 'abliterate[parquet]'") from None
    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except pyarrow.ArrowException as error:
        raise PromptError(f"{path}: cannot be read as parquet ({error})") from None


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".txt": lambda path: [line for line in _text(path).splitlines() if line.strip()],
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
