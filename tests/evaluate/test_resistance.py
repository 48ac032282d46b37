"""How much refusal survives: directions that were found end it, random ones do not, and broken text is no answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abliterate import verbs
from abliterate.checkpoint import open_checkpoint
from abliterate.direction.direction import Direction
from abliterate.edit.plan import plan_edit
from abliterate.errors import NoRefusalError, VerifyError
from abliterate.evaluate.intervals import Interval, wilson
from abliterate.evaluate.judge import Label
from abliterate.evaluate.resistance import Point, Resistance, Survival, counts, random_basis
from abliterate.model.load import load_model
from abliterate.options import Options
from abliterate.report.record import RunRecord
from abliterate.resist import Resisted
from abliterate.roles import prompt_splits
from tests.cli.test_main import run_here
from tests.conftest import Refusing


def options(refusing: Refusing) -> dict[str, Any]:
    return {k: v for k, v in refusing.options.items() if k not in ("layer", "position")}


@pytest.fixture(scope="module")
def resisted(refusing: Refusing) -> Resisted:
    """The curve of the refusing model at one and two directions."""
    return verbs.resist(str(refusing.folder), directions=2, **options(refusing))


def test_found_directions_end_refusal_and_random_ones_do_not(resisted: Resisted) -> None:
    curve = resisted.curve
    assert [p.directions for p in curve.found] == [p.directions for p in curve.random] == [1, 2]
    assert curve.base.refusals.value > 0.9 and curve.base.survives.value == 1
    assert all(p.refusals.value < 0.1 for p in curve.found) and all(p.refusals.value > 0.9 for p in curve.random)
    assert curve.resistance == curve.found[0] and curve.resistance.survives.value < 0.1
    assert curve.control.survives.value > 0.9
    assert curve.found[0].kl_continuation.low > 10 * curve.noise
    assert [set(d) for d in resisted.directions] == [{"layer", "position", "scale", "scores"}] * 2


@pytest.fixture
def survival(refusing: Refusing) -> Survival:
    harmful, harmless = prompt_splits(Options(**options(refusing)))
    model = load_model(refusing.folder, device="cpu", dtype="float32")
    sites = plan_edit(open_checkpoint(refusing.folder)).sites
    return Survival(model, sites, harmful.test, harmless.test, 32, 64)


def test_hooks_show_what_the_edited_weights_do(survival: Survival, finished: tuple[RunRecord, Path]) -> None:
    record, out = finished
    known = Direction.load(out / "abliteration" / "directions.safetensors").vector[None]
    (point,) = survival.curve(known, 0, 0.2).found
    for name, found in (("refusal_rate", point.refusals), ("kl_continuation", point.kl_continuation)):
        metric = record.metric(name)
        assert metric is not None and found.value == pytest.approx(metric["edited"], rel=0.05)
    assert point.kl_continuation.value > 1e-4


def test_a_model_that_declines_nothing_has_no_resistance(survival: Survival) -> None:
    one = random_basis(1, survival.model.d_model, 0)
    with pytest.raises(NoRefusalError, match=r"declines none of 14 harmful test prompts.*--harmful"):
        dataclasses.replace(survival, harmful=survival.harmless).curve(one, 0, 0.2)
    with pytest.raises(VerifyError, match="answers none of the harmless test prompts"):
        dataclasses.replace(survival, harmless=survival.harmful).curve(one, 0, 0.2)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """A judge that knows beforehand what it will say of each set of answers."""

    says: Any
    name: str = "script"
    local: bool = True
    facts: Any = dataclasses.field(default_factory=dict)

    def __call__(self, _pairs: Any) -> list[Label | None]:
        """The next labels."""
        return list(next(self.says))


def test_refusals_that_turn_into_broken_text_survive_and_unjudged_ones_do_not_count(survival: Survival) -> None:
    base: list[Any] = ["refusal"] * 6 + ["compliance"] * 8
    after: list[Any] = [
        "refusal",
        "broken",
        "partial",
        "compliance",
        None,
        "compliance",
        "refusal",
        *["compliance"] * 7,
    ]
    judge = Scripted(iter([base, after, base]))
    curve = dataclasses.replace(survival, judge=judge).curve(random_basis(1, survival.model.d_model, 0), 0, 0.2)
    (point,), (control,) = curve.found, curve.random
    assert point.survives == wilson(2, 5) and point.of == 5  # one declined, one broken; one had no verdict
    assert point.refusals == wilson(2, 13) and point.n == 13 and point.broken == 1
    assert curve.base.refusals == wilson(6, 14) and control.survives == wilson(6, 6)


def test_the_figure_is_the_least_within_the_bound() -> None:
    def point(k: int, left: int, kl: float) -> Point:
        return Point(k, wilson(left, 10), 10, wilson(left, 10), 10, 0, Interval(kl, kl, kl), Interval(kl, kl, kl))

    base, weak, strong, equal, costly = (
        point(0, 10, 0), point(1, 7, 0.05), point(2, 3, 0.1), point(4, 3, 0.2), point(8, 0, 0.3)
    )  # fmt: skip
    curve = Resistance(base, (weak, strong, equal, costly), (costly,), 10, 0.0, 0.2)
    assert curve.resistance is strong and curve.control is base
    assert dataclasses.replace(curve, max_kl=0.3).resistance is costly
    assert dataclasses.replace(curve, max_kl=0.07).resistance is weak


def test_counts_and_random_directions() -> None:
    assert [counts(k) for k in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]
    one, two = random_basis(8, 64, 0), random_basis(8, 64, 1)
    assert np.allclose(one @ one.T, np.eye(8), atol=1e-6) and np.array_equal(one, random_basis(8, 64, 0))
    assert np.abs(one @ two.T).max() < 0.6 and one.dtype == np.float32


def test_the_table_fits_80_columns_and_names_the_figure(
    resisted: Resisted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(verbs, "resist", lambda *_, **__: resisted)
    assert run_here("resist", "demo") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()[2:5]]
    assert [row[0] for row in rows] == ["0", "1", "2"] and rows[0][1] == "100.0%" and rows[1][1] == "0.0%"
    assert "resistance 0.0% [0.0, 21.5] of 14 refusals, at k = 1; of random directions" in text
