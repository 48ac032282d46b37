"""A direction as a value, the candidates that two sets of statistics give, and their file.

Owns the difference of means and `directions.safetensors`; never knows models or weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.activations.stats import ActivationStats
from abliterate.errors import CheckpointError, VerifyError
from abliterate.portable import load_arrays, save_arrays

KIND = "a direction"
METHOD = "difference of means, orthogonal to the harmless mean"
DIFFERENCE = "difference of means"
#: Share of a candidate's norm that must be left beside another direction, so that it is no rounding.
_LEAST_SHARE = 0.05
#: Fields that files of earlier versions lack.
_LATER = {"strengths", "parts", "stopped", "offset"}


@dataclass(frozen=True)
class Direction:
    """A unit vector `[d_model]` in the residual stream, or an orthonormal basis `[k, d_model]`, and where it is from.

    `scale` is the norm of the orthogonal part of the difference of means; `layer` counts from 0,
    `position` is negative, from the prompt's end, and both are None where a person brought the vector; `scores`
    holds the causal test's figures; `source` the hashes of the model and prompts it came from; `strengths` those that
    were tuned for each place that writes to the stream (`12.mlp.down_proj`), none where it is to be 1 everywhere.

    `layers` `[n_layers, d_model]` are unit vectors of which each layer's writers lose their own (the embedding that of
    layer 0); `vector` is then the one of `layer`. `offset` is what the stream keeps along `vector` instead of nothing.

    Of several directions found one behind the other, `layer`, `position` and `scale` are the first one's, `parts` says
    of each where it was found and what it scored, and `stopped` why there are no more of them, "" where no more were
    asked for.
    """

    vector: npt.NDArray[np.float32]
    layer: int | None
    position: int | None
    scale: float
    method: str = METHOD
    scores: dict[str, float] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    layers: npt.NDArray[np.float32] | None = None
    offset: float = 0.0

    @property
    def removed(self) -> npt.NDArray[np.float32]:
        """What is taken out: `[d_model]`, `[k, d_model]`, or `[n_layers, 1, d_model]` where each layer has its own."""
        return self.vector if self.layers is None else self.layers[:, None]

    @property
    def rank(self) -> int:
        """How many directions it is."""
        return len(np.atleast_2d(self.vector))

    @property
    def where(self) -> dict[str, Any]:
        """Everything but the vectors, for records and tables."""
        return {k: v for k, v in asdict(self).items() if k not in ("vector", "layers")}

    def save(self, path: Path) -> None:
        """Write the direction as safetensors, its history as metadata."""
        arrays = {"direction": self.vector} | ({} if self.layers is None else {"layers": self.layers})
        save_arrays(path, KIND, arrays, self.where)

    @classmethod
    def load(cls, path: Path) -> Direction:
        """Read what `save` wrote.

        Raises:
            CheckpointError: no such file, not a direction of this schema, or not unit vectors.
        """
        arrays, note = load_arrays(path, KIND)
        known = {f.name for f in fields(cls)} - {"vector", "layers"}
        if arrays.keys() - {"layers"} != {"direction"} or _LATER | note.keys() != known:
            raise CheckpointError(f"{path}: damaged: holds {', '.join(sorted({*arrays, *note}))}; make it again")
        vector = arrays["direction"].astype(np.float32)
        rows = np.atleast_2d(vector)
        if vector.ndim not in (1, 2) or not np.allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-4):
            norm = float(np.linalg.norm(vector))
            raise CheckpointError(
                f"{path}: holds shape {list(vector.shape)} of norm {norm:g}; expected one unit vector [d_model], "
                "or orthonormal ones [k, d_model]"
            )
        layers = arrays["layers"].astype(np.float32) if "layers" in arrays else None
        if layers is not None:
            unit = layers.ndim == 2 and np.allclose(np.linalg.norm(layers, axis=-1), 1, atol=1e-4)
            if not unit or layers.shape[1:] != vector.shape:
                raise CheckpointError(
                    f"{path}: directions of single layers have shape {list(layers.shape)}; expected unit vectors "
                    f"[n_layers, {vector.shape[-1]}]"
                )
        return cls(vector, layers=layers, **note)


def candidates(
    harmful: ActivationStats, harmless: ActivationStats, last_layer: int, projected: bool = True
) -> list[Direction]:
    """`r[l, i] = mean_harmful − mean_harmless`, orthogonal to `mean_harmless`, for all positions, below `last_layer`.

    `r − (r·μ̂) μ̂` with `μ = mean_harmless` is what refusal adds to an ordinary activation; along `μ` itself the
    model keeps what every answer needs. The difference is taken in float64 before normalising (arXiv 2406.11717,
    §2.3): the two means point almost the same way, and what is left after subtraction must not be rounding.
    Returned as unit vectors; `scale` is the norm before that. Not `projected`, it is the difference as it is.

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
            if size and projected:
                r -= (r @ mean / size) * (mean / size)
            scale = float(np.linalg.norm(r))
            # Where template tokens cannot see the request yet, or the first layers add nothing, r is rounding.
            if scale > 1e-6 * size:
                source = {"model": harmful.model, "harmful": harmful.prompts, "harmless": harmless.prompts}
                method = METHOD if projected else DIFFERENCE
                found.append(Direction((r / scale).astype(np.float32), layer, position, scale, method, source=source))
    return found


def affine(found: list[Direction], harmless: ActivationStats) -> list[Direction]:
    """The candidates with what harmless prompts have along them, `r̂ᵀ mean_harmless`, to be kept in the stream.

    `h' = h − r̂ r̂ᵀ (h − mean_harmless)` moves an activation to the harmless mean instead of to zero (Marshall et al.
    2024, arXiv 2411.09003). For a direction orthogonal to that mean the two are the same.
    """
    kept = []
    for d in found:
        assert d.layer is not None and d.position is not None  # candidates come from activations
        mean = harmless.mean[d.layer, harmless.positions.index(d.position)]
        offset = float(mean @ d.vector)
        kept.append(replace(d, offset=offset, method=f"{d.method}, to the harmless mean"))
    return kept


def by_layer(
    found: list[Direction], within: Collection[int], harmful: ActivationStats, harmless: ActivationStats
) -> list[Direction]:
    """For every position one candidate that takes from each layer's writers the direction of that layer.

    Its `vector` is that of the layer, one of `within`, at which the means lie furthest apart in units of the spread.
    Positions at which some layer tells nothing apart give none.
    """
    kept, n_layers = [], len(harmful.mean)
    for position in harmful.positions:
        there = {d.layer: d for d in found if d.position == position}
        if len(there) == n_layers:
            first = most_separated([d for d in there.values() if d.layer in within], harmful, harmless)
            layers = np.stack([there[layer].vector for layer in range(n_layers)])
            kept.append(replace(first, layers=layers, method=f"{first.method}, each layer's own"))
    return kept


def apart(found: list[Direction], others: list[Direction]) -> list[Direction]:
    """Each candidate without its part along the one of `others` at its layer and position, as unit vectors.

    `w − v̂ v̂ᵀ w` takes the direction of true refusals out of that of false ones (Wang et al. 2025, arXiv 2410.03415).
    Where nothing is left, or there is no other, there is no candidate.
    """
    known = {(d.layer, d.position): d.vector.astype(np.float64) for d in others}
    kept = list[Direction]()
    for d in found:
        other = known.get((d.layer, d.position))
        if other is None:
            continue
        rest = d.vector - (other @ d.vector) * other
        share = float(np.linalg.norm(rest))
        if share > _LEAST_SHARE:
            unit = (rest / share).astype(np.float32)
            kept.append(replace(d, vector=unit, scale=d.scale * share, method=f"{d.method} and to true refusals"))
    return kept


def most_separated(found: list[Direction], harmful: ActivationStats, harmless: ActivationStats) -> Direction:
    """The candidate whose means lie furthest apart in units of the spread.

    A choice without a causal test, for a model that refuses nothing to test on (`--force`).
    """
    return max(found, key=lambda d: separation(d, harmful, harmless))


def separation(d: Direction, harmful: ActivationStats, harmless: ActivationStats) -> float:
    """How far apart a candidate's means lie, in units of the spread: `‖r‖ / √(½ Σ (σ²_harmful + σ²_harmless) r̂²)`.

    The spread along `r̂` leaves out covariances between the stream's axes, which no statistics keep.
    """
    assert d.layer is not None and d.position is not None  # candidates come from activations
    index = harmful.positions.index(d.position)
    spread = (harmful.m2[d.layer, index] / max(1, harmful.count - 1)) + (
        harmless.m2[d.layer, index] / max(1, harmless.count - 1)
    )
    return d.scale / float(np.sqrt(spread @ d.vector.astype(np.float64) ** 2 / 2 + 1e-12))
