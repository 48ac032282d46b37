"""Tuning: the edit that is saved is the one that was measured, and it costs less than strength 1 everywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import abliterate
from abliterate import find
from abliterate import steps as step
from abliterate.checkpoint import open_checkpoint
from abliterate.contrast import Contrast
from abliterate.direction.answers import answered, divergence_along
from abliterate.direction.direction import Direction, candidates
from abliterate.direction.tune import Recipe, Task, tune
from abliterate.edit.plan import EditPlan, plan_edit
from abliterate.errors import UsageError, VerifyError
from abliterate.model.load import ChatModel
from abliterate.model.run import kl_divergence
from abliterate.observe import observe
from abliterate.options import Options
from abliterate.report.record import RunRecord
from abliterate.results import report
from abliterate.roles import prompt_splits
from tests.conftest import Refusing

QUICK = Recipe(stages=((3, 20.0),), further=(), batch=6)


@dataclasses.dataclass(frozen=True)
class _Given:
    task: Task
    chosen: Direction
    others: list[Direction]
    plan: EditPlan
    model: ChatModel


@pytest.fixture(scope="module")
def given_(refusing: Refusing) -> _Given:
    """All that tuning the refusing model takes."""
    options = Options(**refusing.options)
    checkpoint = open_checkpoint(refusing.folder)
    plan, model = plan_edit(checkpoint), step.load(refusing.folder, options)
    harmful, harmless = prompt_splits(options)
    seen = observe(model, harmful, harmless, options, step.no_steps)
    stats = step.collect_both(model, checkpoint, seen, harmful, harmless, options)
    chosen = find.select(model, plan, stats, Contrast(seen, harmful, harmless), options).direction
    rows = model.chat.encode
    lose = answered(model, rows(harmful.train.take(seen.harmful_train).prompts), 8, 32)
    keep = answered(model, rows(harmless.train.take(seen.harmless_train).prompts), 8, 32, distributions=True)
    kept = answered(model, rows(harmless.validation.prompts), 8, 32, distributions=True)
    task = Task(
        model, plan.sites, plan.places, seen.tokens, lose, keep, rows(harmful.validation.prompts), kept, lambda: 0,
        len(harmful.validation), 32,
    )  # fmt: skip
    return _Given(task, chosen, candidates(*stats, last_layer=3), plan, model)


def test_a_tuned_run_declines_no_more_and_costs_less_than_strength_1_everywhere(
    tuned: tuple[RunRecord, Path], finished: tuple[RunRecord, Path]
) -> None:
    record, plain = tuned[0], finished[0]
    points = record.front["points"]
    assert points[0]["kl_along"] > points[record.front["picked"]]["kl_along"]

    def edited(of: RunRecord, name: str) -> float:
        metric = of.metric(name)
        assert metric is not None
        return float(metric["edited"])

    assert edited(record, "kl_continuation") < edited(plain, "kl_continuation")
    base = record.metric("refusal_rate")
    assert base is not None and base["base"] > 0.9 and base["edited"] < 0.1
    assert len({e["strength"] for e in record.edits}) > 3
    assert {e["strength"] for e in plain.edits} == {1.0}


def test_the_saved_weights_do_what_was_measured_with_hooks(
    tuned: tuple[RunRecord, Path], refusing: Refusing, given_: _Given
) -> None:
    record, out = tuned
    point = record.front["points"][record.front["picked"]]
    edited = step.load(out, Options(**refusing.options))
    again = dataclasses.replace(given_.task, model=edited, sites=[], places=[])
    found = tune(again, given_.chosen, given_.others, dataclasses.replace(QUICK, stages=()))[0]
    assert found.score == pytest.approx(point["score"], abs=0.05)
    assert found.kl == pytest.approx(point["kl"], rel=0.2, abs=1e-4)
    base = tune(
        dataclasses.replace(again, model=given_.model), given_.chosen, [], dataclasses.replace(QUICK, stages=())
    )
    assert base[0].score > point["score"] + 2


def stop(*_: object) -> None:
    """What a person's Ctrl-C does."""
    raise KeyboardInterrupt


def interrupted(refusing: Refusing, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a tuned run that was interrupted when weights were to be written."""
    options = refusing.options | {"tune": True, "evaluate": False}
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("abliterate.pipeline.write_edited", stop)
        abliterate.run(str(refusing.folder), out, **options)
    return options


def test_an_interrupted_tuned_run_resumes_to_the_same_bytes(
    tuned: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = interrupted(refusing, tmp_path / "out", monkeypatch)
    with monkeypatch.context() as broken:
        broken.setattr("abliterate.find.tune", stop)
        abliterate.run(str(refusing.folder), tmp_path / "out", resume=True, **options)
    for shard in tuned[1].glob("model-*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_a_run_that_went_on_with_one_edit_takes_no_other(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = interrupted(refusing, tmp_path / "out", monkeypatch)
    page = report(tmp_path / "out.partial").read_text()
    assert "strength 1 everywhere leaves" in page and "is chosen for" in page
    with pytest.raises(UsageError, match=r"--target-refusals: .* went on without it"):
        abliterate.run(str(refusing.folder), tmp_path / "out", resume=True, target_refusals=0.9, **options)
    record = abliterate.run(str(refusing.folder), tmp_path / "target", target_refusals=0.9, **options)
    points, picked = record.front["points"], record.front["picked"]
    within = [p["kl_along"] for p in points if p["refused"] <= 0.9 * p["asked"]]
    assert record.front["rule"] == "target" and points[picked]["kl_along"] == min(within)


def test_tuning_that_was_asked_for_and_cannot_be_is_an_error(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abliterate.find.why_not_tuned", lambda *_: "the model runs block by block")
    options = {name: value for name, value in refusing.options.items() if name != "tune"} | {"evaluate": False}
    with pytest.raises(UsageError, match=r"--tune: .*block by block"):
        abliterate.run(str(refusing.folder), tmp_path / "out", tune=True, **options)
    record = abliterate.run(str(refusing.folder), tmp_path / "plain", **options)
    assert record.front["why_not"] == "the model runs block by block" and not record.tuned


def test_a_bound_that_no_edit_keeps_is_told_and_a_higher_one_goes_on_with_the_same_front(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = refusing.options | {"tune": True, "evaluate": False, "max_kl": 1e-9}, tmp_path / "out"
    with pytest.raises(VerifyError, match=r"every tuned edit.*go on with --resume and a higher --max-kl"):
        abliterate.run(str(refusing.folder), out, **options)
    assert not out.exists()
    monkeypatch.setattr("abliterate.find.tune", stop)  # which is done
    monkeypatch.setattr("abliterate.find.controls", stop)
    with pytest.raises(KeyboardInterrupt):
        abliterate.run(str(refusing.folder), out, resume=True, **options | {"max_kl": 0.2})
    with pytest.raises(UsageError, match=r"--max-kl: .* went on with 0\.2; resume with the same"):
        abliterate.run(str(refusing.folder), out, resume=True, **options | {"max_kl": 0.1})
    with pytest.raises(UsageError, match=r"other settings \(max_kl\)"):
        abliterate.run(str(refusing.folder), out, resume=True, **options | {"max_kl": 0.3})


def test_an_untuned_run_does_not_go_on_with_another_bound(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the direction was chosen within is what the result says it was."""
    options, out = refusing.options | {"tune": None, "evaluate": False}, tmp_path / "out"
    monkeypatch.setattr("abliterate.find.why_not_tuned", lambda *_: "the model runs block by block")
    with monkeypatch.context() as broken:
        broken.setattr("abliterate.find.unless_asked", stop)
        with pytest.raises(KeyboardInterrupt):
            abliterate.run(str(refusing.folder), out, **options | {"max_kl": 0.2})
    with pytest.raises(UsageError, match=r"--max-kl: .* went on with 0\.2"):
        abliterate.run(str(refusing.folder), out, resume=True, **options | {"max_kl": 0.1})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tune": True, "strength": 0.5}, "--tune: with --strength 0.5"),
        ({"tune": True, "keep_norms": True}, "--tune: with --keep-norms"),
        ({"target_refusals": 0.1, "tune": False}, "--target-refusals: with --no-tune"),
        ({"target_refusals": 5.0}, "--target-refusals 5: expected a share"),
    ],
)
def test_options_that_leave_nothing_to_tune_are_named(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Options(**given).check()  # type: ignore[arg-type]


def test_the_descent_is_the_same_under_a_seed_and_another_under_another(given_: _Given) -> None:
    first, again, other = (tune(given_.task, given_.chosen, given_.others, QUICK, seed)[1] for seed in (0, 0, 1))
    assert first.direction.strengths == again.direction.strengths != other.direction.strengths
    assert np.array_equal(first.direction.vector, again.direction.vector)
    assert np.linalg.norm(first.direction.vector) == pytest.approx(1, abs=1e-6)
    assert first.direction.strengths.keys() == {w.place for w in given_.plan.writers}


def test_a_high_rate_costs_less_and_a_low_one_removes_more(given_: _Given) -> None:
    dear, cheap = (
        tune(
            given_.task,
            given_.chosen,
            given_.others,
            dataclasses.replace(QUICK, stages=((3, rate),), learning_rate=0.15),
        )[1]
        for rate in (1000.0, 0.1)
    )
    assert dear.kl_along < cheap.kl_along and dear.score > cheap.score


def test_the_descent_goes_on_where_too_many_refusals_are_left(given_: _Given) -> None:
    recipe = dataclasses.replace(QUICK, stages=((1, 20.0),), further=((1, 10.0), (1, 7.0)))
    for left, rates in (([0, 0], [None, 20.0]), ([9, 9, 0], [None, 20.0, 10.0]), ([9] * 4, [None, 20.0, 10.0, 7.0])):
        counts = iter(left)
        task = dataclasses.replace(given_.task, count=lambda counts=counts: next(counts))
        found = tune(task, given_.chosen, given_.others, recipe)
        assert [p.rate for p in found] == rates and [p.refused for p in found] == left
        assert [p.steps for p in found] == list(range(len(left)))


def test_further_directions_stay_orthogonal_while_the_first_turns(given_: _Given) -> None:
    second = np.linalg.qr(np.stack([given_.chosen.vector, np.eye(64, dtype=np.float32)[5]]).T)[0].T[1]
    two = dataclasses.replace(given_.chosen, vector=np.stack([given_.chosen.vector, second]).astype(np.float32))
    found = tune(given_.task, two, given_.others, dataclasses.replace(QUICK, learning_rate=0.3))[1].direction.vector
    assert np.allclose(found @ found.T, np.eye(2), atol=1e-5)
    assert np.allclose(found[1], second, atol=1e-6) and not np.allclose(found[0], two.vector[0], atol=1e-3)


def test_divergence_by_the_likeliest_tokens_is_that_of_the_whole_vocabulary() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(5, 300).mul(3).log_softmax(-1) for _ in range(2))
    whole = kl_divergence(p, q)
    found = divergence_along(p.topk(256, -1), q)
    assert torch.allclose(found, whole, rtol=0.02) and (found <= whole + 1e-5).all()
    assert divergence_along(p.topk(256, -1), p).abs().max() < 1e-5
