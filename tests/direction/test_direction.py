"""Directions: the difference of means, the score, and a choice that equals brute force one candidate at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.activations.stats import ActivationStats
from abliterate.checkpoint import open_checkpoint
from abliterate.direction import choose as choosing
from abliterate.direction.choose import Trial, choose, measure
from abliterate.direction.direction import Direction, candidates, most_separated, separation
from abliterate.direction.profile import profile
from abliterate.direction.refusal_score import refusal_score, refusal_tokens
from abliterate.edit.plan import plan_edit
from abliterate.errors import CheckpointError, NoRefusalError, VerifyError
from abliterate.model.hooks import ablate, add_vectors
from abliterate.model.load import load_model
from abliterate.model.run import first_token_log_probs
from tests.conftest import Refusing

Tiny = Callable[..., Path]


def stats(mean: np.ndarray, prompts: str, model: str = "m") -> ActivationStats:  # type: ignore[type-arg]
    return ActivationStats("resid_post", (-2, -1), 10, mean, np.ones_like(mean), prompts, model)


def test_candidates_are_unit_differences_of_means_without_the_harmless_mean() -> None:
    rng = np.random.default_rng(0)
    a, b = 1e4 + rng.normal(size=(3, 2, 8)), 1e4 + rng.normal(size=(3, 2, 8))
    found = candidates(stats(a, "x"), stats(b, "y"), last_layer=2)
    assert [(d.layer, d.position) for d in found] == [(0, -2), (0, -1), (1, -2), (1, -1)]
    for d in found:
        r = a[d.layer, d.position] - b[d.layer, d.position]
        assert np.linalg.norm(d.vector) == pytest.approx(1, abs=1e-6)
        mean = b[d.layer, d.position] / np.linalg.norm(b[d.layer, d.position])
        assert abs(r @ mean) > 1e-3 and abs(d.vector @ mean) < 1e-6
        assert np.allclose(d.vector * d.scale + (r @ mean) * mean, r, rtol=1e-5, atol=1e-5)


def test_positions_where_the_sets_do_not_differ_give_no_candidate() -> None:
    a, b = np.ones((1, 2, 4)), np.ones((1, 2, 4))
    b[0, 1, 0] += 0.5
    assert [d.position for d in candidates(stats(a, "x"), stats(b, "y"), 1)] == [-1]


def test_statistics_that_do_not_contrast_are_refused() -> None:
    a = np.ones((1, 2, 4))
    with pytest.raises(VerifyError, match="different models"):
        candidates(stats(a, "x"), stats(a, "y", "n"), 1)
    with pytest.raises(VerifyError, match="same prompts"):
        candidates(stats(a, "x"), stats(a, "x"), 1)


def test_most_separated_finds_the_planted_difference() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 2, 8)) * 0.1, rng.normal(size=(3, 2, 8)) * 0.1
    a[1, 0] += 3
    x, y = stats(a, "x"), stats(b, "y")
    best = most_separated(candidates(x, y, 3), x, y)
    assert (best.layer, best.position) == (1, -2)


def test_the_profile_says_of_every_site_what_the_statistics_hold() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 2, 8)), rng.normal(size=(3, 2, 8))
    a[0, 1] = b[0, 1]  # no candidate there
    x, y = stats(a, "x"), stats(b, "y")
    found = candidates(x, y, 3)
    tried = [
        dataclasses.replace(d, scores={"base": 2.0, "ablated": float(i), "prompts": 2}) for i, d in enumerate(found)
    ]
    table, best = profile(found[0], x, y, tried), found[0]
    assert table["positions"] == [-2, -1] and table["fall_prompts"] == 2
    assert table["separation"][0][1] is None and table["fall"][0] == [2.0, None] and table["fall"][1][0] == 1.0
    for d in found:
        assert d.layer is not None and d.position is not None
        shown = table["separation"][d.layer][table["positions"].index(d.position)]
        assert shown == pytest.approx(separation(d, x, y), rel=1e-3)
    means = table["projections"]
    assert means["harmful_mean"] == pytest.approx((a[:, 0] @ best.vector).tolist(), rel=1e-3)
    assert means["harmful_mean"][0] - means["harmless_mean"][0] == pytest.approx(best.scale, rel=1e-2)
    assert min(means["harmful_spread"]) > 0 and all(len(row) == 3 for row in means.values())
    assert profile(dataclasses.replace(best, position=None), x, y, [])["projections"] is None


def test_a_direction_survives_its_file_and_others_are_refused(tmp_path: Path) -> None:
    d = Direction(np.array([0.6, 0.8], dtype=np.float32), 3, -1, 2.5, scores={"kl": 0.1}, source={"model": "m"})
    d.save(tmp_path / "d.safetensors")
    again = Direction.load(tmp_path / "d.safetensors")
    assert np.array_equal(again.vector, d.vector) and again.where == d.where
    tuned = dataclasses.replace(d, strengths={"embed": 0.4, "3.mlp.down_proj": -0.1})
    tuned.save(tmp_path / "tuned.safetensors")
    assert Direction.load(tmp_path / "tuned.safetensors").strengths == tuned.strengths
    dataclasses.replace(d, vector=d.vector * 2).save(tmp_path / "long.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    for name in ("long.safetensors", "junk", "missing"):
        with pytest.raises(CheckpointError, match=name):
            Direction.load(tmp_path / name)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=9), st.integers(1, 3))
def test_the_score_is_the_log_odds_of_the_tokens(logits: list[float], k: int) -> None:
    log_probs = torch.tensor([logits], dtype=torch.float64).log_softmax(-1)
    p = log_probs.exp()[0, :k].sum()
    assert refusal_score(log_probs, list(range(k)))[0].item() == pytest.approx((p / (1 - p)).log().item(), abs=1e-6)


def test_refusal_tokens_are_those_that_open_refusals_and_not_answers() -> None:
    assert refusal_tokens([5] * 30 + [6] * 10 + [7], [8] * 40 + [6] * 30) == [5]
    assert refusal_tokens([5, 6, 5, 6], [1, 2, 3, 4]) == [5, 6]
    with pytest.raises(NoRefusalError, match="--layer"):
        refusal_tokens([5] * 10, [5] * 10)


def some(n: int) -> list[Direction]:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(n, 32)).astype(np.float32)
    return [Direction(v / np.linalg.norm(v), i % 3, -1, 4.0) for i, v in enumerate(vectors)]


def brute(trial: Trial, direction: Direction) -> dict[str, float]:
    """The causal test of one candidate, one row at a time, without a batch."""
    model, r = trial.model, torch.from_numpy(direction.vector)

    def log_probs(row: list[int]) -> torch.Tensor:
        return first_token_log_probs(model, [row], 1)

    def score(row: list[int]) -> float:
        return refusal_score(log_probs(row), trial.tokens).item()

    found = {
        "base_harmful": np.mean([score(r) for r in trial.harmful]),
        "base_harmless": np.mean([score(r) for r in trial.harmless]),
    }
    base = [log_probs(row) for row in trial.harmless]
    with ablate(model, trial.sites, r):
        found["ablated"] = np.mean([score(row) for row in trial.harmful])
        kl = [(b.exp() * (b - log_probs(row))).sum().item() for b, row in zip(base, trial.harmless, strict=True)]
        found["kl"] = np.mean(kl)
    with add_vectors(model, [direction.layer], r[None] * direction.scale):
        rises = np.array([score(row) for row in trial.harmless]) - [refusal_score(b, trial.tokens).item() for b in base]
        found["added"] = found["base_harmless"] + rises.mean()
        found["rise"] = rises.mean() - 1.96 * rises.std() / np.sqrt(len(rises))
    return {k: float(v) for k, v in found.items()}


@pytest.mark.parametrize("system_prompt", [None, "You are brief, and kind."])
def test_batched_candidates_score_what_they_score_alone(
    system_prompt: str | None, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = dataclasses.replace(trial.model.chat, system_prompt=system_prompt)
    rows = chat.encode(["Hi", "How are you?", "Name a river in Asia", "What now", "Yes or no"])
    trial = dataclasses.replace(trial, harmful=rows[:3], harmless=rows[2:])
    announced, done = [], list[int]()

    def steps(_title: str, total: int) -> Callable[[int], None]:
        announced.append(total)
        return done.append

    monkeypatch.setattr(choosing, "_pick", lambda tested, _max_kl: tested[0])
    monkeypatch.setattr(choosing, "_ROUNDS", ((1, 4), (2, 3)))
    scored = choose(trial, some(5), -1.0, steps).finalists
    assert announced == [5 * 2 + 4 * 2 + 3 * 1, 3] and sum(done) == sum(announced)
    assert len(scored) == 3 and scored == sorted(scored, key=lambda d: d.scores["ablated"])
    for direction in scored:
        for name, value in brute(trial, direction).items():
            assert direction.scores[name] == pytest.approx(value, abs=2e-4), name
        assert measure(trial, direction).scores == pytest.approx(direction.scores, abs=2e-4)


def test_the_bounds_are_tested_no_further_than_the_first_that_passes(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_CERTAIN", -1e6)
    monkeypatch.setattr(choosing, "_pick", lambda tested, _max_kl: tested[-1])
    found, scored, tried = choose(trial, some(8), 100.0)
    assert found is scored[0] and set(found.scores) > {"added", "rise", "kl"}
    assert len(scored) == 6 and all("rise" not in d.scores for d in scored[1:])
    assert len(tried) == 8
    for direction in tried:  # on the first round's prompts alone
        scores = brute(dataclasses.replace(trial, harmful=trial.harmful[:2]), direction)
        assert direction.scores == pytest.approx(
            {"base": scores["base_harmful"], "ablated": scores["ablated"], "prompts": 2}, abs=2e-4
        )


def scored(ablated: float, rise: float, kl: float) -> Direction:
    base = {"base_harmful": 4.0, "base_harmless": -4.0}
    return dataclasses.replace(some(1)[0], scores=base | {"ablated": ablated, "rise": rise, "kl": kl})


def test_every_bound_is_kept_and_named_when_nothing_passes() -> None:
    best, costly = scored(-3, 1, 0.1), scored(-9, 1, 0.5)
    correlate = scored(-8, -0.1, 0.0)
    pick = choosing._pick
    assert pick([scored(-1, 1, 0.0), best, costly, correlate], 0.2) is best
    with pytest.raises(VerifyError, match="no candidate direction lowers"):
        pick([scored(5, 1, 0.0)], 0.2)
    with pytest.raises(VerifyError, match="correlate"):
        pick([correlate], 0.2)
    with pytest.raises(VerifyError, match=r"KL 0\.500.*--max-kl"):
        pick([costly], 0.2)


def test_ablating_the_known_direction_stops_refusals_and_a_random_one_does_not(
    refusing: Refusing, finished: tuple[object, Path]
) -> None:
    model = load_model(refusing.folder, device="cpu", dtype="float32")
    rows = model.chat.encode(Path(refusing.options["harmful"]).read_text().splitlines()[:8])
    tokens = model.chat.tokenizer("I", add_special_tokens=False)["input_ids"]
    trial = Trial(model, plan_edit(open_checkpoint(refusing.folder)).sites, rows, rows, tokens, 8)
    known = Direction.load(finished[1] / "abliteration" / "directions.safetensors")
    other = np.random.default_rng(0).normal(size=64).astype(np.float32)
    random = dataclasses.replace(known, vector=other / np.linalg.norm(other))
    assert measure(trial, known).scores["ablated"] < 0 < measure(trial, random).scores["ablated"]
