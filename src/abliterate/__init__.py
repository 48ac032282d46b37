"""Find the direction that carries refusal in a chat model's residual stream, and project it out of the weights.

    import abliterate

    record = abliterate.run("demo", "demo-abliterated")
    print(record.metric("refusal_rate"))

Names are loaded when first used, so that importing the package costs nothing. The steps one by one are in
`abliterate.verbs`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate import verbs
    from abliterate.activations.stats import ActivationStats
    from abliterate.direction.direction import Direction
    from abliterate.pipeline import run
    from abliterate.prompts import PromptSet, load_prompts
    from abliterate.report.record import RunRecord

__all__ = ["ActivationStats", "Direction", "PromptSet", "RunRecord", "load_prompts", "run", "verbs"]

_HOMES = {
    "ActivationStats": "abliterate.activations.stats",
    "Direction": "abliterate.direction.direction",
    "PromptSet": "abliterate.prompts",
    "RunRecord": "abliterate.report.record",
    "load_prompts": "abliterate.prompts",
    "run": "abliterate.pipeline",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name == "verbs":
        return importlib.import_module("abliterate.verbs")
    if name not in _HOMES:
        raise AttributeError(f"module 'abliterate' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
