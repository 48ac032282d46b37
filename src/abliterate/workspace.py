"""The folder a run builds its result in: beside OUT, renamed to OUT last, resumable step by step.

Owns where results go and which steps are done; never knows what a step computes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abliterate.checkpoint.folder import RECORDS
from abliterate.checkpoint.stream import sync
from abliterate.errors import AbliterateError, CheckpointError, ResourceError, UsageError


class Workspace:
    """`OUT.partial` while a run lasts. A finished step is a file in it; `publish` renames the folder to OUT.

    As a context it keeps other runs from the folder.
    """

    def __init__(self, output: Path, source: Path | None, settings: dict[str, Any], resume: bool) -> None:
        """Claim the folder, or take up the unfinished one of an earlier run with the same settings.

        Raises:
            UsageError: OUT exists, or is or lies in the source; an unfinished run is there and `resume` is not
                given, or is of other settings, or still runs; or what is there is not a run of ours.
        """
        check_output(output, source)
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.steps = self.folder / RECORDS / "steps"
        known = self.steps / "settings.json"
        self._lock: int | None = _claim(self.folder)
        try:
            if not known.is_file() and any(path.is_file() for path in self.folder.rglob("*")):
                raise UsageError(
                    f"{self.folder}: is in the way, and not an unfinished run; move it, or choose another output"
                )
            if known.is_file() and not resume:
                raise UsageError(
                    f"{self.folder}: an unfinished run; --resume goes on with it, or delete it to start again"
                )
            if known.is_file():
                self._compare(self.read("settings"), settings)
            else:
                self.steps.mkdir(parents=True, exist_ok=True)
                self.write("settings", settings)
        except AbliterateError:
            self.__exit__()
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _compare(self, before: Any, now: dict[str, Any]) -> None:
        before = before if isinstance(before, dict) else {}
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != _plain(now.get(k)))
        if changed:
            raise UsageError(
                f"{self.folder}: the unfinished run had other settings ({', '.join(changed)}); "
                "resume with the same ones, or delete the folder to start again"
            )

    def done(self, step: str) -> bool:
        """Whether a step's JSON result is there."""
        return (self.steps / f"{step}.json").is_file()

    def read(self, step: str) -> Any:
        """A finished step's result.

        Raises:
            CheckpointError: its file is damaged.
        """
        try:
            return json.loads((self.steps / f"{step}.json").read_text(encoding="utf-8"))
        except ValueError:
            raise self.damaged(f"{step}.json") from None

    def damaged(self, what: str) -> CheckpointError:
        """The error that says that a file of an unfinished run cannot be gone on from."""
        return CheckpointError(f"{self.folder}: the unfinished run is damaged ({what}); delete it to start again")

    def write(self, step: str, value: Any) -> None:
        """Store a step's result; it counts as done only when all of it is on disk."""
        target = self.steps / f"{step}.json"
        partial = target.with_suffix(".tmp")
        partial.write_text(json.dumps(value), encoding="utf-8")
        sync(partial)
        partial.replace(target)

    @property
    def records(self) -> Path:
        """Where the run record and the directions go."""
        return self.folder / RECORDS

    @classmethod
    @contextmanager
    def scratch(cls, output: Path, source: Path) -> Iterator[Workspace]:
        """A new folder for work that is not resumable: dropped if the block does not publish it.

        What an earlier, killed one left is dropped as well.
        """
        check_output(output, source)
        left = output.with_name(output.name + ".partial")
        if (left / RECORDS / "steps" / "settings.json").is_file():
            os.close(_claim(left))
            shutil.rmtree(left)
        with cls(output, source, {}, resume=False) as work:
            try:
                yield work
            finally:
                shutil.rmtree(work.folder, ignore_errors=True)

    def discard_if_new(self) -> None:
        """Remove the folder if no step has finished: there is nothing in it to resume."""
        if {p.name for p in self.steps.glob("*.json")} <= {"settings.json"}:
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Drop the steps' files and rename the folder to OUT: from here on the result exists.

        Raises:
            UsageError: OUT appeared meanwhile.
        """
        shutil.rmtree(self.steps)
        if not any(self.records.iterdir()):
            self.records.rmdir()  # what is published as it was holds no records of ours
        if self.output.exists():
            raise UsageError(f"{self.output}: appeared while the run lasted; the result is in {self.folder}")
        self.folder.rename(self.output)
        sync(self.output.parent)


def _claim(folder: Path) -> int:
    """The open folder, made where it is not there, locked for as long as this process holds it.

    Raises:
        UsageError: another process is writing to it.
        ResourceError: it cannot be made.
    """
    fd = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.stat().st_ino != os.fstat(fd).st_ino:
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        if fd is not None:
            os.close(fd)
        raise UsageError(f"{folder}: another run is writing to it; wait for it, or choose another output") from None
    except OSError as error:
        raise ResourceError(f"{folder}: cannot create it ({error.strerror})") from None
    return fd


def check_output(output: Path, source: Path | None) -> None:
    """Check that OUT can be created without touching anything that exists.

    Raises:
        UsageError: it exists, or is or lies in the source.
    """
    if source is not None:
        out, model = output.resolve(), source.resolve()
        if out == model or model in out.parents:
            where = "is the model itself" if out == model else "lies inside the model's folder"
            raise UsageError(f"--output {output}: {where} ({source}), which is never written to; choose another folder")
    try:
        taken = output.exists() or output.is_symlink()
    except OSError as error:
        raise UsageError(f"--output {str(output)[:60]}…: not a name for a file here ({error.strerror})") from None
    if taken:
        raise UsageError(f"--output {output}: exists already and is never overwritten; choose another or delete it")


def writable(file: Path) -> None:
    """Make the folder that `file` is to lie in, and check that files can be made there.

    Raises:
        ResourceError: they cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ResourceError(f"{file}: cannot write there ({error.strerror})") from None


def _plain(value: Any) -> Any:
    """A value as it reads after a trip through JSON."""
    return json.loads(json.dumps(value))
