"""Controls: which directions they are, what they say of a cause and of one that is none, and that the run says so."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from abliterate.activations.collect import collect
from abliterate.checkpoint import open_checkpoint
from abliterate.direction.choose import Trial
from abliterate.direction.controls import RANDOM, controls, random_like
from abliterate.direction.direction import Direction
from abliterate.edit.plan import plan_edit
from abliterate.model.hooks import ablate
from abliterate.model.load import load_model
from abliterate.model.run import first_token_log_probs
from abliterate.prompts import PromptSet
from abliterate.report.page import page
from abliterate.report.record import RunRecord
from abliterate.report.table import print_run
from tests.conftest import Refusing
from tests.organism import HARMFUL_VERBS, HARMLESS_VERBS, requests

HARMLESS = requests(HARMLESS_VERBS)


@pytest.fixture(scope="module")
def trial(refusing: Refusing) -> Trial:
    """The organism, 12 prompts of each kind, and the token that opens its refusals."""
    model = load_model(refusing.folder, device="cpu", dtype="float32")
    harmful, harmless = (model.chat.encode(given[:12]) for given in (requests(HARMFUL_VERBS), HARMLESS))
    tokens = model.chat.tokenizer.convert_tokens_to_ids(["I"])
    return Trial(model, plan_edit(open_checkpoint(refusing.folder)).sites, harmful, harmless, tokens, batch_size=16)


@pytest.fixture(scope="module")
def cause(finished: tuple[RunRecord, Path]) -> Direction:
    """The direction that is known to carry its refusal."""
    return Direction.load(finished[1] / "abliteration" / "directions.safetensors")


def harmless(n: int = 24) -> PromptSet:
    return PromptSet("harmless", tuple(HARMLESS[-n:]), ("",) * n)


def test_random_directions_are_orthonormal_of_the_same_shape_and_of_their_seed(cause: Direction) -> None:
    for shape in ((64,), (3, 64)):
        chosen = dataclasses.replace(cause, vector=np.zeros(shape, np.float32))
        found, again, others = (random_like(chosen, 5, seed) for seed in (1, 1, 2))
        for d, same, other in zip(found, again, others, strict=True):
            rows = np.atleast_2d(d.vector)
            assert d.vector.shape == shape and np.allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-6)
            assert np.array_equal(d.vector, same.vector) and not np.allclose(d.vector, other.vector)
        assert len({d.vector.tobytes() for d in found}) == 5


def test_a_cause_surpasses_its_controls_and_a_random_direction_does_not(trial: Trial, cause: Direction) -> None:
    found = controls(trial, cause, harmless(), seed=0)
    falls = [found["base"] - f["score"] for f in (found["chosen"], *found["random"], found["harmless"])]
    assert len(found["random"]) == RANDOM and falls[0] > 4 * max(falls[1:])
    assert 0 < found["margin_low"] < found["margin"] == pytest.approx(falls[0] - max(falls[1:]))
    (noise,) = random_like(cause, 1, seed=99)
    found = controls(trial, noise, harmless(), seed=0)
    assert found["margin_low"] < 0 and found["base"] - found["chosen"]["score"] < falls[0] / 4


def test_what_the_chosen_one_scores_is_what_ablation_of_it_gives(trial: Trial, cause: Direction) -> None:
    found = controls(trial, cause, harmless(), seed=0)
    with ablate(trial.model, trial.sites, torch.from_numpy(cause.vector)):
        p = first_token_log_probs(trial.model, trial.harmful, 16).exp()[:, trial.tokens].sum(-1)
    assert found["chosen"]["score"] == pytest.approx((p / (1 - p)).log().mean().item(), abs=1e-3)


def test_controls_have_the_strengths_of_the_edit(trial: Trial, cause: Direction) -> None:
    none = [dataclasses.replace(site, strength=0.0) for site in trial.sites]
    found = controls(dataclasses.replace(trial, sites=none), cause, harmless(), seed=0)
    for figures in (found["chosen"], *found["random"], found["harmless"]):
        assert figures["score"] == pytest.approx(found["base"], abs=1e-4) and abs(figures["kl"]) < 1e-6
    assert abs(found["margin"]) < 1e-4


def test_at_a_strength_below_0_the_score_must_rise(trial: Trial, cause: Direction) -> None:
    added = dataclasses.replace(trial, harmful=trial.harmless, strength=-1.0)
    found = controls(added, dataclasses.replace(cause, vector=-cause.vector), harmless(), seed=0)
    assert found["margin"] == pytest.approx(
        found["chosen"]["score"] - max(f["score"] for f in (*found["random"], found["harmless"]))
    )


def test_halves_are_contrasted_like_the_direction_itself(trial: Trial, cause: Direction) -> None:
    seen: list[Direction] = []

    class Spy(Trial):
        def ablated(self, directions: list[Direction], *args: Any, **options: Any) -> Any:
            seen.extend(directions)
            return super().ablated(directions, *args, **options)

    spy = Spy(**{f.name: getattr(trial, f.name) for f in dataclasses.fields(trial)})
    controls(spy, cause, harmless(), seed=0)
    even, odd = (harmless().take(list(range(start, 24, 2))) for start in (0, 1))
    assert cause.layer is not None and cause.position is not None
    mean, other = (collect(trial.model, s).mean[cause.layer, cause.position] for s in (even, odd))
    r = other - mean - ((other - mean) @ mean) / (mean @ mean) * mean
    assert abs(seen[-1].vector @ r) == pytest.approx(np.linalg.norm(r), rel=1e-4)
    seen.clear()
    two = dataclasses.replace(cause, vector=random_like(cause, 1, 5)[0].vector[None].repeat(2, 0))
    controls(spy, two, harmless(), seed=0)
    assert all(d.vector.shape == (2, 64) for d in seen)
    assert np.allclose(seen[-1].vector @ seen[-1].vector.T, np.eye(2), atol=1e-6)
    assert controls(trial, cause, harmless(1), seed=0)["harmless"] is None


def said(record: RunRecord) -> str:
    console = Console(width=200, file=io.StringIO())
    print_run(console, record, "out")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_holds_its_controls_and_warns_where_the_direction_does_no_better(
    finished: tuple[RunRecord, Path],
) -> None:
    record, _ = finished
    assert record.controls["margin_low"] > 0 and record.seconds["controls"] > 0
    text = said(record)
    assert f"controls refusal score base {record.controls['base']:.1f}, chosen" in text and "4 random" in text
    assert "no better" not in text and "no better" not in page(record, "out")
    none = {"score": -0.04, "kl": 0.0}
    near = dataclasses.replace(record, controls=record.controls | {"random": [none, none], "base": -0.01})
    assert "base 0.0, chosen" in said(near) and "2 random directions 0.0 (KL 0.000 at most)" in said(near)
    weak = dataclasses.replace(record, controls=record.controls | {"margin_low": -0.1})
    assert "no better than its controls" in said(weak).splitlines()[-2]
    assert "no better than its controls" in page(weak, "out") and "less 1.96" in page(record, "out")
    without = dataclasses.replace(record, controls={})
    assert "controls" not in said(without) and 'id="controls"' not in page(without, "out")


def test_without_refusal_tokens_nothing_is_tried(
    finished: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import abliterate
    from abliterate import find

    def never(*_a: object, **_k: object) -> Callable[..., None]:
        raise AssertionError("controls were tried")

    monkeypatch.setattr(find.controlling, "controls", never)
    record = abliterate.run(str(finished[1]), tmp_path / "out", force=True, evaluate=False, **refusing.options)
    assert record.controls == {}


def test_places_tuned_to_a_strength_of_0_are_left_out_of_edit_and_controls(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import abliterate
    from abliterate import pipeline

    tune = pipeline._Run.tune

    def tuned(self: Any, observed: Any, stats: Any, chosen: Direction) -> Any:
        direction = dataclasses.replace(chosen, strengths=dict.fromkeys(self.plan.places, 0.0) | {"embed": 1.0})
        return tune(self, observed, stats, direction)

    monkeypatch.setattr(pipeline._Run, "tune", tuned)
    record = abliterate.run(str(refusing.folder), tmp_path / "out", evaluate=False, **refusing.options)
    assert len(record.edits) == 1 and record.controls["chosen"]["score"] < record.controls["base"]
