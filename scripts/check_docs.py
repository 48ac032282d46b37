"""Check the documentation against the tree: links and paths exist, and the README's map names every module.

uv run python scripts/check_docs.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


def broken_links() -> list[str]:
    """Relative links that lead nowhere."""
    return [
        f"{page.relative_to(ROOT)}: link to {target}, which does not exist"
        for page in PAGES
        for target in _LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]


def unmapped_modules() -> list[str]:
    """Modules that the README's map of the tree does not name, and names in it that are no module."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"[│├└─\s/]([a-z_]+\.py)\b", text))
    modules = {p.name for p in (ROOT / "src" / "abliterate").rglob("*.py") if not p.name.startswith("__")}
    return [f"README.md: the map lacks {name}" for name in sorted(modules - mapped)] + [
        f"README.md: the map names {name}, which does not exist" for name in sorted(mapped - modules)
    ]


def main() -> None:
    """Print what is wrong and fail, or say that all is well."""
    problems = broken_links() + unmapped_modules()
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(PAGES)} pages agree with the tree")


if __name__ == "__main__":
    main()
