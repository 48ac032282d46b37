"""A result read back, finished or not: its page and its card.

Owns how an OUT folder, its `run.json` or an unfinished `OUT.partial` become a record; never runs or edits anything.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from abliterate.checkpoint import hub_name
from abliterate.checkpoint.naming import DIRECTIONS, PAGE, RECORDS, RENAMED, is_gguf, records_at, records_of
from abliterate.direction.direction import Direction
from abliterate.errors import CheckpointError, ResourceError, UsageError
from abliterate.options import Options
from abliterate.report.card import model_card
from abliterate.report.page import page
from abliterate.report.record import RunRecord
from abliterate.workspace import writable

_RECORD = "run.json"


@dataclass(frozen=True)
class Result:
    """A record, the name of its result, the folder of its records, and whether the run goes on."""

    record: RunRecord
    name: str
    records: Path
    unfinished: bool


def report(run: str | Path, output: str | Path | None = None) -> Path:
    """The page of a run: an OUT folder, its `run.json`, or an unfinished run; of that, what there is.

    Without `output` it is the one beside `run.json`, written where it is missing; that of an unfinished run anew.

    Raises:
        CheckpointError: there is no run, or a damaged one.
        UsageError: `output` exists.
    """
    found = read(Path(run).expanduser())
    target = _new(output) if output is not None else found.records / PAGE
    if target.exists() and not found.unfinished:
        return target
    try:
        text = page(found.record, found.name, unfinished=found.unfinished)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UndefinedError) as error:
        raise CheckpointError(f"{run}: its record is damaged, or of another version ({error!r})") from error
    _write(target, text)
    return target


def card(run: str | Path, output: str | Path | None = None) -> str:
    """The model card of a finished run as Markdown; written to the new file `output` too, if given.

    Raises:
        CheckpointError: there is no run, or a damaged one.
        UsageError: it is not finished, or `output` exists.
    """
    found = read(Path(run).expanduser())
    if found.unfinished:
        raise UsageError(f"{run}: is not finished, so there is no model to write a card for; 'run --resume' goes on")
    target = _new(output) if output is not None else None
    try:
        text = model_card(found.record, found.name)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UndefinedError) as error:
        raise CheckpointError(f"{run}: its record is damaged, or of another version ({error!r})") from error
    if target is not None:
        _write(target, text)
    return text


def _new(output: str | Path) -> Path:
    target = Path(output).expanduser()
    if target.exists() or target.is_symlink():
        raise UsageError(f"--output {target}: exists already and is never overwritten; choose another or delete it")
    writable(target)
    return target


def _write(target: Path, text: str) -> None:
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({error.strerror}); name another place with -o") from None


def read(run: Path) -> Result:
    """The result at a path.

    Raises:
        CheckpointError: there is none, or a damaged one.
    """
    beside = records_at(run)
    for file in (beside / _RECORD, run / _RECORD, run):
        if file.is_file() and not is_gguf(file.name):
            record = RunRecord.load(file)
            folder = file.resolve().parent
            inside = folder.parent.name if folder.name == RECORDS else run.name if is_gguf(run.name) else ""
            return Result(record, inside or Path(str(record.given.get("output", "result"))).name, file.parent, False)
    for folder in (run, run.with_name(f"{run.name}.partial")):
        if (folder / RECORDS / "steps" / "settings.json").is_file():
            name = folder.resolve().name.removesuffix(".partial")
            return Result(_unfinished(folder / RECORDS, folder / records_of(name)), name, folder / RECORDS, True)
    where, way_on = ("beside", f"; {RENAMED}") if is_gguf(run.name) else ("in", "")
    raise CheckpointError(
        f"{run}: there is no {beside.name}/{_RECORD} {where} it; expected what run or edit wrote, or its record{way_on}"
    )


def _unfinished(records: Path, directions: Path) -> RunRecord:
    """As much of a record as the finished steps give, with the directions in a folder that may be another."""

    def stored(name: str) -> Any:
        file = records / "steps" / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    try:
        names = ("observe", "collect", "hold", "select", "tune", "pick", "controls", "edit", "evaluate")
        steps = {name: stored(name) for name in names}
        settings, given = stored("settings"), stored("given")
        if "verb" in settings:
            raise UsageError(f"{records.parent}: an unfinished '{settings['verb']}', which has no page")
        chosen = steps["select"].get("result", {})
        direction = directions / DIRECTIONS
        if not direction.is_file():
            direction = records / "steps" / "selected.safetensors"
        found = Direction.load(direction) if chosen and direction.is_file() else None
        picked = steps["pick"].get("result", {})
        observed, compared = steps["observe"].get("result", {}), steps["evaluate"].get("result", {})
        options = asdict(Options())
        return RunRecord(
            model=str(given.get("model", "a model")),
            hub_id=hub_name(str(given.get("model", ""))),
            model_fingerprint=str(settings.get("model", settings.get("edit", ""))),
            given=given,
            resolved=options | {name: settings[name] for name in options if name in settings},
            direction=found.where | {"rank": found.rank} if found is not None else {},
            edits=steps["edit"].get("result", []),
            kept={},
            untouched=0,
            seconds={name: step["seconds"] for name, step in steps.items() if step},
            prompts=settings.get("prompts", {}),
            metrics=compared.get("metrics", []),
            verdicts=compared.get("verdicts", {}),
            judge=compared.get("judge", {}),
            observed={name: observed[name] for name in ("refused", "asked") if observed},
            finalists=chosen.get("finalists", []),
            front=steps["tune"].get("result", {}) | picked if picked else {},
            controls=steps["controls"].get("result", {}),
            charts=chosen.get("charts", {}) | compared.get("charts", {}),
            created=datetime.fromtimestamp((records / "steps").stat().st_mtime, timezone.utc).isoformat("T", "seconds"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{records.parent}: the unfinished run is damaged ({error!r})") from None
