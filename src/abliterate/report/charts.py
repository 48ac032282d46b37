"""Charts as inline SVG: numbers in, markup out.

Owns how each kind of chart looks; never knows what a number means, nor any file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from markupsafe import Markup

from abliterate.report.svg import Scale, below, left, mark, number, percent, plain, plot, tag

#: A value with the bounds of its interval; None where it was not taken.
Bounds = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Row:
    """A measure before and after, its scale, and how its values are written."""

    name: str
    base: Bounds
    edited: Bounds
    scale: Scale
    said: str
    form: str = "{:.3g}"
    unit: str = ""

    def written(self, value: float) -> str:
        """The value in words."""
        return self.form.format(value).replace("-", "−") + self.unit


def intervals(rows: Sequence[Row], label: str, *, compact: bool = False) -> Markup:
    """For each row the base (open circle) and the edited model (filled diamond), each with its interval.

    `compact` rows share one scale, whose ends stand below the last.
    """
    inside, step = [], 48 if compact else 70
    for i, row in enumerate(rows):
        top = i * step
        inside.append(tag("text", row.name, x=0, y=top + 12, class_="name"))
        inside.append(tag("text", row.said, x="100%", y=top + 12, class_="end strong"))
        inside.append(tag("rect", x=0, y=top + 19, width="100%", height=26, rx=3, class_="track"))
        for bounds, shape, kind, y in ((row.base, "circle", "base", 26), (row.edited, "diamond", "edited", 38)):
            inside += _interval(row, bounds, shape, kind, top + y)
        for end, x, anchor in (
            () if compact and row is not rows[-1] else ((row.scale.low, 0, ""), (row.scale.high, "100%", "end"))
        ):
            inside.append(tag("text", plain(end) + row.unit, x=x, y=top + 57, class_=f"tick {anchor}"))
    return plot(label, max(1, len(rows)) * step + (14 if compact else 0), *inside)


def _interval(row: Row, bounds: Bounds, shape: str, kind: str, y: int) -> list[Markup]:
    value, low, high = bounds
    if value is None or not math.isfinite(value):
        return []
    said, whisker = f"{row.name}, {kind}: {row.written(value)}", []
    if low is not None and high is not None:
        said += f" [{row.written(low)}, {row.written(high)}]"
        ends = {"x1": percent(row.scale.share(low)), "x2": percent(row.scale.share(high))}
        whisker = [tag("line", **ends, y1=y, y2=y, class_=f"whisker {kind}")]
    return [*whisker, mark(shape, kind, percent(row.scale.share(value)), str(y), said)]


@dataclass(frozen=True)
class Cells:
    """A table of numbers to be drawn as cells; None where there is none. Columns are named along the bottom."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str
    row_word: str = ""
    column_word: str = "layer"
    chosen: tuple[int, int] | None = None


def heat_map(cells: Cells, label: str) -> Markup:
    """Cells the darker the larger their value, the chosen one framed, with a key of the scale."""
    known = [v for row in cells.values for v in row if v is not None and math.isfinite(v)]
    low, high = min([0.0, *known]), max([0.0, *known])  # from zero, so that small differences look small
    n, top, size = max(1, len(cells.columns)), 18 if cells.chosen else 0, 26
    inside = []
    for i, row in enumerate(cells.values):
        inside.append(tag("text", cells.rows[i], x=-8, y=top + i * size + 17, class_="tick end"))
        for j, value in enumerate(row):
            place = {"x": percent(j / n), "y": top + i * size, "width": percent(1 / n), "height": size}
            where = f"{cells.row_word} {cells.rows[i]}, {cells.column_word} {cells.columns[j]}".strip()
            if value is None or not math.isfinite(value):
                inside.append(tag("rect", tag("title", f"{where}: none"), **place, class_="cell gap"))
                continue
            shade = 0.06 + 0.94 * ((value - low) / (high - low) if high > low else 1.0)
            said = f"{where}: {number(value)} {cells.unit}".strip()
            inside.append(tag("rect", tag("title", said), **place, class_="cell", fill_opacity=f"{shade:.3f}"))
    inside += _frame(cells, n, top, size)
    bottom = top + len(cells.rows) * size
    inside += below(cells.columns, n, bottom + 16, 0.5 / n)
    drawn = plot(label, bottom + 22, *inside, left=14 + 7 * max(map(len, cells.rows), default=0))
    ends = [number(v) for v in (low, high)]
    return drawn + (_shades(ends, cells.unit) if known else Markup(""))


def _frame(cells: Cells, n: int, top: int, size: int) -> list[Markup]:
    if cells.chosen is None:
        return []
    i, j = cells.chosen
    place = {"x": percent(j / n), "y": top + i * size, "width": percent(1 / n), "height": size}
    side = "end" if j > n / 2 else ""
    said = tag("text", "▾ chosen" if not side else "chosen ▾", x=percent((j + (1 if side else 0)) / n), y=12)
    word = (
        [tag("text", cells.row_word, x=-14 - 7 * max(map(len, cells.rows)), y=12, class_="tick")]
        if j > 0.15 * n
        else []
    )
    return [*word, tag("rect", **place, class_="frame"), tag("g", said, class_=f"name {side}")]


def _shades(ends: list[str], unit: str) -> Markup:
    steps = [
        tag(
            "rect",
            x=percent(i / 6),
            y=2,
            width=percent(1 / 6),
            height=10,
            class_="cell",
            fill_opacity=0.06 + 0.188 * i,
        )
        for i in range(6)
    ]
    return tag(
        "p", ends[0], tag("svg", *steps, width=96, height=14, aria_hidden="true"), ends[1], " ", unit, class_="key"
    )


@dataclass(frozen=True)
class Band:
    """A line with a band around it: means and spreads, one for each column."""

    name: str
    kind: str
    means: Sequence[float]
    spreads: Sequence[float]
    dashed: bool = False


def bands(series: Sequence[Band], label: str, chosen: int | None = None, height: int = 240) -> Markup:
    """Means with bands of one spread around them, over columns counted from 0."""
    edges = [m + sign * s for b in series for m, s in zip(b.means, b.spreads, strict=True) for sign in (-1, 1)]
    scale, n = Scale.over(edges, tight=True), max((len(b.means) for b in series), default=0)
    inside = left(scale, height)
    if chosen is not None and n > 1:
        x = percent(chosen / (n - 1))
        inside.append(tag("line", x1=x, x2=x, y1=0, y2=height, class_="chosen"))
        side = "end" if chosen > n / 2 else ""
        inside.append(tag("text", "chosen", x=x, dx=-5 if side else 5, y=10, class_=f"name {side}"))
    drawn = [path for b in series for path in _band(b, scale, n)]
    inside.append(tag("svg", *drawn, viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height=height))
    for b in series:
        for j, (m, s) in enumerate(zip(b.means, b.spreads, strict=True)):
            if math.isfinite(m):
                x, y = percent(j / (n - 1) if n > 1 else 0.5), f"{height * (1 - scale.share(m)):.1f}"
                said = f"{b.name}, layer {j}: {number(m)} ± {number(s)}"
                inside.append(tag("circle", tag("title", said), cx=x, cy=y, r=2.5, class_=f"dot {b.kind}"))
    names, span = [str(j) for j in range(n)], max(1, n - 1)
    inside += below(names, span, height + 17) if n > 1 else below(names, 1, height + 17, 0.5)
    return plot(label, height + 24, *inside, left=48)


def _band(b: Band, scale: Scale, n: int) -> list[Markup]:
    """Its area and its line, broken where values are not finite."""
    found = []
    points = [
        (1000 * (j / (n - 1) if n > 1 else 0.5), m, s) for j, (m, s) in enumerate(zip(b.means, b.spreads, strict=True))
    ]
    for whole, run in groupby(points, key=lambda p: math.isfinite(p[1]) and math.isfinite(p[2])):
        if not whole:
            continue
        piece = list(run)

        def at(x: float, value: float) -> str:
            return f"{x:.1f},{1000 * (1 - scale.share(value)):.1f}"

        around = [at(x, m + s) for x, m, s in piece] + [at(x, m - s) for x, m, s in reversed(piece)]
        found.append(tag("path", d="M" + "L".join(around) + "z", class_=f"area {b.kind}"))
        through = "M" + "L".join(at(x, m) for x, m, _ in piece)
        found.append(tag("path", d=through, class_=f"line {b.kind}{' dashed' if b.dashed else ''}"))
    return found


@dataclass(frozen=True)
class Dots:
    """Points `(column, value, what they are)` of one kind."""

    name: str
    shape: str
    kind: str
    points: Sequence[tuple[int, float, str]] = field(default_factory=list)


def dots(series: Sequence[Dots], columns: Sequence[str], label: str, height: int = 180) -> Markup:
    """Points over columns, on a logarithmic scale; zeros lie on the bottom line."""
    scale = Scale.over([value for s in series for _, value, _ in s.points], log=True)
    inside, n = left(scale, height), max(1, len(columns))
    for i, s in enumerate(series):
        for column, value, said in s.points:
            if math.isfinite(value):
                x, y = percent((column + (i + 1) / (len(series) + 1)) / n), f"{height * (1 - scale.share(value)):.1f}"
                inside.append(mark(s.shape, s.kind, x, y, said))
    inside += below(columns, n, height + 19, 0.5 / n)
    return plot(label, height + 26, *inside, left=48)


@dataclass(frozen=True)
class Spot:
    """A point with the interval of its height, what it is called beside it, and what it is."""

    x: float
    y: float
    low: float
    high: float
    name: str
    said: str
    shape: str = "circle"
    kind: str = "ink"


def scatter(spots: Sequence[Spot], label: str, across: str, form: str, height: int = 220) -> Markup:
    """Points over two scales from nought, each with a whisker; `across` says what lies along the bottom, `form` writes
    heights.
    """
    wide, up = Scale.over([s.x for s in spots], zero=True), Scale.over([s.high for s in spots], zero=True)
    inside = left(up, height, form)
    inside.append(tag("line", x1=0, x2="100%", y1=height, y2=height, class_="axis"))
    for s in spots:
        x = percent(wide.share(s.x))
        low, y, high = (f"{height * (1 - up.share(v)):.1f}" for v in (s.low, s.y, s.high))
        inside.append(tag("line", x1=x, x2=x, y1=low, y2=high, class_=f"whisker {s.kind}"))
        inside.append(mark(s.shape, s.kind, x, y, s.said))
        side = "end" if wide.share(s.x) > 0.7 else ""
        inside.append(tag("text", s.name, x=x, dx=-9 if side else 9, y=y, dy=-4, class_=f"name {side}"))
    for tick in wide.ticks:
        inside.append(tag("text", plain(tick), x=percent(wide.share(tick)), y=height + 17, class_="tick middle"))
    inside.append(tag("text", across, x="100%", y=height + 34, class_="tick end"))
    return plot(label, height + 40, *inside, left=48)


def histogram(values: Sequence[float], scale: Scale, label: str, marks: Sequence[tuple[str, float]] = ()) -> Markup:
    """Counts in bins of equal width on the given scale, with values marked by name above them."""
    known, bins, height = [v for v in values if math.isfinite(v)], 24, 110
    marks = [(name, value) for name, value in marks if math.isfinite(value)]
    counts = [0] * bins
    for value in known:
        counts[min(bins - 1, int(scale.share(value) * bins))] += 1
    up = Scale.over([0, *counts], zero=True)
    top, inside = 16 * len(marks), list[Markup]()
    for i, count in enumerate(counts):
        size = height * up.share(count)
        if count:
            place = {"x": percent((i + 0.06) / bins), "width": percent(0.88 / bins)}
            bar = {"y": f"{top + height - size:.1f}", "height": f"{size:.1f}"}
            inside.append(tag("rect", tag("title", f"{count} prompts"), **place, **bar, class_="bar"))
    for i, (name, value) in enumerate(marks):
        share = scale.share(value)
        side = "end" if share > 0.6 else ""
        x, y = percent(share), 16 * i + 12
        inside.append(tag("line", x1=x, x2=x, y1=y - 10, y2=top + height, class_="chosen"))
        inside.append(tag("text", f"{name} {value:.3g}", x=x, dx=-5 if side else 5, y=y, class_=f"name {side}"))
    inside.append(tag("line", x1=0, x2="100%", y1=top + height, y2=top + height, class_="axis"))
    inside.append(tag("text", str(max(counts, default=0)), x=-8, y=top + height * (1 - up.share(max(counts))) + 4,
                      class_="tick end"))  # fmt: skip
    for tick in scale.ticks:
        inside.append(tag("text", plain(tick), x=percent(scale.share(tick)), y=top + height + 17, class_="tick middle"))
    return plot(label, top + height + 24, *inside, left=28)
