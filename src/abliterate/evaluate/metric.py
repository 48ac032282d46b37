"""One figure for base and edited model, as tables, charts and records hold it.

Owns its fields; never knows how any figure is taken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from abliterate.evaluate.intervals import Interval


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure for base and edited model: values, 95% intervals, number of prompts, method.

    Of a figure that compares the two (KL), the base value is its noise floor: the base against itself, prompt
    by prompt instead of in batches. `prompts` names the set, or the text, of which `n` counts windows.
    """

    name: str
    prompts: str
    base: float | None
    base_low: float | None
    base_high: float | None
    edited: float | None
    low: float | None
    high: float | None
    n: int
    method: str

    @classmethod
    def of(cls, name: str, prompts: str, base: Interval | None, edited: Interval, n: int, method: str) -> Metric:
        """The figure; one prompt says nothing of a spread, so it gets no interval."""

        def bounds(found: Interval | None) -> tuple[float | None, float | None, float | None]:
            if found is None:
                return None, None, None
            return (found.value, found.low, found.high) if n > 1 else (found.value, None, None)

        return cls(name, prompts, *bounds(base), *bounds(edited), n, method)

    @property
    def as_dict(self) -> dict[str, Any]:
        """The figure as JSON stores it."""
        return asdict(self)
