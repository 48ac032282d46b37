"""How long work reports what it has done: a function called with the number of units just finished."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int], None]


def silent(_done: int) -> None:
    """Report nothing."""
