"""Step 2: candidates, the causal choice among them, and the direction's file. Never knows how weights are stored."""

from abliterate.direction.choose import choose
from abliterate.direction.direction import Direction

__all__ = ["Direction", "choose"]
