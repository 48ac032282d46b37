"""The folder a run builds its result in: beside OUT, renamed to OUT last, resumable step by step.

Owns where results go and which steps are done; never knows what a step computes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abliterate.checkpoint.folder import RECORDS
from abliterate.checkpoint.stream import sync
from abliterate.errors import CheckpointError, ResourceError, UsageError


class Workspace:
    """`OUT.partial` while a run lasts. A finished step is a file in it; `publish` renames the folder to OUT."""

    def __init__(self, output: Path, source: Path | None, settings: dict[str, Any], resume: bool) -> None:
        """Claim the folder, or take up the unfinished one of an earlier run with the same settings.

        Raises:
            UsageError: OUT exists, or is or lies in the source; an unfinished run is there and `resume` is not
                given, or is of other settings; or what is there is not a run of ours.
        """
        check_output(output, source)
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.steps = self.folder / RECORDS / "steps"
        known = self.steps / "settings.json"
        if not known.is_file() and any(path.is_file() for path in self.folder.rglob("*")):
            raise UsageError(
                f"{self.folder}: is in the way, and not an unfinished run; move it, or choose another output"
            )
        if self.folder.exists() and not resume:
            raise UsageError(f"{self.folder}: an unfinished run; --resume goes on with it, or delete it to start again")
        if resume and known.is_file():
            self._compare(self.read("settings"), settings)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.steps.mkdir(parents=True)
            except OSError as error:
                raise ResourceError(f"{self.folder}: cannot create it ({error.strerror})") from None
            self.write("settings", settings)

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
    def scratch(cls, output: Path, source: Path) -> Workspace:
        """A new folder for work that is not resumable; what an earlier, killed one left is dropped."""
        check_output(output, source)
        left = output.with_name(output.name + ".partial")
        if (left / RECORDS / "steps" / "settings.json").is_file():
            shutil.rmtree(left)
        return cls(output, source, {}, resume=False)

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Remove the folder if the block does not end well: for work that is not resumable."""
        ended = False
        try:
            yield
            ended = True
        finally:
            if not ended:
                shutil.rmtree(self.folder, ignore_errors=True)

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
        if self.output.exists():
            raise UsageError(f"{self.output}: appeared while the run lasted; the result is in {self.folder}")
        self.folder.rename(self.output)
        sync(self.output.parent)


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
