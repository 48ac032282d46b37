"""Lay words and tables out in the width of a console: names stay in one piece, figures are never cut.

Knows widths and rich; never knows what is shown.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

#: What stays on one line: in prose a word, so that a path can be copied; in a table also parts of a name.
_WORDS, _PARTS = re.compile(r"\s*\S+"), re.compile(r"\s*[^\s._/-]*[._/-]*")
#: A figure, or its interval.
_FIGURES = re.compile(r"\s*(?:\[[^]]*\]|[^\s[]+)")


def say(console: Console, text: str | Text, *, style: str = "", indent: int = 0) -> None:
    """Print prose broken between words, all lines but the first indented; a word that fits no line stays whole."""
    lines: list[Text] = []
    for line in (Text(text) if isinstance(text, str) else text).split("\n", allow_blank=True):
        lines += _broken(line, console.width, _WORDS, indent)
    console.print(Text("\n" + " " * indent).join(lines), style=style, soft_wrap=True)


def print_table(
    console: Console, titles: Sequence[str], rows: Sequence[Sequence[str | Text]], names: Collection[str]
) -> None:
    """Print a table of one line of titles and `rows`.

    Columns whose titles are in `names` hold words and are set left, all others figures. Where the table would be wider
    than the console the gaps shrink, then names are broken, then figures before their interval; else it is wider.
    """
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in (titles, *rows)]
    pieces = [_PARTS if title in names else _FIGURES for title in titles]
    widths, gap = _widths(console.width, titles, cells, names, pieces)
    for i, row in enumerate(cells):
        broken = [_broken(cell, width, at) for cell, width, at in zip(row, widths, pieces, strict=True)]
        for line in zip_longest(*broken):
            shown = [part or Text() for part in line]
            for title, part, width in zip(titles, shown, widths, strict=True):
                part.align("left" if title in names else "right", width)
            together = Text(" " * gap).join(shown)
            together.rstrip()
            console.print(together, style="" if i else "bold", soft_wrap=True)
        if not i:
            console.print("─" * (sum(widths) + gap * (len(titles) - 1)), soft_wrap=True)


def _widths(
    width: int,
    titles: Sequence[str],
    cells: Sequence[Sequence[Text]],
    names: Collection[str],
    pieces: Sequence[re.Pattern[str]],
) -> tuple[list[int], int]:
    """Widths of all columns, and of the gaps between them, that make a table of at most `width` if any do."""
    columns, gaps = list(zip(*cells, strict=True)), len(titles) - 1
    widths = [max(cell.cell_len for cell in column) for column in columns]
    gap = next((gap for gap in (3, 2) if sum(widths) + gap * gaps <= width), 1)
    least = [
        max(cell_len(piece.strip()) for cell in column for piece in at.findall(cell.plain) or [""])
        for column, at in zip(columns, pieces, strict=True)
    ]
    while sum(widths) + gap * gaps > width:
        wide = [i for i, (now, end) in enumerate(zip(widths, least, strict=True)) if now > end]
        if not wide:
            break
        widest = max([i for i in wide if titles[i] in names] or wide, key=lambda i: widths[i])
        widths[widest] -= 1
    return widths, gap


def _broken(line: Text, width: int, pieces: re.Pattern[str], indent: int = 0) -> list[Text]:
    """A line in lines of a width, all but the first narrower by `indent`; a piece that fits none stays where it is."""
    start, breaks = 0, list[int]()
    for piece in pieces.finditer(line.plain):
        room = width - (indent if breaks else 0)
        own = piece[0].lstrip()
        if cell_len(line.plain[start : piece.end()]) > room >= cell_len(own) and piece.start() > start:
            start = piece.end() - len(own)
            breaks.append(start)
    lines = list(line.divide(breaks))
    for part in lines:
        part.rstrip()
    return lines
