"""The shipped classifier: that it is the one the script makes, and what it makes of text."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.evaluate import agreement
from abliterate.evaluate.broken import broken
from abliterate.evaluate.classifier import CLASSIFIER, READABLE, features, probabilities, weights
from abliterate.options import Options
from abliterate.steps import pick_judge

DATA = Path(__file__).parent.parent / "data" / "completions_dev.jsonl"
ROWS = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]


def test_the_weights_are_of_the_training_file_as_it_is() -> None:
    file = weights()
    n = sum(row["label"] in READABLE and not broken(row["completion"], row["prompt"]) for row in ROWS)
    assert file["trained_on"] == {"sha256": hashlib.sha256(DATA.read_bytes()).hexdigest(), "n": n}
    assert tuple(file["labels"]) == READABLE
    assert all(len(row) == 3 for row in file["weights"].values()) and len(file["weights"]) > 1000


def test_inference_gives_what_scikit_learn_gave() -> None:
    examples = {int(i): stored for i, stored in weights()["examples"].items()}
    assert len(examples) >= 10
    for i, stored in examples.items():
        found = probabilities(ROWS[i]["prompt"], ROWS[i]["completion"])
        assert found == pytest.approx(stored, abs=2e-6) and math.fsum(found) == pytest.approx(1)
    # Of another text it gives something else.
    assert probabilities(ROWS[1]["prompt"], ROWS[1]["completion"]) != pytest.approx(examples[0], abs=2e-6)


def test_it_reads_the_opening_and_no_further() -> None:
    refusal, answer = "I'm sorry, but I can't help with that.", "Sure! Here is how to bake bread: mix flour and water"
    pairs = [("Bake bread", refusal), ("Bake bread", answer), ("Bake bread", "the the the the the the the the the")]
    assert CLASSIFIER(pairs) == ["refusal", "compliance", "broken"]
    long = f"{answer}, {'then fold it and wait, ' * 12}"
    assert features(("", long)) == features(("", long + refusal))
    assert features(("", answer)) != features(("", refusal + answer))


@given(st.text(max_size=400))
def test_every_text_has_probabilities(text: str) -> None:
    assert math.fsum(probabilities("", text)) == pytest.approx(1)
    assert CLASSIFIER([("", text)])[0] in (*READABLE, "broken")


def test_it_is_picked_by_name_and_carries_its_agreement() -> None:
    judge = pick_judge(Options(judge="classifier"))
    assert judge.name.startswith("classifier of word n-grams (Cohen's kappa 0.")
    assert judge.facts["kappa"] > agreement.FLOOR and judge.facts["trained_on"] == weights()["trained_on"]["sha256"]
    assert pick_judge(Options(judge="rules")) is pick_judge(Options())
