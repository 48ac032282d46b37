"""The folder a run builds its result in: beside OUT, put in OUT's place last, resumable step by step.

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

from abliterate.checkpoint.naming import RECORDS, records_of
from abliterate.checkpoint.stream import sync
from abliterate.errors import AbliterateError, CheckpointError, ResourceError, UsageError
from abliterate.moving import marks, move_out, take_back

#: The step that says what is moved out of the folder, by the marks by which it is known there.
_MOVED = "moved"


class Workspace:
    """`OUT.partial` while a run lasts. A finished step is a file in it; `publish` renames the folder to OUT.

    Where OUT is a GGUF, the folder holds its `files` and, beside them, the folder of its records, as they will lie
    beside OUT; `publish` moves them there.

    As a context it keeps other runs from the folder, and says of a disk that does not take what is written that it
    does not.
    """

    #: The folder, beside the steps' files, of what the work needs and no result holds.
    ASIDE = "aside"

    def __init__(
        self, output: Path, source: Path | None, settings: dict[str, Any], resume: bool, files: tuple[str, ...] = ()
    ) -> None:
        """Claim the folder, or take up the unfinished one of an earlier run with the same settings.

        Raises:
            UsageError: OUT exists, or is or lies in the source; an unfinished run is there and `resume` is not
                given, or is of other settings, or still runs; or what is there is not a run of ours.
        """
        check_output(output, source)
        self.output, self.files = output, files
        self.folder = self.place(output)
        self.steps = self.folder / RECORDS / "steps"
        known = self.steps / "settings.json"
        if not (self.steps / f"{_MOVED}.json").is_file():  # with it, what lies there may be ours
            self._require_free(source)
        self._lock: int | None = _claim(self.folder)
        self._ours = False
        try:
            self.resumed = known.is_file()
            if not self.resumed and any(p.is_file() for p in self.folder.rglob("*") if p != _unfinished(known)):
                raise UsageError(
                    f"{self.folder}: is in the way, and not an unfinished run; move it, or choose another output"
                )
            if self.resumed and not resume:
                raise UsageError(
                    f"{self.folder}: an unfinished run; --resume goes on with it, or delete it to start again"
                )
            if self.resumed:
                self._compare(self.read("settings"), settings)
                _take_back(self.folder)
                self._require_free(source)
            self._ours = True
            if not self.resumed:
                self.steps.mkdir(parents=True, exist_ok=True)
                self.write("settings", settings)
        except (AbliterateError, OSError) as error:
            self.__exit__(type(error), error)
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, _kind: object = None, error: BaseException | None = None, _trace: object = None) -> None:
        try:
            if isinstance(error, OSError):
                self.discard_if_new()
                way_on = "--resume goes on with what is finished" if self.folder.exists() else "start again"
                raise ResourceError(
                    f"{error.filename or self.folder}: cannot be read or written ({error.strerror}); mend that, then "
                    f"{way_on}"
                ) from error
        finally:
            if self._lock is not None:
                os.close(self._lock)
            self._lock = None

    def _require_free(self, source: Path | None) -> None:
        """Check all names that a GGUF takes beside OUT's own, which may be no file's."""
        for name in (self.records.name, *self.files) if self.files else ():
            check_output(self.output.with_name(name), source)

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
        return _damaged(self.folder, what)

    def write(self, step: str, value: Any) -> None:
        """Store a step's result; it counts as done only when all of it is on disk."""
        target = self.steps / f"{step}.json"
        partial = _unfinished(target)
        partial.write_text(json.dumps(value), encoding="utf-8")
        sync(partial)
        partial.replace(target)

    @staticmethod
    def place(output: Path) -> Path:
        """The folder where OUT is made."""
        return output.with_name(output.name + ".partial")

    @property
    def aside(self) -> Path:
        """A place, to be made, for files that `publish` drops."""
        return self.steps / self.ASIDE

    @property
    def records(self) -> Path:
        """Where the run record and the directions go."""
        return self.folder / records_of(self.output.name if self.files else "")

    def record(self, name: str) -> Path:
        """Where the record of this name goes, in a folder that is there."""
        self.records.mkdir(exist_ok=True)
        return self.records / name

    @property
    def result(self) -> Path:
        """What is opened of the result while it is here: the folder, or the (first) GGUF in it."""
        return self.folder / self.files[0] if self.files else self.folder

    @property
    def card(self) -> Path:
        """Where the model card goes."""
        return (self.records if self.files else self.folder) / "README.md"

    @classmethod
    @contextmanager
    def scratch(cls, output: Path, source: Path | None, files: tuple[str, ...] = ()) -> Iterator[Workspace]:
        """A new folder for work that is not resumable: dropped if the block does not publish it.

        What an earlier, killed one left is dropped as well.
        """
        check_output(output, source)
        left = cls.place(output)
        if (left / RECORDS / "steps" / "settings.json").is_file():
            lock = _claim(left)
            try:
                _take_back(left)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
        with cls(output, source, {}, False, files) as work:
            try:
                yield work
            finally:
                work.discard()

    def discard_if_new(self) -> None:
        """Remove the folder if no step has finished: there is nothing in it to resume."""
        if {p.name for p in self.steps.glob("*.json")} <= {"settings.json", "given.json"}:
            self.discard()

    def discard(self) -> None:
        """Remove the folder, unless it is published, or was never ours."""
        if self._ours and self._lock is not None and _is_at(self.folder, self._lock):
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Force all of the folder to disk and rename it to OUT: from here on the result exists.

        The steps' files go last: a run that is killed before the rename can still go on, one that is killed after it
        leaves them in a result that is complete. Of a GGUF the records go first and the (first) file last; a run that
        is killed between takes back what it had moved.

        Raises:
            UsageError: OUT appeared meanwhile.
        """
        dropped = self.steps / "dropped"
        for path in (dropped, self.aside):
            if path.exists():
                shutil.rmtree(path.rename(dropped))  # what is half gone may not have its name
        for path in (*self.folder.rglob("*"), self.folder):
            if path.is_file() or path.is_dir():
                sync(path)
        if self.files:
            self._publish_files()
            return
        try:
            check_output(self.output, None)
            self.folder.rename(self.output)
        except (UsageError, OSError):
            if not self.output.exists():
                raise
            raise UsageError(f"{self.output}: appeared while the run lasted; the result is in {self.folder}") from None
        sync(self.output.parent)
        records = self.output / RECORDS
        shutil.rmtree(records / "steps")
        if not any(records.iterdir()):
            records.rmdir()  # what is published as it was holds no records of ours

    def _publish_files(self) -> None:
        moved = marks(self.folder, (self.records.name, *self.files[::-1]))
        self.write(_MOVED, moved)
        try:
            move_out(self.folder, moved)
        except OSError:
            taken = [path for path in map(self.output.with_name, moved) if path.exists()]
            if not taken:
                raise
            raise UsageError(f"{taken[0]}: appeared while the run lasted; the result is in {self.folder}") from None
        sync(self.output.parent)
        shutil.rmtree(self.folder)


def _claim(folder: Path) -> int:
    """The open folder, made where it is not there, locked for as long as this process holds it.

    Raises:
        UsageError: another process is writing to it.
        ResourceError: it cannot be made or locked.
    """
    fd = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if fd is not None:
            os.close(fd)
        if isinstance(error, BlockingIOError):
            raise _busy(folder) from None
        raise ResourceError(f"{folder}: cannot create it ({error.strerror}); choose another output") from None
    if not _is_at(folder, fd):  # what was locked is what another run has published or dropped meanwhile
        os.close(fd)
        raise _busy(folder)
    return fd


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder}: the unfinished run is damaged ({what}); delete it to start again")


def _busy(folder: Path) -> UsageError:
    return UsageError(f"{folder}: another run is writing to it; wait for it, or choose another output")


def _is_at(folder: Path, fd: int) -> bool:
    """Whether the open folder `fd` is the one that has this name."""
    try:
        return os.path.samestat(folder.stat(follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def _take_back(folder: Path) -> None:
    """Put what a run that was killed meanwhile had moved out of its folder to where it was."""
    known = folder / RECORDS / "steps" / f"{_MOVED}.json"
    try:
        moved = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    except ValueError:
        raise _damaged(folder, known.name) from None
    take_back(folder, moved)


def _unfinished(step: Path) -> Path:
    """Where a step's file is written before it has its name."""
    return step.with_suffix(".tmp")


def check_output(output: Path, source: Path | None) -> None:
    """Check that OUT can be created without touching anything that exists.

    Raises:
        UsageError: it exists, or is or lies in the source, or has a name that no record can hold.
    """
    for path in (output, source):
        if path is not None and not _is_text(path):
            raise UsageError(f"{path!a}: not a name in UTF-8, as records are written; rename it, or choose another")
    if source is not None:
        out, model = output.resolve(), source.resolve()
        if out == model or model in out.parents:
            where = "is the model itself" if out == model else "lies inside the model's folder"
            raise UsageError(f"--output {output}: {where} ({source}), which is never written to; choose another place")
    try:
        taken = output.exists() or output.is_symlink()
    except OSError as error:
        raise UsageError(f"--output {str(output)[:60]}…: not a name for a file here ({error.strerror})") from None
    if taken:
        raise UsageError(f"--output {output}: exists already and is never overwritten; choose another or delete it")


def _is_text(path: Path) -> bool:
    try:
        return bool(str(path).encode("utf-8"))
    except UnicodeEncodeError:
        return False


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
