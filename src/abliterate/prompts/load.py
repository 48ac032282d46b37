"""Read prompt sets: the built-in ones, txt, json, jsonl, csv, parquet, or a data set on the hub.

Owns file formats and column names; never knows models or how a set is split.
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

#: Column names under which a request is looked for, in this order.
COLUMNS = ("prompt", "text", "instruction", "goal", "question", "behavior", "request")
FORMATS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
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
    """The prompts in a file, or in the first readable file of a hub data set `org/name[@revision]`.

    Raises:
        PromptError: no such file, unreadable, no column of requests, or empty.
        HubError: the hub is unreachable or does not know the id.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path)
    if path.is_dir():
        return _read(_first_readable(path, source))
    if source.count("/") == 1 and not path.suffix and not path.parent.is_dir():
        from abliterate.checkpoint.source import download

        return _read(_first_readable(download(source, repo_type="dataset"), source), source)
    raise PromptError(f"{source}: no such file; give a file ({', '.join(FORMATS)}) or a hub data set org/name")


def _first_readable(folder: Path, source: str) -> Path:
    files = sorted(p for p in folder.rglob("*") if p.suffix in FORMATS and p.name != "dataset_infos.json")
    data = [p for p in files if p.suffix != ".txt"] or files
    if not data:
        raise PromptError(f"{source}: no file to read prompts from (looked for {', '.join(FORMATS)})")
    return next((p for p in data if "train" in p.name), data[0])


def _read(path: Path, name: str | None = None) -> PromptSet:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PromptError(f"{path}: unknown format '{path.suffix}'; expected {', '.join(FORMATS)}")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (csv.Error, json.JSONDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be opened ({error.strerror})") from None
    pairs = [_request(row, path, i) for i, row in enumerate(rows, 1)]
    kept = {prompt: category for prompt, category in reversed(pairs) if prompt}
    prompts = [p for p in dict.fromkeys(prompt for prompt, _ in pairs) if p]
    if not prompts:
        raise PromptError(
            f"{path}: no prompts in it; expected one request a line, or a column {', '.join(COLUMNS[:3])}"
        )
    return PromptSet(name or str(path), tuple(prompts), tuple(kept[p] for p in prompts))


def _request(row: Any, path: Path, number: int) -> tuple[str, str]:
    """The request and category in one row: a string, or a record with one of `COLUMNS`."""
    if isinstance(row, str):
        return row.strip(), ""
    if isinstance(row, dict):
        for column in COLUMNS:
            if isinstance(row.get(column), str):
                return row[column].strip(), str(row.get("category") or "")
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
