"""Several directions: each orthogonal to those before, tried behind them, and kept only while it is worth its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import abliterate
from abliterate.activations.collect import collect
from abliterate.checkpoint import open_checkpoint
from abliterate.direction.choose import Choice, Trial, measure
from abliterate.direction.direction import Direction
from abliterate.direction.refusal_score import refusal_score
from abliterate.direction.several import after, basis, chain, extended, orthogonal, saved, together
from abliterate.edit.plan import plan_edit
from abliterate.errors import UsageError
from abliterate.model.hooks import ablate, add_vectors
from abliterate.model.run import first_token_log_probs, kl_divergence
from tests.conftest import Refusing
from tests.model.test_blockwise import PROMPTS, both
from tests.schemas import valid

Tiny = Callable[..., Path]


def unit(*vectors: Any, layer: int = 1) -> list[Direction]:
    rows = [np.asarray(v, dtype=np.float64) for v in vectors]
    return [Direction((v / np.linalg.norm(v)).astype(np.float32), layer, -1, 4.0) for v in rows]


def some(n: int, d: int = 32) -> list[Direction]:
    return unit(*np.linalg.qr(np.random.default_rng(1).normal(size=(d, n)))[0].T)


@given(st.integers(0, 5), st.integers(1, 5))
def test_candidates_lose_what_lies_in_the_span_before_them(seed: int, k: int) -> None:
    rng = np.random.default_rng(100 + seed)
    before, found = basis(some(k)), unit(*rng.normal(size=(6, 32)))
    left = orthogonal(found, before)
    assert len(left) == 6 and np.abs(basis(left) @ before.T).max() < 1e-6 < 1e-3 < np.abs(basis(found) @ before.T).max()
    for d, was in zip(left, found, strict=True):
        assert np.linalg.norm(d.vector) == pytest.approx(1, abs=1e-6)
        assert d.scale == pytest.approx(was.scale * (d.vector @ was.vector), rel=1e-5)
    inside = unit(rng.normal(size=k) @ before + 1e-3 * left[0].vector)
    assert orthogonal(inside, before) == [] and orthogonal(inside, None) == inside


def test_a_direction_is_worth_one_refusal_and_a_sure_one() -> None:
    refused, answered = np.full(10, 9.0), np.full(10, -9.0)
    assert saved(refused, answered) == (pytest.approx(10, abs=0.01), True)
    assert saved(answered, answered) == (0.0, False) and saved(answered, refused)[1] is False
    one = np.array([-9.0, *[9.0] * 9])
    assert saved(refused, one) == (pytest.approx(1, abs=0.01), False)  # one of ten may be chance
    assert saved(answered, answered - 3)[1] is False  # lower, and surely so, but no refusal went
    assert saved(refused, np.array([*[-9.0] * 5, *[9.0] * 5]))[1] is True


@dataclasses.dataclass(frozen=True)
class Simulated:
    """The causal test of a model whose requests are declined for reasons `[n, d]`, each read along one axis."""

    reasons: Any
    removed: Any = None
    harmless: Any = (0, 1)

    @property
    def harmful(self) -> Any:
        """Its requests."""
        return self.reasons

    def score(self, *more: Any) -> Any:
        """Refusal scores with more axes removed: 4 where the reason is there, −4 where it is gone."""
        rows = [*(self.removed if self.removed is not None else ()), *more]
        left = np.eye(self.reasons.shape[1]) - sum((np.outer(r, r) for r in rows), np.zeros((1, 1)))
        return 8 * np.linalg.norm(self.reasons @ left, axis=1) - 4

    @property
    def base_harmful(self) -> torch.Tensor:
        """As in `Trial`."""
        return torch.from_numpy(self.score())

    @property
    def base(self) -> dict[str, float]:
        """As in `Trial`."""
        return {"base_harmful": float(self.score().mean()), "base_harmless": -4.0}

    def ablated(self, found: Any, harmful: range, harmless: range, _progress: Any = None) -> Any:
        """As in `Trial`; nothing costs anything."""
        return np.stack([self.score(d.vector)[list(harmful)] for d in found]), np.zeros((len(found), len(harmless)))

    def bounded(self, d: Direction) -> Direction:
        """As in `Trial`; every direction is a cause."""
        return dataclasses.replace(d, scores=d.scores | {"added": 0.0, "rise": 1.0, "kl": 0.01})


def again(trial: Any) -> list[Direction]:
    """A difference of means along every axis that is left, and one that has nothing to do with refusal."""
    axes = np.eye(trial.reasons.shape[1])
    return unit(*axes)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_as_many_directions_are_kept_as_refusal_has(k: int) -> None:
    reasons = np.eye(5)[np.arange(24) % k]
    trial: Any = Simulated(reasons)
    (first,) = chain(trial, again, 1, 0.2)
    found = extended(trial, Choice(first, [], []), again, 5, 0.2).direction
    assert found.rank == k and "fails the causal test" in found.stopped
    assert np.allclose(np.abs(np.atleast_2d(found.vector)).sum(0), [1.0] * k + [0.0] * (5 - k))
    assert len(found.parts) == (k if k > 1 else 0)
    if k > 1:
        assert found.scores["base_harmful"] == pytest.approx(4) and found.scores["ablated"] == pytest.approx(-4)
        assert [p["scores"]["base_harmful"] for p in found.parts] == pytest.approx([4 - 8 * i / k for i in range(k)])
        fewer = extended(trial, Choice(first, [], []), again, k - 1, 0.2).direction
        assert fewer.rank == k - 1 and fewer.stopped == ""
    assert len(chain(trial, again, 4, 0.2)) == 4  # whatever they buy
    assert len(chain(trial, again, 9, 0.2)) == 5  # no more are left


def test_what_would_cost_too_much_is_not_kept_and_said() -> None:
    trial: Any = Simulated(np.eye(5)[np.arange(24) % 2])
    (first,) = chain(trial, again, 1, 0.2)
    found = extended(trial, Choice(first, [], []), again, 5, 0.001).direction
    assert found.rank == 1 and "KL 0.010" in found.stopped


def test_candidates_are_tried_behind_what_is_removed(trial: Trial) -> None:
    first, second, third = some(3)
    behind = after(trial, [first, second])
    found = measure(behind, third).scores

    def scores(rows: list[list[int]]) -> torch.Tensor:
        return refusal_score(first_token_log_probs(trial.model, rows, 1), trial.tokens)

    model, p = trial.model, first_token_log_probs(trial.model, trial.harmless, 1)
    vectors = torch.from_numpy(basis([first, second, third]))
    with ablate(model, trial.sites, vectors[None, :2]):
        before, calm = scores(trial.harmful), scores(trial.harmless)
        with add_vectors(model, [1], vectors[2:] * 4.0):
            added = scores(trial.harmless)
    with ablate(model, trial.sites, vectors[None]):
        ablated, q = scores(trial.harmful), first_token_log_probs(model, trial.harmless, 1)
    expected = {
        "base_harmful": before.mean(), "base_harmless": calm.mean(), "ablated": ablated.mean(), "added": added.mean(),
        "kl": kl_divergence(p, q).mean(),
    }  # fmt: skip
    assert {k: found[k] for k in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, abs=2e-4)
    alone = measure(trial, third).scores
    assert all(abs(alone[k] - found[k]) > 1e-3 for k in expected)  # else nothing was removed


def test_means_behind_directions_are_the_same_block_by_block(tiny: Tiny) -> None:
    folder = tiny("gemma2")
    sites, removed = plan_edit(open_checkpoint(folder)).sites, basis(some(2))
    means = []
    for model in both(folder):
        with Trial(model, sites, [], [], [], 2, removed=removed).begun():
            means.append(collect(model, PROMPTS, 2).mean)
    assert np.allclose(*means, atol=1e-5) and not np.allclose(means[0], collect(model, PROMPTS, 2).mean, atol=1e-2)
    assert np.abs(means[0] @ removed.T).max() < 1e-4


def test_a_model_of_one_direction_is_left_at_one_and_the_record_says_so(refusing: Refusing, tmp_path: Path) -> None:
    record = abliterate.run(str(refusing.folder), tmp_path / "out", directions=3, evaluate=False, **refusing.options)
    assert record.direction["rank"] == 1 and record.direction["parts"] == []
    assert "no sure gain" in record.direction["stopped"]
    assert valid((tmp_path / "out" / "abliteration" / "run.json").read_text(), "run")["direction"] == record.direction


def test_several_directions_are_stored_and_taken_out_together(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abliterate.direction.several._why_not", lambda *_: "")
    record = abliterate.run(str(refusing.folder), tmp_path / "out", directions=3, **refusing.options)
    found = Direction.load(tmp_path / "out" / "abliteration" / "directions.safetensors")
    assert found.rank == 3 and np.allclose(found.vector @ found.vector.T, np.eye(3), atol=1e-6)
    assert record.direction == found.where | {"rank": 3} and len(found.parts) == 3 and found.stopped == ""
    leak = record.metric("leak")
    assert leak is not None and leak["base"] > 0.1 and leak["edited"] < 0.005
    assert record.charts["along"] and record.charts["projections"]
    page, card = ((tmp_path / "out" / name).read_text() for name in ("abliteration/report.html", "README.md"))
    assert "The span of 3 refusal directions, the first found at layer 2" in page and "- 3 directions" in card
    valid((tmp_path / "out" / "abliteration" / "run.json").read_text(), "run")


def test_one_direction_together_is_itself() -> None:
    (d,) = some(1)
    assert together([d]).vector is d.vector and together([d], "enough").stopped == "enough"


@pytest.mark.parametrize("directions", [0, 9])
def test_a_senseless_number_of_directions_is_refused(directions: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--directions {directions}: expected 1 to 8"):
        abliterate.run("none", tmp_path / "out", directions=directions)
