"""Turn what a person typed as a prompt set into a file on disk and the rows wanted of it.

Owns the form SOURCE[:COLUMN=VALUE], folders, and files in hub data sets; never opens what it finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from abliterate.errors import HubError, PromptError

FORMATS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
#: Most names an error lists.
LISTED = 8
_WHERE = re.compile(r":([^:=/\\]+)=")
_HUB = re.compile(
    r"(?P<id>(?P<org>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*(?:@(?:refs/(?:convert|pr)/)?[\w.-]+)?)(?:/(?P<file>.+))?"
)


class Where(NamedTuple):
    """The rows wanted: those whose `column` says `value`."""

    column: str
    value: str


class Found(NamedTuple):
    """A file of prompts: where it lies, what to call it, and which of its rows are wanted (None: all)."""

    path: Path
    name: str
    where: Where | None


def find(source: str) -> Found:
    """The file that `source` names: a file, the first readable one of a folder or hub data set, or one in these.

    Raises:
        PromptError: no such file or folder, or no file in it to read prompts from.
        HubError: the hub is unreachable, or does not know the id, the revision or the file.
    """
    place, where = _parted(source)
    path = _expanded(place)
    if path is not None and path.is_file():
        return Found(path, str(path), where)
    if path is not None and path.is_dir():
        first = _first_readable(path, place)
        return Found(first, str(first), where)
    hub = _HUB.fullmatch(place)
    if hub is not None and _on_hub(hub):
        return Found(*_in_data_set(hub["id"], hub["file"]), where)
    raise PromptError(_no_such_file(place, source))


def _parted(source: str) -> tuple[str, Where | None]:
    """A source without the `:COLUMN=VALUE` behind it, and that; a file or folder of the longer name comes first."""
    if _expanded(source) is not None:
        return source, None
    cuts = list(_WHERE.finditer(source))
    if not cuts:
        return source, None
    # What stands before the first cut may be on the hub, whose names hold no colon.
    cut = next((c for c in reversed(cuts) if _expanded(source[: c.start()]) is not None), cuts[0])
    return source[: cut.start()], Where(cut[1], source[cut.end() :])


def listed(names: Iterable[str]) -> str:
    """The first `LISTED` of `names`, each cut to 40 characters, and how many more there are."""
    kept = list(names)
    more = f" and {len(kept) - LISTED} more" if len(kept) > LISTED else ""
    return ", ".join(n if len(n) <= 40 else f"{n[:39]}…" for n in kept[:LISTED]) + more


def _expanded(place: str) -> Path | None:
    """The file or folder of that name; None where there is none, or can be none."""
    try:
        path = Path(place).expanduser()
        return path if place.strip() and path.exists() else None
    except (OSError, RuntimeError):  # a name too long for a file, or a home of nobody
        return None


def _on_hub(named: re.Match[str]) -> bool:
    """Whether this means the hub and not a path with a slip in it."""
    last = Path(named["file"] or named["id"])
    return (last.suffix.lower() in FORMATS) == bool(named["file"]) and not (
        Path(named["org"]).is_dir() or ".." in last.parts
    )


def _in_data_set(hub_id: str, file: str | None) -> tuple[Path, str]:
    """A file of a hub data set, fetched alone, or else the first readable one; and what it is called on the hub."""
    from abliterate.checkpoint.source import download, files_on_hub

    folder = download(hub_id, "dataset", file)
    path = _first_readable(folder, hub_id) if file is None else folder / file
    if not path.is_file():
        there = listed(name for name in files_on_hub(hub_id, "dataset") if Path(name).suffix.lower() in FORMATS)
        raise HubError(f"{hub_id}: no file '{file}' in this data set; it has {there or 'none to read prompts from'}")
    return path, f"{hub_id}/{path.relative_to(folder).as_posix()}"


def _first_readable(folder: Path, source: str) -> Path:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and p.name != "dataset_infos.json")
    data = [p for p in files if p.suffix != ".txt"] or files
    if not data:
        raise PromptError(f"{source}: no file to read prompts from (looked for {', '.join(FORMATS)})")
    return next((p for p in data if "train" in p.name), data[0])


def _no_such_file(place: str, source: str) -> str:
    of = f" (from '{source}')" if place != source else ""
    place = place.strip() or "''"
    parent = Path(place).parent
    if str(parent) != "." and _expanded(str(parent)) is not None:
        there = listed(sorted(p.name for p in parent.expanduser().glob("*") if p.suffix.lower() in FORMATS))
        return f"{place}: no such file{of}; {parent} has {there or 'no file to read prompts from'}"
    return (
        f"{place}: no such file{of}; give a file ({', '.join(FORMATS)}), a hub data set org/name or a file in it "
        "org/name/FILE"
    )
