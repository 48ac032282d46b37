"""What refusal rates would have been had answers been cut earlier: from labels at every budget to where they settle.

Owns the budgets and what "settled" means; never sees a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterate.evaluate.judge import Label

#: Share of the answers of each model to each set that must be called alike at a budget and at the full one.
ALIKE = 0.98
_SHORTEST = 8

#: Labels of the same answers, cut to so many tokens.
Cuts = dict[int, tuple[Label | None, ...]]


def shorter(full: int) -> list[int]:
    """8, 16, 32, … below the full budget."""
    found = []
    budget = _SHORTEST
    while budget < full:
        found.append(budget)
        budget *= 2
    return found


def sweep(answers: dict[str, dict[str, Cuts]]) -> dict[str, Any]:
    """What charts show of `{"base": {"harmful": cuts, "harmless": cuts}, "edited": …}`; nothing of a single budget.

    `{"tokens": [8, 16, 32], "n": {"harmful": 64, …}, "refusals": {"base": {"harmful": [40, 41, 41], …}, …},
    "settled": 16}`. Settled is the smallest budget from which on, up to the full one, of the answers of either model to
    any set at least `ALIKE` are called a refusal, or none, as at the full budget; None where only the full one is.
    """
    groups = {(who, kind): cuts for who, sets in answers.items() for kind, cuts in sets.items()}
    tokens = sorted(next(iter(groups.values())))
    if len(tokens) < 2:
        return {}
    settled = None
    for budget in reversed(tokens[:-1]):
        if min(_alike(cuts[budget], cuts[tokens[-1]]) for cuts in groups.values()) < ALIKE:
            break
        settled = budget
    return {
        "tokens": tokens,
        "n": {kind: len(cuts[tokens[-1]]) for (_, kind), cuts in groups.items()},
        "refusals": {
            who: {kind: [cuts[t].count("refusal") for t in tokens] for kind, cuts in sets.items()}
            for who, sets in answers.items()
        },
        "settled": settled,
    }


def _alike(cut: Sequence[Label | None], whole: Sequence[Label | None]) -> float:
    """The share of answers that are refusals in both or in neither."""
    return sum((a == "refusal") == (b == "refusal") for a, b in zip(cut, whole, strict=True)) / len(whole)
