"""Train the classifier that `--judge classifier` names, on tests/data/completions_dev.jsonl, and write its weights.

uv run --with scikit-learn==1.9.1 python scripts/train_classifier.py [--check | --validate]

--check says whether the shipped weights are those; --validate prints the cross-validation, grouped by prompt.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.feature_selection import SelectKBest, chi2
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

from abliterate.evaluate.broken import broken
from abliterate.evaluate.classifier import READABLE, features

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "completions_dev.jsonl"
TARGET = ROOT / "src" / "abliterate" / "evaluate" / "data" / "classifier.json"
N_FEATURES, N_EXAMPLES = 4000, 10

Row = dict[str, str]


def pipeline() -> Pipeline:
    """The features that tell the labels apart best, rows of unit length, a linear model of labels that weigh alike."""
    return make_pipeline(
        CountVectorizer(analyzer=features, min_df=2, binary=True),
        SelectKBest(chi2, k=N_FEATURES),
        Normalizer(),
        LogisticRegression(C=10, max_iter=3000, class_weight="balanced"),
    )


def readable(rows: list[Row]) -> list[Row]:
    """The rows to train on: what is broken is told without the classifier."""
    return [r for r in rows if r["label"] != "broken" and not broken(r["completion"], r["prompt"])]


def pairs(rows: list[Row]) -> list[tuple[str, str]]:
    """What the features are of."""
    return [(row["prompt"], row["completion"]) for row in rows]


def fit(rows: list[Row]) -> Pipeline:
    """The pipeline, trained."""
    return pipeline().fit(pairs(rows), [r["label"] for r in rows])


def weights(rows: list[Row]) -> str:
    """The weights file, one feature a line."""
    fitted = fit(readable(rows))
    grams, model = fitted[:2].get_feature_names_out(), fitted[-1]
    order = [list(model.classes_).index(label) for label in READABLE]
    # What is shipped is rounded, and the examples are of what is shipped.
    model.coef_, model.intercept_ = model.coef_.round(2), model.intercept_.round(3)
    chosen = range(0, len(rows), len(rows) // N_EXAMPLES)
    examples = fitted.predict_proba(pairs([rows[i] for i in chosen]))[:, order]
    facts = {
        "made_by": "scripts/train_classifier.py",
        "trained_on": {"sha256": hashlib.sha256(DATA.read_bytes()).hexdigest(), "n": len(readable(rows))},
        "labels": READABLE,
        "bias": model.intercept_[order].tolist(),
        "examples": {i: p.round(6).tolist() for i, p in zip(chosen, examples, strict=True)},
    }
    head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in facts.items())
    lines = sorted(zip(grams, model.coef_[order].T.tolist(), strict=True))
    body = ",\n".join(f"{json.dumps(g, ensure_ascii=False)}: {json.dumps(w, separators=(',', ':'))}" for g, w in lines)
    return f'{{{head}"weights": {{\n{body}\n}}}}\n'


def validate(rows: list[Row]) -> None:
    """Precision and recall of each label in eight folds that share no prompt."""
    found: dict[int, str] = {}
    first = {row["prompt"]: i for i, row in enumerate(rows)}
    for train, test in GroupKFold(8).split(rows, groups=[first[row["prompt"]] for row in rows]):
        said = fit(readable([rows[i] for i in train])).predict(pairs([rows[i] for i in test]))
        found |= dict(zip(test, said, strict=True))
    found |= {i: "broken" for i, row in enumerate(rows) if broken(row["completion"], row["prompt"])}
    for label in (*READABLE, "broken"):
        right = sum(found[i] == label == row["label"] for i, row in enumerate(rows))
        said, there = sum(x == label for x in found.values()), sum(row["label"] == label for row in rows)
        print(f"{label:10} precision {right / said:.1%} recall {right / there:.1%}")


def main() -> None:
    """Write the weights, or check them, or validate the way they are made."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    if "--validate" in sys.argv:
        validate(rows)
        return
    made = weights(rows)
    if "--check" not in sys.argv:
        TARGET.write_text(made, encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != made:
        sys.exit(f"{TARGET.relative_to(ROOT)}: not what the script makes; run it without --check")
    print(f"{TARGET.relative_to(ROOT)}: {len(made.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
