"""Write a page that a script makes, or with --check say whether it is up to date. For the scripts beside it."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(target: Path, page: str) -> None:
    """Write `page`, or with --check exit with the command that would."""
    if "--check" not in sys.argv:
        target.write_text(page, encoding="utf-8")
    elif not target.is_file() or target.read_text(encoding="utf-8") != page:
        sys.exit(f"{target.name} is out of date: run 'uv run python scripts/{Path(sys.argv[0]).name}'")
    else:
        print(f"{target.name} is up to date")
