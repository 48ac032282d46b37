"""What charts are drawn with: elements, scales, marks, axes.

Owns escaping, round numbers and the shapes of marks; knows no chart. Places along the width are shares of it and text
has the page's size, so that a chart is as legible on a phone as on paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

#: Marks of 9 px around their middle; series are told apart by these before colour.
_SHAPES = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "diamond": "M0,-5.5L5.5,0L0,5.5L-5.5,0z",
    "square": "M-4,-4H4V4H-4z",
    "triangle": "M0,-5L5,4H-5z",
    "cross": "M-4,-4L4,4M-4,4L4,-4",
}
SHAPES = tuple(_SHAPES)
#: What is smaller counts as zero.
_LEAST = 1e-300


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """An element. What is inside and the values of attributes are escaped, unless they are markup themselves."""
    given = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    )
    opening = Markup(name)  # noqa: S704  names are ours
    ending = Markup("").join(i if isinstance(i, Markup) else str(i) for i in inside)
    return Markup("<{0}{1}>{2}</{0}>").format(opening, Markup("").join(given), ending)


@dataclass(frozen=True)
class Scale:
    """From numbers to shares of a length."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float | None], *, zero: bool = False, log: bool = False, tight: bool = False
    ) -> Scale:
        """A scale that holds all finite values, with round ends unless `tight`; of none it is 0 to 1, or one decade."""
        known = [v for v in values if v is not None and math.isfinite(v) and (v > _LEAST or not log)]
        if log:
            first = math.floor(math.log10(min(known, default=1.0)))
            last = math.ceil(math.log10(max(known, default=1.0)))
            return cls(10.0**first, 10.0 ** max(last, first + 1), True)
        low, high = min(known, default=0.0), max(known, default=1.0)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        size = max(abs(low), abs(high))
        if high - low <= max(_LEAST, 1e-12 * size):  # one value: it needs room to stand in
            low, high = (low - size / 2, low + size / 2) if size > _LEAST else (0.0, 1.0)
        if tight:
            return cls(low - 0.03 * (high - low), high + 0.03 * (high - low))
        step = _step((high - low) / 4)
        return cls(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end; what lies outside is put at the end."""
        if self.log:
            span = math.log(self.high) - math.log(self.low)
            return min(1.0, max(0.0, (math.log(value) - math.log(self.low)) / span)) if value > 0 else 0.0
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    @property
    def ticks(self) -> list[float]:
        """Round values from end to end, three to six of them."""
        if self.log:
            low, high = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**e for e in range(low, high + 1, max(1, math.ceil((high - low) / 5)))]
        step = _step((self.high - self.low) / 4)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _step(rough: float) -> float:
    """The round number at or above: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def plain(value: float) -> str:
    """A tick in as few characters as it takes."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def number(value: float) -> str:
    """Three significant digits with a true minus sign."""
    return f"{value:.3g}".replace("-", "−")


def percent(share: float) -> str:
    """A share of a length, as SVG writes it."""
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


def mark(shape: str, kind: str, x: str, y: str, said: str = "") -> Markup:
    """One mark at a place; `said` is shown where a pointer rests on it."""
    title = [tag("title", said)] if said else []
    drawn = tag("path", *title, d=_SHAPES[shape], class_=f"mark {kind}")
    return tag("svg", drawn, x=x, y=y, width=1, height=1, overflow="visible")


def key(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """What the marks mean: shape (or `line`, `dashed`), class and name of each."""
    found = []
    for shape, kind, name in entries:
        if shape in _SHAPES:
            drawn = mark(shape, kind, "50%", "50%")
        else:
            drawn = tag("line", x1=0, x2="100%", y1="50%", y2="50%", class_=f"line {kind} {shape}")
        sample = tag("svg", drawn, width=20, height=14, aria_hidden="true")
        found.append(tag("span", sample, name))
    return tag("p", *found, class_="key")


def plot(label: str, height: int, *inside: Markup, left: int = 0) -> Markup:
    """The image, as wide as its place; `label` says what it shows to who cannot see it.

    `left` is room in pixels for what stands left of the origin.
    """
    drawn = tag("svg", *inside, role="img", aria_label=label, width="100%", height=height, overflow="visible")
    return tag("div", drawn, class_="plot", style=f"padding-left:{left}px" if left else None)


def below(names: Sequence[str], n: int, y: int, offset: float = 0.0, word: str = "layer") -> list[Markup]:
    """About ten of the names along the bottom, so that they fit on a phone; numbers are round ones."""
    rough = max(1, math.ceil(n / 9))
    every = next((e for e in (1, 2, 5, 10, 20, 50) if e >= rough), rough)
    shown = [j for j, name in enumerate(names) if not name.isdigit() or int(name) % every == 0]
    if every > 1 and len(shown) > 1 and not names[shown[0]].isdigit():
        shown.pop(1)  # 0 has no room beside what stands before the layers
    found = [tag("text", names[j], x=percent(j / n + offset), y=y, class_="tick middle") for j in shown]
    return [tag("text", word, x=-8, y=y, class_="tick end"), *found]


def left(scale: Scale, height: int, form: str | None = None) -> list[Markup]:
    """Grid lines with their values on the left."""
    found = []
    for tick in scale.ticks:
        y = f"{height * (1 - scale.share(tick)):.1f}"
        found.append(tag("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        said = plain(tick) if form is None else form.format(tick)
        found.append(tag("text", said, x=-8, y=y, dy=4, class_="tick end"))
    return found
