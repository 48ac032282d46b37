"""Find the direction that carries refusal in a chat model's residual stream, and project it out of the weights.

Names are loaded when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate.activations.stats import ActivationStats
    from abliterate.direction.direction import Direction
    from abliterate.pipeline import evaluate, run
    from abliterate.prompts import PromptSet, load_prompts
    from abliterate.report.record import RunRecord

_HOMES = {
    "ActivationStats": "abliterate.activations.stats",
    "Direction": "abliterate.direction.direction",
    "PromptSet": "abliterate.prompts",
    "RunRecord": "abliterate.report.record",
    "evaluate": "abliterate.pipeline",
    "load_prompts": "abliterate.prompts",
    "run": "abliterate.pipeline",
}

__all__ = ["ActivationStats", "Direction", "PromptSet", "RunRecord", "evaluate", "load_prompts", "run"]


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'abliterate' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
