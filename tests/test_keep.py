"""--keep harmful: false refusals go and true ones stay, where the two have directions of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import abliterate
from abliterate.direction.direction import Direction, apart
from abliterate.direction.front import Point, pick
from abliterate.errors import UsageError, VerifyError
from abliterate.options import Options
from abliterate.prompts import builtin
from abliterate.roles import prompt_sets
from tests.conftest import Refusing
from tests.organism import HARMFUL_VERBS, HARMLESS_VERBS, requests


def direction(vector: list[float], layer: int = 1) -> Direction:
    given = np.array(vector, np.float64)
    return Direction((given / np.linalg.norm(given)).astype(np.float32), layer, -1, float(np.linalg.norm(given)))


def test_a_direction_of_false_refusals_holds_nothing_of_true_ones_at_its_place() -> None:
    false = [direction([1, 2, 0]), direction([1, 1, 1], 2), direction([0, 1, 0.01], 3), direction([1, 0, 0], 4)]
    true = [direction([0, 1, 0]), direction([1, 0, 0], 2), direction([0, 1, 0], 3)]
    found = apart(false, true)
    assert [d.layer for d in found] == [1, 2]  # at 3 nothing is left, at 4 there is no other
    for d, v in zip(found, true, strict=False):
        assert abs(d.vector @ v.vector) < 1e-6 and np.linalg.norm(d.vector) == pytest.approx(1, abs=1e-6)
    assert np.allclose(found[0].vector, [1, 0, 0]) and found[0].scale == pytest.approx(1)
    assert "true refusals" in found[0].method
    assert abs(false[0].vector @ true[0].vector) > 0.5


def test_an_edit_that_loses_true_refusals_is_not_taken() -> None:
    def point(refused: int, along: float, held: int) -> Point:
        return Point(direction([1, 0]), refused, 48, 0.0, along, along, held=held)

    plain, gentle = point(0, 0.1, 20), point(5, 0.01, 29)
    assert pick([plain, gentle], plain, 24, 0.2, None, least_held=28)[0] is gentle
    assert pick([plain, gentle], plain, 24, 0.2, None, least_held=0)[0] is gentle
    assert pick([plain, point(20, 0.01, 29)], plain, 24, 0.2, 0.05, least_held=20)[0] is plain
    for base, least in ((24, 30), (5, 28)):  # true refusals are lost, or no false ones are stopped
        with pytest.raises(
            VerifyError, match=rf"of {base} false.*{least} must stay, the edits leave 0 and 20, 5 and 29"
        ):
            pick([plain, gentle], plain, base, 0.2, None, least_held=least)


def test_the_sets_have_other_roles_and_no_prompt_has_two() -> None:
    usual, keeping = prompt_sets(Options()), prompt_sets(Options(keep="harmful"))
    assert usual.lose is usual.harmful and usual.described.keys() == {"harmful", "harmless", "borderline"}
    assert usual.described["borderline"].keys() == {"test"}
    assert keeping.lose.train.sha256 == builtin("borderline", "train").head(64).sha256
    assert keeping.borderline.sha256 == usual.borderline.sha256 == keeping.lose.test.sha256
    assert keeping.described["borderline"].keys() == {"train", "validation", "test"}
    parts = [*keeping.harmful, *keeping.harmless, *keeping.lose]
    assert len({p for part in parts for p in part.prompts}) == sum(map(len, parts))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": "harmless"}, "--keep harmless: expected harmful"),
        ({"keep": "harmful", "strength": -0.5}, "not with --strength -0.5"),
        ({"keep": "harmful", "directions": 2}, "not with --directions 2"),
    ],
)
def test_what_does_not_go_together_is_named(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Options(**given).check()  # type: ignore[arg-type]


def test_where_false_and_true_refusals_are_one_feature_no_edit_is_taken(refusing: Refusing, tmp_path: Path) -> None:
    """The tiny model declines by one feature: what stops some of its refusals stops all, and the run says so."""
    half = len(HARMFUL_VERBS) // 2
    files = {}
    for name, verbs in (
        ("harmful", HARMFUL_VERBS[:half]),
        ("borderline", HARMFUL_VERBS[half:]),
        ("harmless", HARMLESS_VERBS),
    ):
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n".join(requests(verbs)))
    options = refusing.options | {name: str(file) for name, file in files.items()} | {"limit": 8}
    with pytest.raises(VerifyError) as caught:
        abliterate.run(str(refusing.folder), tmp_path / "out", **(options | {"keep": "harmful", "tune": True}))
    assert any(words in str(caught.value) for words in ("true refusals", "no candidate", "every candidate"))
    assert not (tmp_path / "out").exists()
    assert abliterate.run(str(refusing.folder), tmp_path / "all", **options).edits
