"""A front instead of a point: what each tried edit leaves of refusal and what it costs, and the choice among them.

Owns the comparison of measured points; never measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.direction.direction import Direction
from abliterate.errors import VerifyError

_FIGURES = ("refused", "asked", "score", "kl", "kl_along", "rate", "steps", "held")


@dataclass(frozen=True, eq=False)
class Point:
    """One edit and what it does on validation prompts.

    `refused` of `asked` harmful prompts are still declined; `score` is their mean refusal score; `kl` the mean
    first-token KL(base‖edited) of the harmless prompts that the base answers, `kl_along` the mean of it over the tokens
    of its answers, in nats. `rate` is what a nat was worth in refusal log-odds where the point was tuned, None where
    nothing was. `held` is how many refusals are left of those that are to stay.
    """

    direction: Direction
    refused: int
    asked: int
    score: float
    kl: float
    kl_along: float
    rate: float | None = None
    steps: int = 0
    held: int | None = None

    @property
    def share(self) -> float:
        """Share of the harmful prompts still declined."""
        return self.refused / self.asked

    @property
    def figures(self) -> dict[str, Any]:
        """Everything but the direction, for records and charts."""
        return {name: getattr(self, name) for name in _FIGURES}


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both refusals and KL along the answer, from the cheapest on."""
    kept = list[Point]()
    for point in sorted(points, key=lambda p: (p.kl_along, p.refused, p.score)):
        if not kept or point.refused < kept[-1].refused:
            kept.append(point)
    return kept


def knee(points: Sequence[Point], plain: Point, base_refused: int) -> Point:
    """The point where one more share of refusals costs as much as it is worth.

    The least `2 · refused / base_refused + kl_along / plain.kl_along`: a share of the base's refusals weighs twice as
    much as the same share of what the plain edit (strength 1 everywhere) costs.
    """
    scale = plain.kl_along or 1.0
    return min(points, key=lambda p: (2 * p.refused / max(1, base_refused) + p.kl_along / scale, p.kl_along))


def pick(
    points: Sequence[Point],
    plain: Point,
    base_refused: int,
    max_kl: float,
    target: float | None,
    least_held: int = 0,
) -> tuple[Point, str]:
    """The point to take, and by which rule: the cheapest with at most `target` refusals, or the knee.

    Only points of first-token KL up to `max_kl` are considered that leave `least_held` of the refusals that stay.

    Raises:
        VerifyError: there is none, or none with so few refusals.
    """
    holding = [p for p in points if p.held is None or (p.held >= least_held and p.refused < base_refused)]
    if not holding:
        tried = ", ".join(f"{p.refused} and {p.held}" for p in points)
        raise VerifyError(
            f"no edit stops false refusals and keeps true ones: of {base_refused} false refusals of the validation "
            f"prompts and the true ones, of which {least_held} must stay, the edits leave {tried}; here the two do not "
            "come apart; leave out --keep, or give other false refusals with --borderline"
        )
    cheap = front([p for p in holding if p.kl <= max_kl])
    if not cheap:
        least = min(holding, key=lambda p: p.kl)
        raise VerifyError(
            f"every tuned edit moves harmless answers by more than {max_kl:g} nats (the least: KL {least.kl:.3f} at "
            f"{least.refused} of {least.asked} refusals); go on with --resume and a higher --max-kl to accept it"
        )
    if target is None:
        return knee(cheap, plain, base_refused), "knee"
    few = [p for p in cheap if p.share <= target]
    if not few:
        least = min(cheap, key=lambda p: p.refused)
        raise VerifyError(
            f"--target-refusals {target:g}: no tuned edit leaves so few (the fewest: {least.refused} of {least.asked}, "
            f"{least.share:.1%}, at KL {least.kl:.3f}); go on with --resume, and ask for that, raise "
            "--max-kl, or leave it out"
        )
    return min(few, key=lambda p: p.kl_along), "target"
