"""Step 1: streaming statistics of the residual stream per layer and position. Never knows directions."""

from abliterate.activations.collect import collect
from abliterate.activations.stats import ActivationStats

__all__ = ["ActivationStats", "collect"]
