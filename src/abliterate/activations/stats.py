"""Running mean and variance of activations, and their file.

Owns the statistics as a value: merge, save, load. Never keeps single activations; never knows directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from abliterate.portable import load_arrays, save_arrays

KIND = "activation statistics"
Float64Array = npt.NDArray[np.float64]


def _together(
    n: float, mean: Float64Array, m2: Float64Array, more: float, of_more: Float64Array, m2_of_more: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Mean and sum of squared deviations of `n` values and `more` together, exactly (Chan et al. 1979)."""
    delta, share = of_more - mean, more / (n + more)
    return mean + delta * share, m2 + m2_of_more + delta**2 * (n * share)


class RunningStats:
    """Means and sums of squared deviations of values that come in pieces: `[n_layers, n_positions, d_model]`."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.mean, self.m2 = np.zeros(shape), np.zeros(shape)
        self.count = np.zeros(shape[0])

    def add(self, layer: int, values: Float64Array) -> None:
        """Fold in values `[n, n_positions, d_model]` of one layer."""
        center = values.mean(0)
        own = self.count[layer], self.mean[layer], self.m2[layer]
        self.mean[layer], self.m2[layer] = _together(*own, len(values), center, ((values - center) ** 2).sum(0))
        self.count[layer] += len(values)


@dataclass(frozen=True, slots=True)
class ActivationStats:
    """Statistics of one prompt set at one site of one model.

    `mean` and `m2` (the sum of squared deviations) are `[n_layers, n_positions, d_model]` in float64;
    `positions` are negative, counted from the prompt's end; `count` is the number of prompts.
    """

    site: str
    positions: tuple[int, ...]
    count: int
    mean: Float64Array
    m2: Float64Array
    prompts: str
    model: str

    @property
    def variance(self) -> Float64Array:
        """Unbiased variance, `[n_layers, n_positions, d_model]`."""
        return self.m2 / max(1, self.count - 1)

    def merge(self, other: ActivationStats) -> ActivationStats:
        """The statistics of both prompt sets together, exactly."""
        assert self.positions == other.positions and self.site == other.site
        mean, m2 = _together(self.count, self.mean, self.m2, other.count, other.mean, other.m2)
        prompts = f"{self.prompts}+{other.prompts}"
        return ActivationStats(self.site, self.positions, self.count + other.count, mean, m2, prompts, self.model)

    def save(self, path: Path) -> None:
        """Write the statistics as safetensors."""
        note = {k: getattr(self, k) for k in ("site", "positions", "count", "prompts", "model")}
        save_arrays(path, KIND, {"mean": self.mean, "m2": self.m2}, note)

    @classmethod
    def load(cls, path: Path) -> ActivationStats:
        """Read what `save` wrote.

        Raises:
            CheckpointError: no such file, or not activation statistics of this schema.
        """
        arrays, note = load_arrays(path, KIND)
        mean, m2 = (arrays[name].astype(np.float64) for name in ("mean", "m2"))
        return cls(mean=mean, m2=m2, **(note | {"positions": tuple(note["positions"])}))
