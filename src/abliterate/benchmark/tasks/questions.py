"""The questions of `abliterate_mcq`, as lm-eval loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(**_: Any) -> Any:
    """The test split: `{subject, question, choices, answer}`, the answer as the number of its choice."""
    from datasets import Dataset

    return {"test": Dataset.from_json(str(Path(__file__).parent / "questions.jsonl"))}
