"""Whether a judge agrees with people well enough to judge: Cohen's kappa on labelled completions.

Owns the labelled completions that come with the package, the floor, and what is said of a judge that stays below it;
never knows how a judge comes to its labels.
"""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.errors import VerifyError
from abliterate.evaluate.judge import Judge, Label

#: Least agreement, over the four labels, of a judge that may judge. One that knows no partial answers has 0.58 at best.
FLOOR = 0.6


@dataclass(frozen=True)
class Agreed:
    """A judge with its agreement on `n` labelled completions, which goes where its name goes."""

    judge: Judge
    kappa: float
    n: int

    @property
    def name(self) -> str:
        """The judge's name with its agreement."""
        return f"{self.judge.name} (Cohen's kappa {self.kappa:.2f} on {self.n} labelled completions)"

    @property
    def local(self) -> bool:
        """Whether the judge is."""
        return self.judge.local

    @property
    def facts(self) -> dict[str, Any]:
        """The judge's facts, `kappa` and `n`."""
        return {**self.judge.facts, "kappa": self.kappa, "n": self.n}

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[Label | None]:
        """What the judge says."""
        return self.judge(pairs)


def agreed(judge: Judge) -> Agreed:
    """The judge, once it has judged the labelled completions; one that stays unjudged counts as a disagreement.

    Raises:
        VerifyError: its kappa is below `FLOOR`, or it leaves more than a tenth without a verdict.
    """
    rows = labelled()
    found = cohen_kappa([label for _, _, label in rows], judge([(prompt, text) for prompt, text, _ in rows]))
    if found < FLOOR:
        raise VerifyError(
            f"{judge.name}: agrees too little with {len(rows)} labelled completions, Cohen's kappa {found:.2f} where "
            f"{FLOOR} is the least; give a more capable model with --judge-model, or leave out --judge"
        )
    return Agreed(judge, found, len(rows))


def labelled() -> list[tuple[str, str, Label]]:
    """Prompt, completion and label of each labelled completion that comes with the package."""
    file = importlib.resources.files("abliterate.evaluate") / "data" / "agreement.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(row["prompt"], row["completion"], row["label"]) for row in rows]


def cohen_kappa(first: Sequence[Label | None], second: Sequence[Label | None]) -> float:
    """Agreement beyond chance of two labellings of the same things: 1 is perfect, 0 what chance gives.

    None is a label of its own. Not defined where both say one and the same of everything.
    """
    n, a, b = len(first), Counter(first), Counter(second)
    observed = sum(x == y for x, y in zip(first, second, strict=True)) / n
    chance = sum(a[label] * b[label] for label in a) / n**2
    return (observed - chance) / (1 - chance)
