"""Write docs/commands.md from what `--help` prints, or with --check say whether it is up to date.

uv run python scripts/command_reference.py [--check]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from generated import write_or_check

TARGET = Path(__file__).parent.parent / "docs" / "commands.md"
VERBS = (
    "", "run", "collect", "select", "edit", "inspect", "undo", "compare", "eval", "bench", "resist", "report", "export",
)  # fmt: skip
INTRO = """# Commands

What `--help` says, at 80 columns. Written by `scripts/command_reference.py`; do not edit.
"""


def help_text(verb: str) -> str:
    """The help of one verb as it appears on a plain terminal."""
    command = [sys.executable, "-m", "abliterate", *verb.split(), "--help"]
    plain = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    lines = [line.rstrip() for line in done.stdout.replace("python -m abliterate", "abliterate").splitlines()]
    return "\n".join(lines).strip()


def reference() -> str:
    """The whole page."""
    parts = [f"## abliterate {verb}".rstrip() + f"\n\n```text\n{help_text(verb)}\n```\n" for verb in VERBS]
    return "\n".join([INTRO, *parts])


def main() -> None:
    """Write or check."""
    write_or_check(TARGET, reference())


if __name__ == "__main__":
    main()
