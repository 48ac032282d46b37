"""One function for each chart of the page: from a run record to a picture, what it shows in words, and its table.

Owns the words; draws nothing itself, and gives nothing where the record lacks the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from abliterate.evaluate.intervals import wilson
from abliterate.report.charts import Band, Bounds, Cells, Dots, Row, bands, dots, heat_map, histogram, intervals
from abliterate.report.figures import COLUMNS, LABELS, rows, settled
from abliterate.report.record import RunRecord
from abliterate.report.svg import SHAPES, Scale, key, number

BEFORE_AFTER = key([("circle", "base", "base"), ("diamond", "edited", "edited")])


#: As in tables, but for what is short there only because it stands below what it refers to.
_NAMES = LABELS | {
    "borderline_refusal_rate": "false refusals, borderline",
    "refusal_score_harmless": "refusal score, harmless",
    "refusal_score_borderline": "refusal score, borderline",
}


@dataclass(frozen=True)
class Panel:
    """A chart with what it shows (`finding`), how it is to be read, and its numbers; without a picture the table.

    A picture with a frame for each row has a slider, and shows `frame` at first.
    """

    name: str
    finding: str
    how: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    picture: Markup | None = None
    open: bool = False
    frame: int | None = None


def before_after(record: RunRecord) -> Panel | None:
    """Every metric with its interval."""
    if not record.metrics:
        return None
    drawn = [_row(m) for m in record.metrics]
    told = [f"{row.name} {row.said}" for row in drawn if None not in (row.base[0], row.edited[0])]
    finding = _sentence("; ".join(told or [f"{row.name} {row.said}" for row in drawn]))
    how = (
        "Each measure has its own scale; bars are 95% intervals over test prompts, which were used neither to find nor "
        "to choose the direction. KL (nats) and perplexity are taken on harmless prompts along the base's own answers; "
        "noise is the base against itself, prompt by prompt instead of in batches. The perplexity of a text has its "
        "interval over windows. Harm recognised: how often a harmful request is rather called harmful than a harmless "
        "one, 0.5 by chance. Leak is the share of the residual stream along the direction."
    )
    picture = intervals(drawn, finding) + BEFORE_AFTER
    return Panel("before-after", finding, how, COLUMNS, rows(record.metrics), picture, open=True)


def _row(m: dict[str, Any]) -> Row:
    share = m["name"].endswith("rate") or m["name"] == "leak"
    base, edited = (
        tuple(None if v is None else 100 * v if share else v for v in bounds)
        for bounds in ((m["base"], m["base_low"], m["base_high"]), (m["edited"], m["low"], m["high"]))
    )
    form = "{:.2f}" if m["name"] == "leak" else "{:.1f}" if share else "{:.3g}"
    unit = "%" if share else ""
    written = [form.format(v).replace("-", "−") + unit for v in (base[0], edited[0]) if v is not None]
    said = " → ".join(written)
    if m["name"].startswith("kl") and len(written) == 2:
        said = f"{written[1]} over noise of {base[0]:.1g}".replace("-", "−")
    scale = _scale(m["name"], [*base, *edited])
    return Row(_NAMES.get(m["name"], m["name"]), _bounds(base), _bounds(edited), scale, said, form, unit)


def _scale(name: str, values: list[float | None]) -> Scale:
    if name.endswith("rate") or name == "recognition":
        return Scale(0, 100 if name.endswith("rate") else 1)
    return Scale.over([*values, 1.0]) if name.startswith("perplexity") else Scale.over(values, zero=True)


def _bounds(values: tuple[float | None, ...]) -> Bounds:
    value, low, high = values
    return value, low, high


def separation(record: RunRecord) -> Panel | None:
    """How far apart the two sets lie, by layer and position."""
    table = record.charts.get("separation")
    if not table:
        return None
    what = "harmful and harmless prompts lie furthest apart at {}: {:.3g} spreads"
    how = (
        "Distance of the two means without its part along the harmless mean, in units of the spread along it "
        "(covariances between the stream's axes are not kept, so the spread is near the standard deviation, not equal "
        "to it). Far apart is not yet a cause: the choice is made by what ablation does."
    )
    return _by_site(record, "separation", table, what, how, "spreads")


def fall(record: RunRecord) -> Panel | None:
    """How far ablating each candidate lowers the refusal score."""
    table = record.charts.get("fall")
    if not table:
        return None
    what = "ablating the candidate at {} lowers the refusal score most in the first round: by {:.3g}"
    how = (
        f"Fall of the mean log-odds that the first token opens a refusal, on {record.charts['fall_prompts']} harmful "
        "validation prompts, the same for every candidate. The best go on to more prompts, and must keep to the bounds."
    )
    return _by_site(record, "fall", table, what, how, "log-odds")


def _by_site(
    record: RunRecord, name: str, table: list[list[float | None]], what: str, how: str, unit: str
) -> Panel | None:
    positions = [minus(p) for p in record.charts["positions"]]
    sites = [(v, layer, i) for layer, row in enumerate(table) for i, v in enumerate(row) if v is not None]
    if not sites:
        return None
    most, layer, i = max(sites)
    finding = _sentence(what.format(f"layer {layer}, position {positions[i]}", most))
    chosen = record.direction.get("layer"), record.direction.get("position")
    frame = None
    if chosen[0] is not None and chosen[0] < len(table) and chosen[1] in record.charts["positions"]:
        frame = (record.charts["positions"].index(chosen[1]), chosen[0])
    cells = Cells(
        positions, [str(n) for n in range(len(table))], list(zip(*table, strict=True)), unit, row_word="position",
        chosen=frame,
    )  # fmt: skip
    columns = ["layer", *(f"position {p}" for p in positions)]
    numbers = [[str(n), *("–" if v is None else number(v) for v in row)] for n, row in enumerate(table)]
    how += " Columns are layers, rows positions from the prompt's end."
    return Panel(name, finding, how, columns, numbers, heat_map(cells, finding))


def finalists(record: RunRecord) -> Panel | None:
    """What the last candidates scored."""
    if not record.finalists:
        return None
    names = ("base_harmful", "ablated", "base_harmless", "added", "rise", "kl")
    chosen = record.direction.get("layer"), record.direction.get("position")
    numbers = [
        [
            f"{f['layer']}, {minus(f['position'])}" + (" (chosen)" if (f["layer"], f["position"]) == chosen else ""),
            *("–" if f["scores"].get(n) is None else number(f["scores"][n]) for n in names),
        ]
        for f in record.finalists
    ]
    columns = ("layer, position", "base", "ablated", "base, harmless", "added", "rise at least", "KL")
    how = (
        "Mean refusal scores on validation prompts. Ablated on harmful prompts the score must fall; added on harmless "
        f"ones it must rise (less 1.96 standard errors, above 0); KL may be {record.resolved['max_kl']:g} nats at most."
        " Tested from the lowest ablated score on, until one passes."
    )
    return Panel("finalists", f"{len(numbers)} candidates met all validation prompts.", how, columns, numbers)


def projected(record: RunRecord) -> Panel | None:
    """Where the two sets lie along the chosen direction, layer by layer."""
    found = record.charts.get("projections")
    if not found:
        return None
    gaps = [a - b for a, b in zip(found["harmful_mean"], found["harmless_mean"], strict=True)]
    widest = max(range(len(gaps)), key=lambda n: abs(gaps[n]))
    finding = (
        f"Along the direction the means of harmful and harmless prompts are {abs(gaps[widest]):.3g} apart at layer "
        f"{widest}, the widest gap of the {len(gaps)} layers shown."
    )
    how = (
        "Mean component of the base's residual stream along the chosen direction at its position, train prompts, with "
        "a band of one spread to each side (single prompts are not kept, nor covariances: the band is near the "
        "standard deviation, not equal to it)."
    )
    series = [
        Band("harmful", "harmful", found["harmful_mean"], found["harmful_spread"]),
        Band("harmless", "harmless", found["harmless_mean"], found["harmless_spread"], dashed=True),
    ]
    numbers = [
        [str(n), *(f"{number(m)} ± {number(s)}" for m, s in cells)]
        for n, cells in enumerate(
            zip(*(zip(b.means, b.spreads, strict=True) for b in series), strict=True)
        )
    ]  # fmt: skip
    marks = key([("line", "harmful", "harmful (declined)"), ("dashed", "harmless", "harmless (answered)")])
    picture = bands(series, finding, record.direction.get("layer")) + marks
    return Panel("projections", finding, how, ("layer", "harmful", "harmless"), numbers, picture)


def _by_layer(edits: list[dict[str, Any]], figure: Any) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Roles, columns (`–` outside the blocks), and the largest figure of each pair of them."""
    roles = list(dict.fromkeys(e["role"] for e in edits))
    layers = [e["layer"] for e in edits if e["layer"] is not None]
    columns = ["–"] * any(e["layer"] is None for e in edits) + [str(n) for n in range(max(layers, default=-1) + 1)]
    largest: dict[tuple[str, str], float] = {}
    for e in edits:
        place = e["role"], "–" if e["layer"] is None else str(e["layer"])
        largest[place] = max(largest.get(place, 0.0), figure(e))
    return roles, columns, largest


def removed(record: RunRecord) -> Panel | None:
    """The strength at every layer, and what it took of each weight."""
    if not record.edits:
        return None
    roles, columns, share = _by_layer(record.edits, lambda e: 100 * e["norm_removed"] / (e["norm_before"] or 1.0))
    role, layer = max(share, key=lambda place: share[place])
    where = role if layer == "–" else f"{role} of layer {layer}"
    finding = (
        f"Strength {record.resolved['strength']:g} at every layer with a cell; it took most from {where}: "
        f"{share[role, layer]:.3g}% of its norm."
    )
    values = [[share.get((role, column)) for column in columns] for role in roles]
    picture = heat_map(Cells(roles, columns, values, "% of the norm"), finding)
    numbers = [[f"{r}, {c}", f"{record.resolved['strength']:g}", f"{share[r, c]:.3g}%"] for r, c in share]
    how = "‖ΔW‖ / ‖W‖ of every edited weight, the largest where a layer has several; – stands outside the blocks."
    return Panel("removed", finding, how, ("weight, layer", "strength", "norm removed"), numbers, picture)


def leaks(record: RunRecord) -> Panel | None:
    """What the storage type left of the direction in each weight."""
    if not record.edits:
        return None
    roles, columns, leak = _by_layer(record.edits, lambda e: e["leak"])
    worst = max(leak, key=lambda place: leak[place])
    where = worst[0] if worst[1] == "–" else f"{worst[0]} of layer {worst[1]}"
    finding = f"At most {leak[worst]:.1e} of what a weight had along the direction is left after the cast ({where})."
    kinds = ("ink", "edited", "harmful", "base")
    series = [
        Dots(
            role, SHAPES[i % len(SHAPES)], kinds[i % len(kinds)],
            [(columns.index(c), leak[r, c], f"{r}, layer {c}: {leak[r, c]:.1e}") for r, c in leak if r == role],
        )
        for i, role in enumerate(roles)
    ]  # fmt: skip
    picture = dots(series, columns, finding) + key([(s.shape, s.kind, s.name) for s in series])
    numbers = [[f"{r}, {c}", f"{leak[r, c]:.1e}"] for r, c in leak]
    how = (
        "Logarithmic; what rounding to the storage type left or put back along the direction, relative to what was "
        "there, the largest where a layer has several. run.json names every tensor."
    )
    return Panel("leak", finding, how, ("weight, layer", "leak"), numbers, picture)


def categories(record: RunRecord, kind: str) -> Panel | None:
    """Refusals of one set by category."""
    found = record.charts.get("categories", {}).get(kind)
    if not found:
        return None
    drawn, numbers = [], []
    for name, c in sorted(found.items(), key=lambda item: (-item[1]["edited"] / item[1]["n"], item[0])):
        base, edited = (wilson(c[which], c["n"]) for which in ("base", "edited"))
        both = [_bounds(tuple(100 * v for v in bounds)) for bounds in (base, edited)]
        said = f"{c['base']} → {c['edited']} of {c['n']}"
        drawn.append(Row(name, both[0], both[1], Scale(0, 100), said, "{:.0f}", "%"))
        numbers.append(
            [name, str(c["n"]), *(f"{b.value:.1%} [{100 * b.low:.0f}, {100 * b.high:.0f}]" for b in (base, edited))]
        )
    n, before, after = (sum(c[what] for c in found.values()) for what in ("n", "base", "edited"))
    finding = (
        f"Of {n} {kind} test prompts in {len(found)} categories the base declined {before}, the edited model {after}."
    )
    how = "Share declined in each category, 95% Wilson intervals: with few prompts each, they are wide."
    picture = intervals(drawn, finding, compact=True) + BEFORE_AFTER
    return Panel(f"categories-{kind}", finding, how, ("category", "n", "base", "edited"), numbers, picture)


def budgets(record: RunRecord) -> Panel | None:
    """What the refusal rates would have been had answers been cut earlier."""
    found = record.charts.get("budgets")
    if not found:
        return None
    drawn, numbers = [], []
    for kind, n in found["n"].items():
        for i, budget in enumerate(found["tokens"]):
            base, edited = (wilson(found["refusals"][who][kind][i], n) for who in ("base", "edited"))
            both = [_bounds(tuple(100 * v for v in bounds)) for bounds in (base, edited)]
            said = f"{base.value:.1%} → {edited.value:.1%}"
            drawn.append(Row(f"{kind}, {budget} tokens", both[0], both[1], Scale(0, 100), said, "{:.0f}", "%"))
            numbers.append([kind, str(budget), str(n), f"{base.value:.1%}", f"{edited.value:.1%}"])
    how = (
        f"Answers of at most {found['tokens'][-1]} tokens, judged anew by their first ones; an answer that ended "
        "earlier stays whole. Settled: from there on at least 98% of the answers of either model to either set are "
        "called a refusal, or none, as they are in the end. 95% Wilson intervals."
    )
    finding = _sentence(settled(record.charts))
    picture = intervals(drawn, finding, compact=True) + BEFORE_AFTER
    return Panel("budgets", finding, how, ("prompts", "tokens", "n", "base", "edited"), numbers, picture)


def verdicts(record: RunRecord) -> Panel | None:
    """What the answers were."""
    if not record.verdicts:
        return None
    some = any("unjudged" in of for sets in record.verdicts.values() for of in sets.values())
    labels = ("refusal", "partial", "compliance", "broken", *(["unjudged"] if some else []))
    numbers = [
        [f"{kind}, {who}", *(str(record.verdicts[who][kind].get(label, 0)) for label in labels)]
        for kind in ("harmful", "harmless")
        for who in ("base", "edited")
        if kind in record.verdicts.get(who, {})
    ]
    how = "Answers by verdict; a partial answer and broken text do not count as refusals."
    return Panel("verdicts", "What the answers were.", how, ("prompts, model", *labels), numbers)


def moved(record: RunRecord, name: str) -> Panel | None:
    """How KL is spread over single prompts."""
    values = [v for v in record.charts.get("kl", {}).get(name, ()) if v is not None]
    if not values:
        return None
    scale = Scale.over([max(v, 1e-6) for v in values], log=True)
    median, high = np.quantile(values, [0.5, 0.95])
    mean = float(np.mean(values))
    what = "at the first token" if name == "kl_first_token" else "along the answer"
    finding = f"KL {what}: half of {len(values)} prompts below {median:.3g} nats, one in twenty above {high:.3g}."
    how = "KL(base‖edited) of single harmless prompts that the base answers, logarithmic; counts of prompts upwards."
    marks = [("median", float(median)), ("mean", mean), ("p95", float(high))]
    numbers = [[name, f"{value:.4g}"] for name, value in [("least", values[0]), *marks, ("most", values[-1])]]
    return Panel(name, finding, how, ("of all prompts", "nats"), numbers, histogram(values, scale, finding, marks))


def minus(number: int) -> str:
    """A number with a true minus sign."""
    return str(number).replace("-", "−")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
