"""What becomes of an edit that is killed, starved, disturbed or doubled: run it, and print a table.

uv run python bench/reliability.py [--kills 200] [--times 10] [--seed 0] [--jobs 2] [--folder FOLDER]

Edits a generated checkpoint of 138 MB in 12 shards, again and again, by the command `abliterate edit`. Cases that need
root (a file system of its own that fills up, a read-only mount) are skipped with a line that says so. Exits with 1
where anything was lost. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.crash_points import contents, result
from bench.small import Shape, generate

_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
#: A quarter of the kills fall between the last file of the edit and some time after OUT has its name.
_PUBLISHING = 0.25


@dataclass
class Row:
    """One line of the table: a case, how its runs ended, what was wrong, and one message of those that failed."""

    case: str
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    message: str = ""

    def end(self, how: str, *checks: tuple[bool, str], message: str = "") -> None:
        """Count one run and what of its `(holds, what else)` does not hold."""
        self.ends[how] += 1
        self.wrong += [f"{how}: {what}: {message[-500:]}" for holds, what in checks if not holds]
        self.message = self.message or message.strip().splitlines()[-1] if message.strip() else self.message


@dataclass(frozen=True)
class Edit:
    """The edit that everything is compared with: its arguments, its result, when it did what."""

    model: Path
    direction: Path
    source: dict[str, str]
    expected: dict[str, str]
    begun: float
    publishing: float
    ended: float

    @classmethod
    def measure(cls, model: Path, direction: Path, folder: Path) -> Edit:
        """Run it once, undisturbed."""
        source, out, start = contents(model), folder / "out", time.monotonic()
        process = run(model, direction, out)
        begun = _until(lambda: out.with_name("out.partial").exists(), process) - start
        publishing = _until(lambda: _note(out).exists() or out.exists(), process) - start
        assert process.wait() == 0, process.communicate()
        return cls(model, direction, source, result(out), begun, publishing, time.monotonic() - start)


def run(model: Path, direction: Path, out: Path, *more: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`abliterate edit` as a process of its own."""
    command = [*prefix, sys.executable, "-m", "abliterate", "edit", str(model), "-d", str(direction), "-o", str(out)]
    return subprocess.Popen(
        [*command, *more], env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status, and what it said of errors."""
    message = process.communicate()[1]
    return process.returncode, message


def _until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> float:
    """The time at which something holds, or the process has ended."""
    while not holds() and process.poll() is None:
        time.sleep(0.0005)
    return time.monotonic()


def _note(out: Path) -> Path:
    """The file that an edit writes when all weights are on disk."""
    return out.with_name(f"{out.name}.partial") / "abliteration" / "undo.json"


def clear_error(status: int, message: str, *expected: int) -> tuple[bool, str]:
    """The check that a run ended by one of the exit codes, with a message and no traceback."""
    fine = status in expected and message.count("error: ") == 1 and "Traceback" not in message
    return fine, f"ended with {status}, expected {expected} and a message"


def kill(edit: Edit, row: Row, folder: Path, fraction: float, publishing: bool) -> None:
    """Kill an edit at one moment, look at what is there, resume it."""
    out = folder / "out"
    process = run(edit.model, edit.direction, out)
    if publishing:
        _until(lambda: _note(out).exists() or out.exists(), process)
        time.sleep(fraction * (edit.ended - edit.publishing))
    else:
        time.sleep(fraction * edit.ended)
    process.send_signal(signal.SIGKILL)
    finish(process)
    published, left = out.exists(), out.with_name("out.partial").exists()
    half = published and not edit.expected.items() <= result(out).items()
    status, message = finish(run(edit.model, edit.direction, out, "--resume"))
    row.end(
        "OUT published" if published else "OUT.partial left" if left else "nothing left",
        (not half, "OUT is no whole result"),
        (status == (2 if published else 0), f"resuming ended with {status}"),
        (edit.expected.items() <= result(out).items(), "the result is another one"),
        (published or result(out) == edit.expected, "files were left in the result"),
        (not out.with_name("out.partial").exists(), "OUT.partial is left"),
        (contents(edit.model) == edit.source, "the source was written to"),
        message=message if status != (2 if published else 0) else "",
    )


def kill_undo(edit: Edit, row: Row, folder: Path, edited: Path, fraction: float) -> None:
    """Kill an undo at one moment, and start it again."""
    out = folder / "base"
    command = [sys.executable, "-m", "abliterate", "undo", str(edited), "-o", str(out)]
    process = subprocess.Popen(command, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(fraction * edit.ended)
    process.send_signal(signal.SIGKILL)
    finish(process)
    published = out.exists()
    again = subprocess.run(command, check=False, env=_ENVIRONMENT, capture_output=True, text=True)
    row.end(
        "OUT published" if published else "nothing published",
        (again.returncode == (2 if published else 0), f"starting again ended with {again.returncode}"),
        (edit.source.items() <= contents(out).items(), "the result is not the base"),
        message=again.stderr if again.returncode != (2 if published else 0) else "",
    )


def fill_disk(edit: Edit, row: Row, folder: Path, fraction: float) -> None:
    """Another program takes what is left of the disk at one moment; then it gives it back, and the edit goes on."""
    with mounted(folder / "disk", f"size={int(1.12 * _size(edit.model))}") as disk:
        out = disk / "out"
        process = run(edit.model, edit.direction, out)
        _until(out.with_name("out.partial").exists, process)
        time.sleep(fraction * (edit.ended - edit.begun))
        with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as other:
            while other.write(bytes(1 << 16)):
                pass
        status, message = finish(process)
        published = out.exists()
        checks = [
            (status == 0 or clear_error(status, message, 6)[0], f"ended with {status}"),
            (published == (status == 0), "OUT is there although it failed"),
        ]
        (disk / "other").unlink()
        again, words = finish(run(edit.model, edit.direction, out, "--resume")) if status else (0, "")
        checks += [(again == 0, f"resuming ended with {again}: {words}"), (result(out) == edit.expected, "other bytes")]
        row.end(f"exit {status}", *checks, message=message)


def change_source(how: str, edit: Edit, row: Row, folder: Path, fraction: float, seed: int) -> None:
    """A file of the model shrinks, goes, is replaced or rewritten in place while the edit reads."""
    model, out, rng = folder / "model", folder / "out", random.Random(seed)
    shutil.copytree(edit.model, model)
    shard = model / rng.choice([name for name in edit.source if name.endswith(".safetensors")])
    size = shard.stat().st_size
    process = run(model, edit.direction, out)
    _until(out.with_name("out.partial").exists, process)
    time.sleep(fraction * (edit.ended - edit.begun))
    if how == "shrinks":
        os.truncate(shard, size // 2)
    elif how == "is deleted":
        shard.unlink()
    elif how == "is replaced":
        (folder / "new").write_bytes(shard.read_bytes()[: size // 2] + rng.randbytes(size - size // 2))
        (folder / "new").replace(shard)
    else:
        with shard.open("r+b") as file:
            file.seek(size // 2)
            file.write(rng.randbytes(1 << 16))
    status, message = finish(process)
    checks = [
        (status == 0 or clear_error(status, message, 3, 6, 7)[0], f"ended with {status}"),
        (out.exists() == (status == 0), "OUT is there although it failed"),
    ]
    if status:  # the model is whole again
        shutil.copyfile(edit.model / shard.name, shard)
        again, words = finish(run(model, edit.direction, out, "--resume"))
        checks.append((again == 0, f"resuming ended with {again}: {words}"))
    row.end(f"exit {status}", *checks, (result(out) == edit.expected, "the result is another one"), message=message)


def read_only(edit: Edit, row: Row, folder: Path) -> None:
    """OUT in a folder that the user may not write to."""
    place = folder / "closed"
    place.mkdir()
    place.chmod(0o555)
    # Root may write anywhere, unless it gives up its capabilities.
    prefix = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    status, message = finish(run(edit.model, edit.direction, place / "out", prefix=prefix))
    row.end(f"exit {status}", clear_error(status, message, 6), (not any(place.iterdir()), "files"), message=message)


def read_only_mount(edit: Edit, row: Row, folder: Path) -> None:
    """OUT on a file system that is mounted read-only."""
    with mounted(folder / "disk", "ro") as disk:
        status, message = finish(run(edit.model, edit.direction, disk / "out"))
        row.end(f"exit {status}", clear_error(status, message, 6), message=message)


def hub_cache(edit: Edit, row: Row, folder: Path) -> None:
    """The model as the hub's cache holds it: a snapshot of links to blobs."""
    blobs, snapshot = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for name, digest in edit.source.items():
        shutil.copyfile(edit.model / name, blobs / digest)
        (snapshot / name).symlink_to(Path("../../blobs") / digest)
    status, message = finish(run(snapshot, edit.direction, folder / "out"))
    out = folder / "out"
    row.end(
        f"exit {status}",
        (status == 0 and result(out) == edit.expected, "the result is another one"),
        (not any(p.is_symlink() for p in out.rglob("*")), "links in the result"),
        (contents(snapshot) == edit.source, "the source was written to"),
        message=message,
    )


def two_at_once(edit: Edit, row: Row, folder: Path, fraction: float) -> None:
    """Two edits into one OUT, the second a little later."""
    out = folder / "out"
    first = run(edit.model, edit.direction, out)
    time.sleep(fraction * fraction * edit.ended)
    second = run(edit.model, edit.direction, out)
    ends = sorted([finish(first), finish(second)])
    loser = ends[1]
    row.end(
        f"exits {ends[0][0]} and {loser[0]}",
        (ends[0][0] == 0, "none succeeded"),
        clear_error(*loser, 2),
        (result(out) == edit.expected, "the result is another one"),
        (not out.with_name("out.partial").exists(), "OUT.partial is left"),
        message=loser[1],
    )


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory; for root only."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "tmpfs", folder]
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
            return False
        return subprocess.run(["umount", folder], check=False).returncode == 0


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


Job = Callable[[Row, Path], None]


def cases(edit: Edit, edited: Path, kills: int, times: int, rng: random.Random) -> Iterator[tuple[str, list[Job]]]:
    """Every case with its runs."""
    moments = [(rng.uniform(0, 1.02), i < _PUBLISHING * kills) for i in range(kills)]
    yield "kill -9 of edit", [partial(_with, kill, edit, fraction=f, publishing=p) for f, p in moments]
    fractions = [rng.uniform(0, 0.9) for _ in range(times)]
    yield "kill -9 of undo", [partial(_with, kill_undo, edit, edited=edited, fraction=f) for f in fractions]
    if can_mount():
        yield "the disk fills up", [partial(_with, fill_disk, edit, fraction=f) for f in fractions]
        yield "OUT on a read-only mount", [partial(_with, read_only_mount, edit)]
    else:
        print("skipped, as they need root: a disk that fills up, OUT on a read-only mount", file=sys.stderr)
    for how in ("shrinks", "is deleted", "is replaced", "is rewritten in place"):
        jobs: list[Job] = [
            partial(_with, partial(change_source, how), edit, fraction=f, seed=i) for i, f in enumerate(fractions)
        ]
        yield f"a source file {how}", jobs
    yield "OUT in a closed folder", [partial(_with, read_only, edit)]
    yield "a hub cache of links", [partial(_with, hub_cache, edit)]
    yield "two edits at once", [partial(_with, two_at_once, edit, fraction=f) for f in fractions * 2]


def _with(case: Callable[..., None], edit: Edit, row: Row, folder: Path, **more: object) -> None:
    case(edit, row, folder, **more)


def measure(kills: int, times: int, seed: int, jobs: int, root: Path, shape: Shape) -> list[Row]:
    """Run everything below `root`."""
    model = generate(root / "model", shape)
    edit = Edit.measure(model, root / "direction.npy", root)
    print(f"one edit: {edit.ended:.2f} s, of which {edit.begun:.2f} s before OUT.partial", file=sys.stderr)
    rows = []
    with ThreadPoolExecutor(jobs) as pool:
        for name, runs in cases(edit, root / "out", kills, times, random.Random(seed)):
            row, start = Row(name), time.monotonic()
            list(pool.map(partial(_in_folder, root, row), runs))
            print(f"{name}: {time.monotonic() - start:.0f} s, {len(row.wrong)} wrong", file=sys.stderr)
            rows.append(row)
    return rows


def _in_folder(root: Path, row: Row, job: Job) -> None:
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        job(row, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(rows: list[Row]) -> str:
    """The rows in Markdown, one message of each below."""
    lines = ["| case | n | how it ended | lost or wrong |", "|---|---|---|---|"]
    for row in rows:
        ends = ", ".join(f"{how}: {n}" for how, n in row.ends.most_common())
        lines.append(f"| {row.case} | {row.ends.total()} | {ends} | {len(row.wrong)} |")
    return "\n".join([*lines, "", *(f"- {row.case}: `{row.message}`" for row in rows if row.message)])


def main() -> None:
    """Measure, print, and fail where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 200), ("times", 10), ("seed", 0), ("jobs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; by default a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        rows = measure(given.kills, given.times, given.seed, given.jobs, Path(root), Shape())
        print(re.sub(rf"{root}(/tmp\w+)?", "", table(rows)))
    if wrong := [f"{row.case}: {what}" for row in rows for what in row.wrong]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
