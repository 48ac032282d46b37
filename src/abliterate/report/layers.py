"""The chart with a slider: single prompts of both sets along the direction, one frame for each layer.

Owns its drawing and its words; which frame is shown is up to page.css and page.js. Never computes a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from abliterate.report.panels import Panel, minus
from abliterate.report.record import RunRecord
from abliterate.report.svg import Scale, number, percent, plain, plot, tag

MODELS, KINDS, FIGURES = ("base", "edited"), ("harmful", "harmless"), ("separation", "auc")
#: Pixels: left of the axis, from one model to the next, above its bars, and of the tallest of them.
_LEFT, _STEP, _TOP, _TALLEST = 64, 158, 20, 58


def single_prompts(record: RunRecord) -> Panel | None:
    """Where single test prompts lie along the direction, layer by layer, before and after."""
    layers = record.charts.get("along")
    if not layers:
        return None
    own = record.direction["layer"]
    n = [sum(layers[own]["base"][kind]) for kind in KINDS]
    base, edited = ({k: _fixed(layers[own][who][k]) for k in FIGURES} for who in MODELS)
    finding = (
        f"Along the direction {n[0]} harmful and {n[1]} harmless test prompts lie {base['separation']} spreads apart "
        f"at its layer {own} (AUC {base['auc']}); in the edited model {edited['separation']} (AUC {edited['auc']})."
    )
    how = (
        "Component of the residual stream along the direction after each block, at the direction's own position "
        f"({minus(record.direction['position'])}), of test prompts, which it was neither found nor chosen on: how many "
        "prompts lie where, harmful ones upwards, harmless ones downwards. A layer has one axis for both models; the "
        "height of bars is each model's own. Spreads are the base's standard deviations; AUC is the share of pairs "
        "whose harmful prompt lies further along, 0.5 being chance. It knows no distance: where nothing but rounding "
        "is left, it ranks that."
    )
    numbers = [
        [str(i), *("–" if v is None else number(v) for v in (layer[who][k] for who in MODELS for k in FIGURES))]
        for i, layer in enumerate(layers)
    ]
    columns = ("layer", "base: spreads apart", "AUC", "edited: spreads apart", "AUC")
    return Panel("single-prompts", finding, how, columns, numbers, frames(layers, own, finding), frame=own)


def frames(layers: Sequence[dict[str, Any]], own: int, label: str) -> Markup:
    """One group for each of `layers` (as `evaluate.along.histograms` gives them), of which `own` is shown at first."""
    inside, bottom = list[Markup](), len(MODELS) * _STEP
    for i, who in enumerate(MODELS):
        top = i * _STEP + _TOP
        inside.append(tag("text", who, x=-_LEFT, y=top - 8, class_="name"))
        for kind, share in zip(KINDS, (0.6, 1.5), strict=True):
            inside.append(tag("text", kind, x=-8, y=f"{top + share * _TALLEST:g}", class_="tick end"))
        inside.append(tag("line", x1=0, x2="100%", y1=top + _TALLEST, y2=top + _TALLEST, class_="axis"))
    inside += [_frame(n, layer, bottom, n == own) for n, layer in enumerate(layers)]
    return plot(label, bottom + 4, *inside, left=_LEFT)


def _frame(n: int, layer: dict[str, Any], bottom: int, own: bool) -> Markup:
    scale = Scale(layer["low"], layer["high"])
    inside = [tag("text", f"layer {n}", x=-_LEFT, y=bottom, class_="tick")]
    if own:
        inside.append(tag("text", "chosen", x=-_LEFT, y=bottom - 15, class_="name"))
    inside += [
        tag("text", plain(tick), x=percent(scale.share(tick)), y=bottom, class_="tick middle") for tick in scale.ticks
    ]
    if scale.low <= 0 <= scale.high:
        x = percent(scale.share(0))
        inside.append(tag("line", x1=x, x2=x, y1=_TOP, y2=bottom - 14, class_="grid"))
    for i, who in enumerate(MODELS):
        inside.append(tag("text", _apart(layer[who]), x="100%", y=i * _STEP + _TOP - 8, class_="end strong"))
        inside += _heaps(layer[who], i * _STEP + _TOP)
    gaps = (f"{who} {_fixed(layer[who]['separation'])}" for who in MODELS)
    said = f"layer {n}{' (chosen)' if own else ''}: {', '.join(gaps)} spreads apart"
    return tag("g", *inside, class_="step own on" if own else "step", data_said=said)


def _heaps(model: dict[str, Any], y: int) -> list[Markup]:
    """Both sets on one line, a unit of the picture being a bin wide and a prompt high."""
    most = max(1, *model["harmful"], *model["harmless"])
    paths = [
        tag("path", d=_outline(model[kind], sign), class_=f"heap {kind}")
        for kind, sign in zip(KINDS, (-1, 1), strict=True)
    ]
    box = {"viewBox": f"0 {-most} {len(model['harmful'])} {2 * most}", "preserveAspectRatio": "none"}
    return [
        tag("text", most, x=-8, y=y + 9, class_="tick end"),
        tag("svg", *paths, y=y, width="100%", height=2 * _TALLEST, overflow="visible", **box),
    ]


def _outline(counts: Sequence[int], sign: int) -> str:
    steps = "".join(f"V{sign * count}h{len(list(same))}" for count, same in groupby(counts))
    return f"M0 0{steps}V0z"


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0: no minus before a zero


def _apart(model: dict[str, Any]) -> str:
    return f"{_fixed(model['separation'])} spreads apart, AUC {_fixed(model['auc'])}"
