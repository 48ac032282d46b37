"""A direction as a value, the candidates that two sets of statistics give, and their file.

Owns the difference of means and `directions.safetensors`; never knows models or weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.activations.stats import ActivationStats
from abliterate.errors import CheckpointError, VerifyError
from abliterate.portable import load_arrays, save_arrays

KIND = "a direction"
METHOD = "difference of means, orthogonal to the harmless mean"


@dataclass(frozen=True)
class Direction:
    """A unit vector `[d_model]` in the residual stream, and how it was found.

    `scale` is the norm of the orthogonal part of the difference of means; `layer` counts from 0,
    `position` is negative, from the prompt's end; `scores` holds the causal test's figures; `source`
    the hashes of the model and prompts it came from.
    """

    vector: npt.NDArray[np.float32]
    layer: int
    position: int
    scale: float
    method: str = METHOD
    scores: dict[str, float] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> dict[str, Any]:
        """Everything but the vector, for records and tables."""
        return {k: v for k, v in asdict(self).items() if k != "vector"}

    def save(self, path: Path) -> None:
        """Write the direction as safetensors, its history as metadata."""
        save_arrays(path, KIND, {"direction": self.vector}, self.where)

    @classmethod
    def load(cls, path: Path) -> Direction:
        """Read what `save` wrote.

        Raises:
            CheckpointError: no such file, not a direction of this schema, or not a unit vector.
        """
        arrays, note = load_arrays(path, KIND)
        if arrays.keys() != {"direction"} or note.keys() != {f.name for f in fields(cls)} - {"vector"}:
            raise CheckpointError(f"{path}: damaged: holds {', '.join(sorted({*arrays, *note}))}; make it again")
        vector = arrays["direction"].astype(np.float32)
        norm = float(np.linalg.norm(vector))
        if vector.ndim != 1 or not abs(norm - 1) <= 1e-4:
            raise CheckpointError(
                f"{path}: holds shape {list(vector.shape)} of norm {norm:g}; expected one unit vector [d_model]"
            )
        return cls(vector, **note)


def candidates(harmful: ActivationStats, harmless: ActivationStats, last_layer: int) -> list[Direction]:
    """`r[l, i] = mean_harmful − mean_harmless`, orthogonal to `mean_harmless`, for all positions, below `last_layer`.

    `r − (r·μ̂) μ̂` with `μ = mean_harmless` is what refusal adds to an ordinary activation; along `μ` itself the
    model keeps what every answer needs. The difference is taken in float64 before normalising (arXiv 2406.11717,
    §2.3): the two means point almost the same way, and what is left after subtraction must not be rounding.
    Returned as unit vectors; `scale` is the norm before that.

    Raises:
        VerifyError: the statistics are of different models, or of the same prompts.
    """
    if harmful.model != harmless.model or harmful.positions != harmless.positions:
        raise VerifyError("the two statistics are of different models or templates; collect both from the same one")
    if harmful.prompts == harmless.prompts:
        raise VerifyError("the two statistics are of the same prompts; there is nothing to contrast")
    found = []
    for layer in range(last_layer):
        for index, position in enumerate(harmful.positions):
            mean = harmless.mean[layer, index]
            size = float(np.linalg.norm(mean))
            r = harmful.mean[layer, index] - mean
            if size:
                r -= (r @ mean / size) * (mean / size)
            scale = float(np.linalg.norm(r))
            # Where template tokens cannot see the request yet, or the first layers add nothing, r is rounding.
            if scale > 1e-6 * size:
                source = {"model": harmful.model, "harmful": harmful.prompts, "harmless": harmless.prompts}
                found.append(Direction((r / scale).astype(np.float32), layer, position, scale, source=source))
    return found


def most_separated(found: list[Direction], harmful: ActivationStats, harmless: ActivationStats) -> Direction:
    """The candidate whose means lie furthest apart in units of the spread: `‖r‖² / Σ (σ²_harmful + σ²_harmless) r̂²`.

    A choice without a causal test, for a model that refuses nothing to test on (`--force`).
    """

    def separation(d: Direction) -> float:
        index = harmful.positions.index(d.position)
        spread = harmful.variance[d.layer, index] + harmless.variance[d.layer, index]
        return d.scale**2 / (float(spread @ d.vector.astype(np.float64) ** 2) + 1e-12)

    return max(found, key=separation)
