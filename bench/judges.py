"""Precision and recall of the judges on the labelled test set, beside heretic's rule of key words.

uv run --no-project --with heretic-llm --with-editable . python bench/judges.py [FILE ...]

Prints the table of docs/judges.md: all completions, those that models wrote, those that were written by hand; or the
same of other files. heretic's list stays in heretic: its default markers and its own test are imported. They tell
refusals alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

from abliterate.evaluate.classifier import CLASSIFIER
from abliterate.evaluate.intervals import wilson
from abliterate.evaluate.judge import RULES, Label

TEST = Path(__file__).parent.parent / "tests" / "data" / "completions_test.jsonl"
OURS = {"rules": RULES, "classifier": CLASSIFIER}
HEAD = "| completions | judge | label | precision | of | recall | of |\n| --- | --- | --- | --- | --- | --- | --- |"

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The labelled completions of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parts(rows: list[Row]) -> dict[str, list[Row]]:
    """All rows, those of models and those written by hand, by what the table calls them."""
    real = [row for row in rows if row["source"] != "written"]
    written = [row for row in rows if row["source"] == "written"]
    named = {"all": rows, "of models": real, "by hand": written}
    return {f"{name}, {len(part)}": part for name, part in named.items()}


def judged(judge: str, rows: list[Row]) -> Sequence[Label | None]:
    """What one of our judges says of each row."""
    return OURS[judge]([(row["prompt"], row["completion"]) for row in rows])


def by_heretic(rows: list[Row]) -> Sequence[Label | None]:
    """What heretic's default rule says: a refusal, or nothing."""
    from heretic.config import Settings
    from heretic.evaluator import Evaluator

    evaluator = SimpleNamespace(
        settings=SimpleNamespace(refusal_markers=Settings.model_fields["refusal_markers"].default)
    )
    return ["refusal" if Evaluator.is_refusal(evaluator, row["completion"]) else None for row in rows]


def table(part: str, judge: str, found: Sequence[Label | None], rows: list[Row]) -> Iterator[str]:
    """One line for each label that the judge ever gives."""
    for label in get_args(Label) if judge in OURS else ("refusal",):
        said = sum(x == label for x in found)
        there = sum(row["label"] == label for row in rows)
        right = sum(x == label == row["label"] for x, row in zip(found, rows, strict=True))
        yield f"| {part} | {judge} | {label} | {_share(right, said)} | {said} | {_share(right, there)} | {there} |"


def _share(hits: int, n: int) -> str:
    if not n:
        return "–"
    value, low, high = (100 * x for x in wilson(hits, n))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def main() -> None:
    """Print the table."""
    rows = [row for path in map(Path, sys.argv[1:] or [str(TEST)]) for row in read(path)]
    print(HEAD)
    for part, chosen in parts(rows).items():
        for judge in OURS:
            print("\n".join(table(part, judge, judged(judge, chosen), chosen)))
        print("\n".join(table(part, f"heretic {version('heretic-llm')}", by_heretic(chosen), chosen)))


if __name__ == "__main__":
    main()
