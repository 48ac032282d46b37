"""How long work reports what it has done: a function called with the number of units just finished."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int], None]
#: Announces a step by title and number of units, and returns what reports on it.
Steps = Callable[[str, int], Progress]


def silent(_done: int) -> None:
    """Report nothing."""


def no_steps(_title: str, _total: int) -> Progress:
    """Announce nothing."""
    return silent
