"""The front and the choice on it: nothing chosen is beaten by what was passed, and no bound is broken."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.direction.direction import Direction
from abliterate.direction.front import Point, front, knee, pick
from abliterate.errors import VerifyError

ANY = Direction(np.eye(4, dtype=np.float32)[0], 1, -1, 1.0)


def point(refused: int, kl: float, along: float, score: float = 0.0) -> Point:
    return Point(ANY, refused, 48, score, kl, along)


points = st.lists(
    st.builds(point, st.integers(0, 48), st.floats(0, 1), st.floats(0, 0.5), st.floats(-5, 5)), min_size=1, max_size=12
)


@given(points)
def test_no_point_beats_one_of_the_front_and_every_other_is_beaten(passed: list[Point]) -> None:
    kept = front(passed)
    for p in kept:
        assert not any(q.refused <= p.refused and q.kl_along < p.kl_along for q in passed)
        assert not any(q.refused < p.refused and q.kl_along <= p.kl_along for q in passed)
    for p in passed:
        assert any(q.refused <= p.refused and q.kl_along <= p.kl_along for q in kept)
    costs = [p.kl_along for p in kept]
    assert costs == sorted(costs) and len({p.refused for p in kept}) == len(kept)


@given(points, st.floats(0, 1), st.one_of(st.none(), st.floats(0, 1)))
def test_what_is_picked_keeps_every_bound_or_the_error_says_what_is_possible(
    passed: list[Point], max_kl: float, target: float | None
) -> None:
    try:
        found, rule = pick(passed, passed[0], 30, max_kl, target)
    except VerifyError as error:
        assert not [p for p in passed if p.kl <= max_kl and (target is None or p.share <= target)]
        assert "--max-kl" in str(error)
        return
    within = [p for p in passed if p.kl <= max_kl]
    assert found in within
    assert not any(p.refused <= found.refused and p.kl_along < found.kl_along for p in within)
    assert rule == ("knee" if target is None else "target")
    if target is not None:
        assert found.share <= target
        assert not any(p.kl_along < found.kl_along and p.share <= target for p in within)


def test_the_knee_weighs_shares_of_the_bases_refusals_against_shares_of_the_plain_cost() -> None:
    plain, timid, bold = point(0, 0.1, 0.04), point(10, 0.01, 0.002), point(1, 0.04, 0.008)
    assert knee([plain, timid, bold], plain, 30) is bold
    assert knee([plain, timid], plain, 30) is timid
    assert knee([plain, point(29, 0.001, 0.002)], plain, 30) is plain


def test_an_unreachable_target_names_the_fewest() -> None:
    with pytest.raises(VerifyError, match=r"--target-refusals 0.01.*fewest: 1 of 48, 2.1%, at KL 0.040"):
        pick([point(20, 0.01, 0.002), point(1, 0.04, 0.008)], point(0, 0.1, 0.04), 30, 0.2, 0.01)
