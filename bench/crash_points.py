"""Stop an edit at every one of its file operations in turn, resume it, and compare with an uninterrupted edit.

uv run python bench/crash_points.py kill EVERY MODEL DIRECTION FOLDER [option of edit ...]
uv run python bench/crash_points.py full EVERY MODEL DIRECTION FOLDER [option of edit ...]

`kill` ends the process by SIGKILL just before the operation; `full` lets this operation and all later ones that need
disk fail as on a full disk. EVERY is 1 for every operation, 2 for every second. Prints one JSON object: at how many
points the edit was stopped, how that ended, and every violation. Modules are loaded once; each edit runs in a fork.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from abliterate import at_rest  # noqa: F401 - loaded before the forks
from abliterate.cli.main import main
from abliterate.report import table  # noqa: F401

#: What opens, makes, moves or deletes a file or folder, by its name as an audit event.
_EVENTS = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir")
_CALLS = ("fsync", "posix_fallocate", "copy_file_range", "pwrite", "pwritev")
_SURVIVES_FULL = ("os.remove", "os.rmdir", "os.rename", "os.link")
#: What an edit writes anew each time: times and dates.
NOT_COMPARED = ("run.json", "report.html", "README.md")


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def result(out: Path) -> dict[str, str]:
    """The hash of every file of an edited checkpoint that two edits must agree on; of a GGUF of its records too."""
    found = contents(out.parent if out.suffix == ".gguf" else out)
    if out.suffix == ".gguf":
        found = {name: digest for name, digest in found.items() if name.startswith((out.name, f"{out.stem}."))}
    return {name: digest for name, digest in found.items() if Path(name).name not in NOT_COMPARED}


def _install(act: Callable[[str], object], within: str) -> None:
    """Have `act` called before every file operation below the folder `within`."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS and str(args[0]).startswith(within):
            writes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes:
                act(event)

    def wrapped(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def inner(*args: Any) -> Any:
            act(name)
            return (
                None if name == "fsync" else call(*args)
            )  # what is not forced to disk outlives its process all the same

        return inner

    for name in _CALLS:
        setattr(os, name, wrapped(name))
    sys.addaudithook(hook)


def edit(arguments: list[str], log: Path, act: Callable[[str], object] = str, within: str = "/dev/null") -> int:
    """Run `abliterate edit` in a fork, its messages in `log`; the exit status, negative for a signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1), os.dup2(fd, 2)
        _install(act, within)
        main(["edit", *arguments])
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - what it was is in the log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def survey(how: str, every: int, model: Path, direction: Path, folder: Path, options: list[str]) -> dict[str, Any]:
    """Stop an edit at every point (or every second, ...), resume it, and say what was wrong."""
    out, log = folder / ("out.gguf" if model.is_file() else "out"), folder / "log"
    partial = out.with_name(f"{out.name}.partial")
    arguments = [str(model), "-d", str(direction), "-o", str(out), *options]
    files = model.parent if model.is_file() else model
    source = contents(files)
    if status := edit(arguments, log):
        raise SystemExit(f"an uninterrupted edit ends with {status}: {log.read_text()}")
    expected = result(out)
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    for point in itertools.count(1, every):
        _clear(out)
        count = itertools.count(1)

        def act(event: str, count: Any = count, point: int = point) -> None:
            number = next(count)
            if how == "kill" and number == point:
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "full" and number >= point and event not in _SURVIVES_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

        status = edit(arguments, log, act, str(folder))
        if status == 0:
            break

        def note(what: str, point: int = point) -> None:
            wrong.append(f"point {point}: {what}: {log.read_text()[-600:]}")

        ends[f"{'signal' if status < 0 else 'exit'} {abs(status)}, {_state(out, partial)}"] += 1
        if "Traceback" in log.read_text() or status not in (-signal.SIGKILL, 6):
            note(f"ended with {status}")
        published = out.exists()
        if published and not expected.items() <= result(out).items():
            note("a half result")
        status = edit([*arguments, "--resume"], log)
        if status != (2 if published else 0):
            note(f"resuming ended with {status}")
        elif not published and result(out) != expected:
            note("resumed to another result")
        if contents(files) != source:
            note("the source was written to")
    _clear(out)
    return {"points": sum(ends.values()), "ends": dict(ends), "wrong": wrong}


def _clear(out: Path) -> None:
    """Delete what an edit leaves, published or not."""
    for path in out.parent.glob(f"{out.stem}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _state(out: Path, partial: Path) -> str:
    return "published" if out.exists() else "OUT.partial left" if partial.exists() else "nothing left"


if __name__ == "__main__":
    how, every, model, direction, folder, *options = sys.argv[1:]
    print(json.dumps(survey(how, int(every), Path(model), Path(direction), Path(folder), options), indent=1))
