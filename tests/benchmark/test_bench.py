"""Benchmarks of a pair of models: the statistics hold what they say, and lm-eval is really run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import binomtest, norm

from abliterate import at_rest, verbs
from abliterate.benchmark import bench as order
from abliterate.benchmark.harness import BUILT_IN, Harness, _scores
from abliterate.benchmark.retention import holm, paired, verdicts
from abliterate.errors import HubError, UnsupportedError, UsageError, VerifyError
from abliterate.report.comparison import print_benchmarks
from tests.cli.test_main import run_here
from tests.schemas import strict, valid

Tiny = Callable[..., Path]
QUESTIONS = Path(order.__file__).parent / "tasks" / "questions.jsonl"


def answers(lost: int, won: int, both: int = 200, neither: int = 100) -> tuple[Any, Any]:
    base = np.array([1.0] * lost + [0.0] * won + [1.0] * both + [0.0] * neither)
    return base, np.concatenate([1 - base[: lost + won], base[lost + won :]])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30))
def test_a_change_is_tested_on_the_questions_that_one_model_alone_gets_right(lost: int, won: int) -> None:
    found = paired(*answers(lost, won), 0.02)
    assert found.p_change == pytest.approx(binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0)
    n = 300 + lost + won
    assert found.difference.value == pytest.approx((won - lost) / n) and found.n == n
    assert found.difference.low < found.difference.value < found.difference.high
    # A loss of the margin is excluded, one-sided, just where the interval of 90% lies above it.
    assert (found.p_loss < 0.05) == (_bound(lost, won, n, 1.6448536269514722) > -0.02)
    assert found.retained is not None and found.retained.value == pytest.approx((200 + won) / (200 + lost))


def _bound(lost: int, won: int, n: int, z: float) -> float:
    a, b = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    return a - b - z * float(np.sqrt((a + b - (a - b) ** 2) / (n + 2)))


def test_errors_are_as_rare_as_they_are_said_to_be() -> None:
    rng = np.random.default_rng(0)
    inside = around = excluded = shown = 0
    for _ in range(1000):
        base = (rng.random(400) < 0.6).astype(float)
        # From right to wrong in 8.33%, from wrong to right in 7.5%: a true loss of exactly 2 points.
        flip = rng.random(400) < np.where(base == 1, 0.25 / 3, 0.075)
        found = paired(base, np.where(flip, 1 - base, base), 0.02)
        inside += found.difference.low <= -0.02 <= found.difference.high
        excluded += found.p_loss <= 0.05
        assert found.retained is not None
        around += found.retained.low <= 0.58 / 0.6 <= found.retained.high
        flip = rng.random(400) < np.where(base == 1, 0.05, 0.075)  # no true difference
        shown += paired(base, np.where(flip, 1 - base, base), 0.02).p_change <= 0.05
    assert 930 < inside < 980 and 930 < around < 985 and 0 < excluded < 70 and 0 < shown < 60


def test_scores_between_right_and_wrong_take_the_paired_test() -> None:
    rng = np.random.default_rng(1)
    base = rng.random(300)
    edited = base + rng.normal(-0.05, 0.1, 300)
    found = paired(base, edited, 0.02)
    change = edited - base
    z = change.mean() / (change.std(ddof=1) / np.sqrt(300))
    assert found.p_change == pytest.approx(2 * norm.sf(abs(z)), rel=1e-6) and found.p_loss > 0.99
    assert verdicts([found]) == ["lost"]
    same = paired(base, base, 0.02)
    assert same.p_change == 1 and same.p_loss == 0 and verdicts([same]) == ["retained"]


def test_verdicts_share_one_error() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    gained, lost, few = (
        paired(*answers(2, 30), 0.02),
        paired(*answers(30, 2), 0.02),
        paired(*answers(3, 2, 20, 10), 0.02),
    )
    same = paired(*answers(0, 0), 0.02)
    assert verdicts([gained, lost, few, same]) == ["gained", "lost", "not shown", "retained"]
    edge = paired(*answers(14, 4), 0.02)
    assert edge.p_change < 0.05 and verdicts([edge]) == ["lost"]
    assert verdicts([edge] * 4) == ["not shown"] * 4


def test_the_built_in_questions_are_fit_to_be_asked() -> None:
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    subjects = Counter(row["subject"] for row in rows)
    assert len(rows) >= 300 and len(subjects) >= 12 and set(subjects.values()) == {30}
    assert len({row["question"] for row in rows}) == len(rows)
    assert all(len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4 for row in rows)
    places = Counter(row["answer"] for row in rows)
    assert max(places.values()) - min(places.values()) <= 12
    longest = sum(len(row["choices"][row["answer"]]) == max(map(len, row["choices"])) for row in rows)
    assert longest < 0.45 * len(rows)  # the right one is not told by its length


@pytest.fixture(scope="module")
def pair(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and an edit of it."""
    root, model = tmp_path_factory.mktemp("pair"), tiny("llama", max_position_embeddings=1024)
    r = np.random.default_rng(1).normal(size=32)
    np.save(root / "r.npy", r / np.linalg.norm(r))
    at_rest.edit(str(model), root / "r.npy", root / "edited")
    return model, root / "edited"


def test_both_models_are_asked_and_paired_and_a_killed_run_goes_on(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, edited = map(str, pair)
    out, run, asked = tmp_path / "out", Harness.run, list[str]()

    def stop(self: Harness, model: Any, task: str, **options: Any) -> Any:
        asked.append(task)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return run(self, model, task, **options)

    options: dict[str, Any] = dict(n_questions=6, device="cpu", dtype="float32")
    monkeypatch.setattr(Harness, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        verbs.bench(edited, base, out, **options)
    assert not out.exists()
    with pytest.raises(UsageError, match="--resume"):
        verbs.bench(edited, base, out, **options)
    found = verbs.bench(edited, base, out, resume=True, **options)
    assert len(asked) == 3  # the base was not asked again
    (task,) = found.tasks
    assert task.paired.n == 6 and task.metric == "acc"
    kept = valid((out / "bench.json").read_text(), "benchmarks")
    assert kept["questions"][BUILT_IN]["base"].keys() == kept["questions"][BUILT_IN]["edited"].keys()
    assert kept["tasks"][0]["paired"]["base"][0] == task.paired.base.value and kept["schema"] == 1
    capsys.readouterr()
    for width in (80, 60):
        print_benchmarks(Console(width=width), found.as_dict)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= width


def test_a_model_against_itself_retains_all(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(pair[1]), str(tmp_path / "out")
    options = ["--limit", "40", "--device", "cpu", "--dtype", "float32", "--json"]
    assert run_here("bench", model, "--base", model, "-o", out, *options) == 0
    printed = capsys.readouterr().out
    (task,) = valid(printed, "benchmarks")["tasks"]
    assert task["paired"]["difference"][0] == 0 and task["paired"]["p_change"] == 1
    assert len(task["parts"]) >= 2  # by subject
    kept = strict((tmp_path / "out" / "bench.json").read_text())
    assert kept.pop("questions") and kept == strict(printed)


def test_mistakes_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, edited = map(str, pair)
    with pytest.raises(UsageError, match=r"did you mean .*gsm8k"):
        verbs.bench(edited, base, tmp_path / "out", ["gsm8kk"])
    with pytest.raises(UsageError, match="--tasks is empty"):
        verbs.bench(edited, base, tmp_path / "out", [])
    with pytest.raises(UsageError, match="--margin 0"):
        verbs.bench(edited, base, tmp_path / "out", margin=0)
    with pytest.raises(UsageError, match="--limit 1"):
        verbs.bench(edited, base, tmp_path / "out", n_questions=1)
    with pytest.raises(HubError, match=f"{BUILT_IN} needs no network"):  # tests may not reach the hub
        verbs.bench(edited, base, tmp_path / "out", ["gsm8k"], n_questions=2)
    assert not list(tmp_path.iterdir())


def test_scores_that_cannot_be_paired_are_refused() -> None:
    sample = {"doc_id": 0, "doc_hash": "x", "doc": {}, "metrics": ["ppl"], "ppl": (1.0, 2)}
    with pytest.raises(UnsupportedError, match="no score for each question"):
        _scores("wikitext", {"wikitext": [sample]})
    answer = {"doc_id": 0, "doc_hash": "x", "doc": {}, "metrics": ["exact_match"]}
    read = {"strict-match": 0.0, "flexible-extract": 1.0}
    several = [answer | {"exact_match": score, "filter": name} for name, score in read.items()]
    one = _scores("gsm8k", {"gsm8k": several})
    assert list(one.scores.values()) == [1.0]
    other = _scores("gsm8k", {"gsm8k": [s | {"doc_id": 1} for s in several]})
    with pytest.raises(VerifyError, match="different questions"):
        order.benchmarks("a", "b", {"gsm8k": {"base": one, "edited": other}}, 0.02, None)
