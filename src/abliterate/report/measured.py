"""The charts of what was measured: before and after, by category and length, verdicts, KL of single prompts.

Owns the words, as `panels` does for where the direction was found and what was taken out; draws nothing itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from abliterate.evaluate.intervals import wilson
from abliterate.report.charts import Bounds, Row, histogram, intervals
from abliterate.report.figures import COLUMNS, LABELS, rows, settled
from abliterate.report.panels import Panel, sentence
from abliterate.report.record import RunRecord
from abliterate.report.svg import Scale, key

#: The sets that are asked, in the order of reading.
KINDS = ("harmful", "harmless", "borderline")
BEFORE_AFTER = key([("circle", "base", "base"), ("diamond", "edited", "edited")])


#: As in tables, but for what is short there only because it stands below what it refers to.
_NAMES = LABELS | {
    "borderline_refusal_rate": "false refusals, borderline",
    "refusal_score_harmless": "refusal score, harmless",
    "refusal_score_borderline": "refusal score, borderline",
}


def before_after(record: RunRecord) -> Panel | None:
    """Every metric with its interval."""
    if not record.metrics:
        return None
    drawn = [_row(m) for m in record.metrics]
    told = [f"{row.name} {row.said}" for row in drawn if None not in (row.base[0], row.edited[0])]
    finding = sentence("; ".join(told or [f"{row.name} {row.said}" for row in drawn]))
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
        "earlier stays whole. Settled: from there on at least 98% of the answers of either model to any set are "
        "called a refusal, or none, as they are in the end. 95% Wilson intervals."
    )
    finding = sentence(settled(record.charts))
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
        for kind in KINDS
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


def _bounds(values: tuple[float | None, ...]) -> Bounds:
    value, low, high = values
    return value, low, high
