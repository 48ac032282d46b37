"""One function for each chart of directions and weights: from a run record to a picture, its words, and its table.

Owns the words, and what a chart of the page is; draws nothing, and gives nothing where the record lacks the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from abliterate.evaluate.intervals import wilson
from abliterate.report.charts import Band, Cells, Dots, Spot, bands, dots, heat_map, scatter
from abliterate.report.record import RunRecord
from abliterate.report.svg import SHAPES, key, number


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


def separation(record: RunRecord) -> Panel | None:
    """How far apart the two sets lie, by layer and position."""
    table = record.charts.get("separation")
    if not table:
        return None
    what = record.fitted + " and harmless prompts lie furthest apart at {}: {:.3g} spreads"
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
        "Fall of the mean log-odds that the first token opens a refusal, on "
        f"{record.charts['fall_prompts']} {record.fitted} validation prompts, the same for every candidate. The best "
        "go on to more prompts, and must keep to the bounds."
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
    finding = sentence(what.format(f"layer {layer}, position {positions[i]}", most))
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
    bound = "" if record.tuned else f"; KL may be {record.resolved['max_kl']:g} nats at most"
    how = (
        "Mean refusal scores on validation prompts, at strength 1. Ablated on declined prompts the score must fall; "
        f"added on harmless ones it must rise (less 1.96 standard errors, above 0){bound}. Tested from the lowest "
        "ablated score on, until one passes."
    )
    return Panel("finalists", f"{len(numbers)} candidates met all validation prompts.", how, columns, numbers)


def front(record: RunRecord) -> Panel | None:
    """What tuning passed: refusals left against what answers moved."""
    points = record.front.get("points")
    if not points:
        return None
    spots, numbers = [], []
    for i, p in enumerate(points):
        left = wilson(p["refused"], p["asked"])
        name = "strength 1" if p["rate"] is None else f"rate {p['rate']:g}"
        chosen = i == record.front["picked"]
        figures = f"{p['refused']} of {p['asked']} declined, KL {p['kl_along']:.4f} along, {p['kl']:.4f} first"
        shape, kind = ("diamond", "edited") if chosen else ("circle", "base")
        y, low, high = (100 * v for v in (left.value, left.low, left.high))
        word = f"{name}, picked" if chosen else name
        spots.append(Spot(p["kl_along"], y, low, high, word, f"{name}: {figures}", shape, kind))
        said = f"{left.value:.1%} [{100 * left.low:.0f}, {100 * left.high:.0f}]"
        held = [] if p["held"] is None else [str(p["held"])]
        numbers.append(
            [word, str(p["steps"]), said, *held, number(p["score"]), f"{p['kl']:.4f}", f"{p['kl_along']:.4f}"]
        )
    plain, best = points[0], points[record.front["picked"]]
    finding = (
        f"The edit that was picked leaves {best['refused']} of {best['asked']} refusals at KL {best['kl_along']:.4f} "
        f"along the answer; strength 1 everywhere leaves {plain['refused']} at {plain['kl_along']:.4f}."
    )
    how = (
        f"Share of the {record.fitted} validation prompts still declined (upwards, 95% Wilson intervals) against "
        "KL(base‖edited) along the base's own answers to the harmless ones that it answers. A rate is what a nat of KL "
        f"was worth in refusal log-odds while strengths were tuned. Picked: {_RULES[record.front['rule']]}."
    )
    true = ["true refusals left"] if record.keeps else []
    columns = ("edit", "steps", "declined", *true, "refusal score", "KL, first token", "KL, along")
    picture = scatter(spots, finding, "KL along the answer, nats", "{:g}%")
    return Panel("front", finding, how, columns, numbers, picture)


_RULES = {
    "knee": "the knee, where twice the share of the base's refusals that are left and the share of the cost of "
    "strength 1 everywhere add up to least",
    "target": "the cheapest that leaves at most --target-refusals",
}


def controls(record: RunRecord) -> Panel | None:
    """What directions that carry no refusal do in place of the chosen one."""
    c = record.controls
    if not c:
        return None
    tried = [("chosen", c["chosen"]), *((f"random {i}", f) for i, f in enumerate(c["random"], 1))]
    if c["harmless"] is not None:
        tried.append(("between harmless halves", c["harmless"]))
    numbers = [[name, number(f["score"]), number(f["score"] - c["base"]), number(f["kl"])] for name, f in tried]
    finding = (
        f"At the same strengths the direction moves the refusal score by {number(c['margin'])} more than the best of "
        f"{len(tried) - 1} controls, at least by {number(c['margin_low'])}."
    )
    how = (
        f"Mean refusal score of {c['harmful_prompts']} {record.fitted} validation prompts (base {number(c['base'])}), "
        f"mean KL on {c['harmless_prompts']} harmless ones, with each direction in place of the chosen one: random "
        "ones, and what lies between two halves of the harmless train prompts at the same layer and position. At "
        "least: less 1.96 standard errors over the same prompts."
    )
    return Panel("controls", finding, how, ("direction", "refusal score", "less the base's", "KL"), numbers)


def projected(record: RunRecord) -> Panel | None:
    """Where the two sets lie along the chosen direction, layer by layer."""
    found = record.charts.get("projections")
    if not found:
        return None
    before = ", as it was before tuning," if record.tuned else ""
    gaps = [a - b for a, b in zip(found["harmful_mean"], found["harmless_mean"], strict=True)]
    widest = max(range(len(gaps)), key=lambda n: abs(gaps[n]))
    finding = (
        f"Along the direction{before} the means of {record.fitted} and harmless prompts are {abs(gaps[widest]):.3g} "
        f"apart at layer {widest}, the widest gap of the {len(gaps)} layers shown."
    )
    how = (
        "Mean component of the base's residual stream along the chosen direction at its position, train prompts, with "
        "a band of one spread to each side (single prompts are not kept, nor covariances: the band is near the "
        "standard deviation, not equal to it)."
    )
    series = [
        Band(record.fitted, "harmful", found["harmful_mean"], found["harmful_spread"]),
        Band("harmless", "harmless", found["harmless_mean"], found["harmless_spread"], dashed=True),
    ]
    numbers = [
        [str(n), *(f"{number(m)} ± {number(s)}" for m, s in cells)]
        for n, cells in enumerate(
            zip(*(zip(b.means, b.spreads, strict=True) for b in series), strict=True)
        )
    ]  # fmt: skip
    marks = key([("line", "harmful", f"{record.fitted} (declined)"), ("dashed", "harmless", "harmless (answered)")])
    picture = bands(series, finding, record.direction.get("layer")) + marks
    return Panel("projections", finding, how, ("layer", record.fitted, "harmless"), numbers, picture)


def _by_layer(edits: list[dict[str, Any]], figure: Any) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Roles, columns (`–` outside the blocks), and the largest figure of each pair of them."""
    roles = list(dict.fromkeys(e["role"] for e in edits))
    layers = [e["layer"] for e in edits if e["layer"] is not None]
    columns = ["–"] * any(e["layer"] is None for e in edits) + [str(n) for n in range(max(layers, default=-1) + 1)]
    largest: dict[tuple[str, str], float] = {}
    for e in edits:
        place = e["role"], "–" if e["layer"] is None else str(e["layer"])
        largest[place] = max(largest.get(place, figure(e)), figure(e))
    return roles, columns, largest


def removed(record: RunRecord) -> Panel | None:
    """The strength at every layer, and what it took of each weight."""
    if not record.edits:
        return None
    whole = record.resolved["strength"]

    def strength(edit: dict[str, Any]) -> float:
        return float(edit.get("strength", whole))  # a record of an earlier version has one for all

    roles, columns, share = _by_layer(
        record.edits, lambda e: 100 * abs(strength(e)) * e["norm_removed"] / (e["norm_before"] or 1.0)
    )
    *_, strengths = _by_layer(record.edits, strength)
    used = sorted({f"{s:.3g}" for s in strengths.values()}, key=float)
    said = f"Strength {used[0]}" if len(used) == 1 else f"Strengths from {used[0]} to {used[-1]}"
    role, layer = max(share, key=lambda place: share[place])
    where = role if layer == "–" else f"{role} of layer {layer}"
    took = "added most to" if record.strengthens else "took most from"
    finding = f"{said} at the layers with a cell; it {took} {where}: {share[role, layer]:.3g}% of its norm."
    values = [[share.get((role, column)) for column in columns] for role in roles]
    picture = heat_map(Cells(roles, columns, values, "% of the norm"), finding)
    numbers = [[f"{r}, {c}", f"{strengths[r, c]:.3g}", f"{share[r, c]:.3g}%"] for r, c in share]
    how = "‖ΔW‖ / ‖W‖ of every edited weight, the largest where a layer has several; – stands outside the blocks."
    return Panel("removed", finding, how, ("weight, layer", "strength", "norm changed"), numbers, picture)


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


def minus(number: int | str) -> str:
    """A number with a true minus sign."""
    return str(number).replace("-", "−")


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
