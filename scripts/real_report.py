"""Run MODEL from start to end and write docs/report.md: every section of the run's page as a picture and in numbers.

uv run python scripts/real_report.py MODEL OUT [--max-rows 16]

A finished OUT is not run again: only its page and docs/report.md are written anew. Needs chromium; takes about five
minutes and 4 GB for a model of 0.5B.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from abliterate.report.command import command  # noqa: E402
from abliterate.report.page import Section, environment_of, lead, prompt_rows, sections  # noqa: E402
from abliterate.report.panels import Panel  # noqa: E402
from abliterate.report.record import RunRecord  # noqa: E402
from tests.browser import Page, browser  # noqa: E402

TARGET, PICTURES = ROOT / "docs" / "report.md", ROOT / "docs" / "report"
#: Widths in pixels: of the pictures, and of a phone.
WIDTH, PHONE = 1000, 375
#: Pixels left around what is pictured.
MARGIN = 16
_BOX = "(e => {{ const b = e.getBoundingClientRect(); return [b.x, b.y + scrollY, b.width, b.height] }})({})"


def picture(page: Page, what: str, target: Path) -> None:
    """Save what a JavaScript expression names."""
    x, y, width, height = page.value(_BOX.format(what))
    left = min(x, MARGIN)
    clip = {"x": x - left, "y": y, "width": width + 2 * left, "height": height + MARGIN, "scale": 1}
    shot = page.call("Page.captureScreenshot", format="webp", quality=75, clip=clip, captureBeyondViewport=True)
    target.write_bytes(base64.b64decode(shot["data"]))


def take_pictures(html: Path, names: Sequence[str]) -> None:
    """Each section by day, the first screen by night and on a phone."""
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("*.webp"):
        old.unlink()
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as page:
        page.open(html, WIDTH)
        picture(page, "document.querySelector('header')", PICTURES / "top.webp")
        for name in names:
            picture(page, f"document.getElementById('{name}')", PICTURES / f"{name}.webp")
        page.open(html, WIDTH, prefers_color_scheme="dark")
        picture(page, "document.getElementById('result')", PICTURES / "dark.webp")
        page.open(html, PHONE)
        picture(page, "document.getElementById('result')", PICTURES / "phone.webp")
        if page.console:
            sys.exit(f"{html}: the browser's console says {page.console[0]}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown."""
    for row in (columns, ["---"] * len(columns), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def told(section: Section, max_rows: int) -> Iterator[str]:
    """A section: its picture, then what each panel shows, and its numbers where they are few."""
    yield from (f"## {section.title}", "", f"![{section.title}](report/{section.name}.webp)", "")
    for panel in section.panels:
        yield from numbers(panel, max_rows)


def numbers(panel: Panel, max_rows: int) -> Iterator[str]:
    """What one panel shows."""
    yield from (f"**{panel.finding}**", "", panel.how, "")
    if len(panel.rows) <= max_rows:
        yield from (*table(panel.columns, panel.rows), "")
    else:
        yield from (f"({len(panel.rows)} rows of numbers, in the page under this chart.)", "")


def report(record: RunRecord, shown: Sequence[Section], max_rows: int) -> str:
    """The whole of docs/report.md."""
    repeated = command({**record.given, "model": "MODEL", "output": "OUT"})
    lines = [
        "# The report of a real run", "",
        "Every section of the page that `abliterate run` leaves in `OUT/abliteration/report.html`, as a picture and in",
        "numbers. Written by one command, which also makes the run; do not edit:", "",
        "```sh", "uv run python scripts/real_report.py MODEL OUT", "```", "",
        lead(record), "", f"It is what `{repeated}` leaves.", "",
        "![The top of the page](report/top.webp)", "",
    ]  # fmt: skip
    for section in shown:
        lines += told(section, max_rows)
    lines += ["## By night and on a phone", "", "![dark](report/dark.webp)", "", "![on a phone](report/phone.webp)", ""]
    lines += ["## With what it was made", "", *table(("what", "value"), environment_of(record)), ""]
    lines += ["Prompts:", "", *table(("set", "prompts", "sha256"), prompt_rows(record))]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-rows", type=int, default=16)
    args = parser.parse_args()
    if not args.out.is_dir():
        subprocess.run([sys.executable, "-m", "abliterate", "run", args.model, "-o", str(args.out)], check=True)
    (args.out / "abliteration" / "report.html").unlink()  # it may be of an earlier version
    subprocess.run([sys.executable, "-m", "abliterate", "report", str(args.out)], check=True, stdout=subprocess.DEVNULL)
    record = RunRecord.load(args.out / "abliteration" / "run.json")
    shown = [s for s in sections(record, unfinished=False) if s.panels]
    take_pictures((args.out / "abliteration" / "report.html").resolve(), [s.name for s in shown])
    TARGET.write_text(report(record, shown, args.max_rows), encoding="utf-8")
    print(json.dumps({"report": str(TARGET), "pictures": sorted(p.name for p in PICTURES.glob("*.webp"))}))


if __name__ == "__main__":
    main()
