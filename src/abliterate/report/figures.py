"""Turn metrics into words: values with intervals, what was retained. Shared by the table and the card."""

from __future__ import annotations

from typing import Any

from abliterate.report.record import RunRecord

LABELS = {
    "refusal_rate": "refusals",
    "false_refusal_rate": "false refusals",
    "borderline_refusal_rate": "false, borderline",
    "refusal_score": "refusal score",
    "refusal_score_harmless": "the same, harmless",
    "refusal_score_borderline": "the same, borderline",
    "kl_first_token": "KL, first token",
    "kl_continuation": "KL, along answer",
    "perplexity": "perplexity",
    "perplexity_text": "perplexity, text",
    "recognition": "harm recognised",
    "leak": "leak",
}
COLUMNS = ("measure", "base", "edited", "retained", "n")


def rows(metrics: list[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """One row of `COLUMNS` for each metric, every value with its 95% interval."""
    return [
        (
            LABELS.get(m["name"], m["name"]),
            _base(m),
            _value(m["name"], m["edited"], m["low"], m["high"]),
            retained(m),
            str(m["n"]),
        )
        for m in metrics
    ]


def _base(m: dict[str, Any]) -> str:
    """The base's figure; where a figure compares the two, what comparing the base with itself gives."""
    if m["name"].startswith("kl") and m["base"] is not None:
        return f"noise {m['base']:.0e}"
    return _value(m["name"], m["base"], m["base_low"], m["base_high"])


def _value(name: str, value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    if low is None or high is None:
        return f"{value:.1%}" if name.endswith("rate") or name == "leak" else f"{value:.3g}"
    if name.endswith("rate"):
        return f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    if name == "leak":
        digits = 1 if high >= 0.1 else 2
        return f"{value:.{digits}%} [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"
    if high >= 1e5:
        return f"{value:.1e} [{low:.1e}, {high:.1e}]"
    digits = (3 if name.startswith("kl") else 2) if high < 10 else 1
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def counted(verdicts: dict[str, Any], verdict: str) -> str:
    """How many answers got a verdict that is neither refusal nor answer (broken, unjudged): base → edited."""
    counts = {
        who: (sum(v.get(verdict, 0) for v in sets.values()), sum(n for v in sets.values() for n in v.values()))
        for who, sets in verdicts.items()
    }
    return " → ".join(f"{counts[who][0]} of {counts[who][1]}" for who in ("base", "edited") if who in counts)


def settled(charts: dict[str, Any]) -> str:
    """From how many tokens of each answer on the refusal rate hardly changes; '' where that was not looked at."""
    found = charts.get("budgets")
    if not found:
        return ""
    full = found["tokens"][-1]
    if found["settled"] is None:
        return f"the refusal rate has not settled by {full} tokens: more may change it (--max-new-tokens)"
    return f"the refusal rate settles at {found['settled']} of {full} tokens"


def unjudged(verdicts: dict[str, Any]) -> str:
    """The same of answers that the judge gave no verdict on; '' where there are none."""
    some = any("unjudged" in of for sets in verdicts.values() for of in sets.values())
    return counted(verdicts, "unjudged") if some else ""


def judged_by(metrics: list[dict[str, Any]]) -> str:
    """How refusals were told, with the judge's name first; '' where none were."""
    return next((str(m["method"]) for m in metrics if m["name"] == "refusal_rate"), "")


def retained(metric: dict[str, Any]) -> str:
    """How much of the base's figure is left: edited over base; for perplexity base over edited."""
    name, base, edited = metric["name"], metric["base"], metric["edited"]
    # Log-odds have no zero to count from, recognition has it at a half, and the base value of KL is noise.
    if base is None or edited is None or name.startswith(("refusal_score", "recognition", "kl")):
        return "–"
    if name.startswith("perplexity"):
        return f"{base / edited:.1%}"
    return f"{edited / base:.1%}" if base else "–"


def controlled(controls: dict[str, Any]) -> str:
    """The refusal score with the direction, and with others that carry no refusal; '' where none were tried."""
    if not controls:
        return ""

    def said(*figures: dict[str, float]) -> str:
        scores, kl = ([f[name] for f in figures] for name in ("score", "kl"))
        ends = dict.fromkeys(_tenths(score) for score in (min(scores), max(scores)))
        return f"{' to '.join(ends)} (KL {max(kl):.3f}{' at most' if len(kl) > 1 else ''})"

    found = f"base {_tenths(controls['base'])}, chosen {said(controls['chosen'])}, "
    found += f"{len(controls['random'])} random directions {said(*controls['random'])}"
    if controls["harmless"] is not None:
        found += f", between harmless halves {said(controls['harmless'])}"
    return found


def _tenths(score: float) -> str:
    """With one digit, and no sign where nothing is left."""
    return f"{round(score, 1) + 0:.1f}"


def warnings(record: RunRecord) -> list[str]:
    """What a reader must know before trusting the figures of a run, sentence by sentence."""
    found = []
    if record.direction and (failed := broken_bounds(record.direction["scores"], record.test_max_kl)):
        found.append(f"The direction fails the causal test: {'; '.join(failed)}.")
    if weak := no_better(record.controls):
        found.append(f"The direction does no better than its controls: {weak}.")
    if record.missed:
        found.append("Refusals of harmful test prompts did not rise, though the direction was strengthened.")
    if record.direction_from_elsewhere:
        found.append("The direction was found on another checkpoint than the one that was edited.")
    seen = record.metric("recognition")
    if seen is not None and seen["base"] is not None and seen["high"] < seen["base_low"]:
        found.append(
            f"It recognises harm less than before ({seen['base']:.2f} → {seen['edited']:.2f}): refusals may be gone "
            "because it no longer sees what they were about."
        )
    return found


def no_better(controls: dict[str, Any]) -> str:
    """Which control the direction does not surely surpass; '' where it surpasses all."""
    if not controls or controls["margin_low"] > 0:
        return ""
    what = {"random": "a random direction", "harmless": "a direction between halves of the harmless prompts"}
    than, margin = what[controls["best"]], controls["margin"]
    if margin <= 0:
        return f"{than} moves the refusal score as it should by {-margin:.2f} more: what it does, any direction may do"
    return (
        f"it moves the refusal score by {margin:.2f} more than {than}, which may be chance on so few prompts (at least "
        f"{controls['margin_low']:.2f})"
    )


def broken_bounds(scores: dict[str, float], max_kl: float) -> list[str]:
    """What the choice by causal test would have refused."""
    if not scores:
        return []
    bounds = {
        "ablating it does not lower the refusal score": scores["ablated"] < scores["base_harmful"],
        "adding it does not raise the refusal score": scores.get("rise", 1.0) > 0,
        f"KL {scores['kl']:.3f} is above --max-kl {max_kl:g}": scores["kl"] <= max_kl,
    }
    return [what for what, kept in bounds.items() if not kept]


def strengths(record: RunRecord) -> str:
    """The strength of an edit, or from which to which."""
    if not record.tuned:
        return f"strength {record.resolved['strength']:g}".replace("-", "−")
    each = [e["strength"] for e in record.edits]
    return f"strengths {min(each, default=0):.2f} to {max(each, default=0):.2f}".replace("-", "−")


def tuning(front: dict[str, Any]) -> str | None:
    """Which point of the front an edit is, beside strength 1 everywhere; None where there is no front."""
    if not front.get("points"):
        return None
    plain, chosen = front["points"][0], front["points"][front["picked"]]
    kept = "" if chosen["held"] is None else f"; true refusals left {chosen['held']}, strength 1 {plain['held']}"
    what = "the knee" if front["rule"] == "knee" else "the cheapest within the target"
    return (
        f"{what} of {len(front['points'])} edits: {_point(chosen)}; strength 1 everywhere: {_point(plain)}; on "
        f"validation prompts, of which the base declines {front['base_refused']}{kept}"
    )


def _point(p: dict[str, Any]) -> str:
    return f"{p['refused']} of {p['asked']} declined, KL {p['kl']:.3f} first, {p['kl_along']:.3f} along"
