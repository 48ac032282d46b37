"""What stands in a terminal: names stay whole, figures are never cut, and lines fit where they can."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from abliterate import at_rest, inspection
from abliterate.report.comparison import print_comparison
from abliterate.report.layout import print_table, say
from abliterate.report.record import RunRecord
from abliterate.report.table import print_inspection, print_run
from tests.conftest import Refusing

WORDS = st.text(st.sampled_from("ab1/-_.[]:=é模"), min_size=1, max_size=30)
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def lines_of(width: int, show: object, *args: object, **how: object) -> list[str]:
    """What something prints on a plain console of a width."""
    stream = io.StringIO()
    show(Console(file=stream, width=width), *args, **how)  # type: ignore[operator]
    return stream.getvalue().splitlines()


@given(st.lists(WORDS, min_size=1, max_size=20), st.integers(20, 90), st.integers(0, 8))
@example(["error:", "a" * 30, "b"], 20, 7)
def test_prose_is_broken_between_words_alone(words: list[str], width: int, indent: int) -> None:
    lines = lines_of(width, say, " ".join(words), indent=indent)
    assert " ".join(lines).split() == words
    assert all(line.startswith(" " * indent) for line in lines[1:])
    for line in lines:
        assert cell_len(line) <= width or max(map(cell_len, line.split())) > width - indent


@given(st.lists(st.tuples(WORDS, st.floats(0, 1e6), WORDS), min_size=1, max_size=5), st.integers(30, 90))
def test_figures_of_a_table_are_never_cut(rows: list[tuple[str, float, str]], width: int) -> None:
    shown = [(name, f"{value:.1f} [{value:.2f}, {value:.2f}]", Text(behind)) for name, value, behind in rows]
    lines = lines_of(width, print_table, ("name", "figure", "behind"), shown, {"name", "behind"})
    whole = "".join(lines).replace(" ", "")
    for name, value, behind in rows:
        assert any(f"{value:.1f}" in line for line in lines)
        assert any(f"[{value:.2f}, {value:.2f}]" in line for line in lines)
        assert all(whole.count(c) >= (name + behind).count(c) for c in set(name + behind))
    # Parts of these names have 30 cells at most, figures 21 or 9.
    assert max(map(cell_len, lines)) <= max(width, 30 + 22 + 30 + 2)


def test_a_table_shrinks_its_gaps_then_breaks_names_then_figures() -> None:
    row = [("model.embed_tokens", "1.25 [1.00, 1.50]", "12")]

    def table(width: int) -> list[str]:
        lines = lines_of(width, print_table, ("name", "value", "n"), row, {"name"})
        assert max(map(len, lines)) <= max(width, 23)
        return lines[2:]

    assert table(43) == ["model.embed_tokens   1.25 [1.00, 1.50]   12"]
    assert table(42) == ["model.embed_tokens  1.25 [1.00, 1.50]  12"]
    assert table(40) == ["model.embed_tokens 1.25 [1.00, 1.50] 12"]
    assert [line.split() for line in table(37)] == [["model.embed_", "1.25", "[1.00,", "1.50]", "12"], ["tokens"]]
    assert [line.split() for line in table(10)] == [["model.", "1.25", "12"], ["embed_", "[1.00,", "1.50]"], ["tokens"]]


@pytest.mark.parametrize("width", [80, 60])
def test_real_results_fit(width: int, refusing: Refusing, finished: tuple[RunRecord, Path]) -> None:
    record, out = finished
    where = "/models/[bold]our-models/with a:key:in/it"
    shown = lines_of(width, print_run, record, where)
    assert max(map(len, shown)) <= width and where in " ".join(shown)
    assert any(line.startswith("refusals") and "100.0%" in line for line in shown)
    compared = at_rest.compare(str(refusing.folder), str(out)).as_dict
    assert max(map(len, lines_of(width, print_comparison, compared))) <= width
    inspected = lines_of(width, print_inspection, vars(inspection.inspect(str(refusing.folder))))
    assert max(map(len, inspected)) <= width and any("64* × 128" in line for line in inspected)
    for line in (*shown, *inspected):
        assert "…" not in line and "\x1b" not in line


def on_a_terminal(width: int, *words: str) -> str:
    """What `abliterate` shows on a terminal of a width, with its colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm-256color"}
    command = [sys.executable, "-m", "abliterate", *words]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=plain):
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # that is how a terminal says that nobody writes to it any more
            while block := os.read(ours, 4096):
                seen += block
    os.close(ours)
    return seen.decode().replace("\r\n", "\n")


def test_an_error_fits_the_terminal_and_leaves_the_path_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "a-folder-that-is-not-there-and-has-a-long-name" / "[red]in-it")
    seen = on_a_terminal(60, "report", path)
    plain = _ESCAPE.sub("", seen)
    assert path in plain and seen != plain
    first, *others = plain.splitlines()
    assert first.startswith("error: ") and others and all(line.startswith("       ") for line in others)
    assert max(len(line) for line in others) <= 60
