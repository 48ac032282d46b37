"""Where things are printed: results to stdout, everything else to stderr; bars only on a terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from abliterate.envelope import json_text
from abliterate.report.layout import say

#: Seconds.
PATIENCE = 30.0
#: What shells expect of a program that an interrupt ended.
INTERRUPTED = 130


def stdout() -> Console:
    """The console that results go to."""
    return Console()


def print_json(value: Mapping[str, Any]) -> None:
    """Print a result as JSON, unwrapped and uncoloured."""
    print(json_text(value, escaped=True))


def tell(message: str, kind: str = "") -> None:
    """A message to standard error, behind its kind: on a terminal in lines of its width, else in one line."""
    console = Console(stderr=True)
    if console.is_terminal:
        say(console, Text.assemble((kind, "bold red"), message), indent=len(kind))
    else:
        print(f"{kind}{' '.join(message.splitlines())}", file=sys.stderr)


@contextmanager
def progress_bars(
    interrupted: str = "interrupted; nothing was written",
) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Give `steps(title, total) -> advance`: one bar for each step on stderr.

    Where that is no terminal, a step that begins after `PATIENCE` is told in a line: a log of what takes long shows
    that it goes on, and what is quick stays silent.

    An interrupt from the keyboard ends the program with the message `interrupted` and no traceback. What libraries
    print meanwhile goes to stderr: stdout is for the result.
    """
    _quiet_libraries()
    console, begun = Console(stderr=True), time.monotonic()
    columns = (
        TextColumn("{task.description:<22}"), BarColumn(bar_width=18), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    logger, notes = logging.getLogger("abliterate"), _Notes(console)
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    try:
        with (
            redirect_stdout(sys.stderr),
            Progress(*columns, console=console, disable=not console.is_terminal) as bars,
        ):

            def steps(title: str, total: int) -> Callable[[int], None]:
                if not console.is_terminal and (passed := time.monotonic() - begun) >= PATIENCE:
                    print(f"{passed:.0f} s: {title}", file=sys.stderr, flush=True)
                task = bars.add_task(title, total=total)
                return lambda done: bars.advance(task, done)

            yield steps
    except KeyboardInterrupt:
        tell(interrupted)
        raise SystemExit(INTERRUPTED) from None
    finally:
        logger.removeHandler(notes)


class _Notes(logging.Handler):
    """What the steps have to say, above the progress bars; warnings also where nobody watches."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one note."""
        if self._console.is_terminal:
            say(self._console, record.getMessage())
        elif record.levelno > logging.INFO:
            tell(record.getMessage())


def _quiet_libraries() -> None:
    """Ask the libraries below to keep their advice to themselves, before any of them is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
