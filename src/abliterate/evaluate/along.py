"""What lies along a direction in a real forward pass, prompt by prompt: leak, and the component at every layer.

Owns the pass, and the histograms that are kept of it; never keeps activations, nor knows how the model was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from abliterate.direction.direction import Direction
from abliterate.direction.profile import rounded
from abliterate.evaluate.recognition import above
from abliterate.model.batches import Batch, batches
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent
from abliterate.model.run import forward

Float64Array = npt.NDArray[np.float64]

#: Bins of a histogram: about as many as tell 64 prompts apart by eye.
BINS = 24


@dataclass(frozen=True, slots=True)
class Along:
    """What a pass found, per prompt.

    `share` `[n]` is the root mean square over layers and template tokens of `‖r̂ᵀh − offset‖ / ‖h‖`: zero where nothing
    writes along `r̂` but the offset that an edit leaves, √(k/d_model) what k random directions show. `component`
    `[n_layers, n]` is `r̂ᵀh` after every block at the direction's own position, of several directions the first one's;
    empty, `[0, n]`, where there is no position that all prompts share.
    """

    share: Float64Array
    component: Float64Array


def place(direction: Direction, n_positions: int) -> int | None:
    """The position at which single prompts are looked at: the direction's, if it is one of the last `n_positions`."""
    position = direction.position
    return position if position is not None and -position <= n_positions else None


def along(
    model: ChatModel,
    rows: list[list[int]],
    direction: Direction,
    n_positions: int,
    batch_size: int,
    progress: Progress = silent,
) -> Along:
    """What lies along `direction` for each of `rows` (token ids, of which the last `n_positions` are the template's).

    One pass for all rows; of the stream nothing leaves a block but its components along the direction.
    """
    unit = torch.from_numpy(np.atleast_2d(direction.vector)).to(model.device, torch.float32).T
    position = place(direction, n_positions)
    total, component = np.zeros(len(rows)), np.zeros((model.n_layers if position is not None else 0, len(rows)))

    def fold(batch: Batch, layer: int, hidden: torch.Tensor) -> None:
        wanted = hidden[:, -n_positions:].float()
        parts = wanted @ unit
        shares = ((parts - direction.offset).norm(dim=-1) / wanted.norm(dim=-1)) ** 2
        total[batch.indices] += shares.mean(-1).double().cpu().numpy()
        if position is not None:
            component[layer, batch.indices] = parts[:, position, 0].double().cpu().numpy()

    todo = batches(model, rows, batch_size, keep=n_positions)
    for _ in forward(model, todo, on_block=fold, keep=n_positions, progress=progress):
        pass
    return Along(np.sqrt(total / model.n_layers), component)


def histograms(base: Float64Array, edited: Float64Array, n_harmful: int) -> list[dict[str, Any]]:
    """For every layer the components `[n_layers, n]` of both models, counted in bins that all four series share.

    Of the n prompts the first `n_harmful` are harmful. An entry is `{low, high, base, edited}`: the ends of `BINS` bins
    of equal width, and for each model `{harmful, harmless, separation, auc}`: counts from `low` to `high`, and how far
    apart the two sets lie, None where that is not finite. Counts do not tell which prompt is where.
    """
    with np.errstate(invalid="ignore"):  # a stream that overflowed has no spread, and is not counted
        return [_histogram(b, e, n_harmful) for b, e in zip(base, edited, strict=True)]


def _histogram(base: Float64Array, edited: Float64Array, n_harmful: int) -> dict[str, Any]:
    both = np.concatenate([base, edited])
    known = both[np.isfinite(both)]
    low, high = rounded([known.min(), known.max()]) if len(known) else (0.0, 0.0)
    if not low < high:
        low, high = low - 0.5, high + 0.5
    sets = {"base": (base[:n_harmful], base[n_harmful:]), "edited": (edited[:n_harmful], edited[n_harmful:])}
    unit = float(np.sqrt(sum(values.var(ddof=min(1, len(values) - 1)) for values in sets["base"]) / 2))
    found: dict[str, Any] = {"low": low, "high": high}
    for who, (harmful, harmless) in sets.items():
        figures = {
            "separation": float(harmful.mean() - harmless.mean()) / (unit or np.nan),
            "auc": float(above(harmful, harmless).mean()),
        }
        counts = {"harmful": _counts(harmful, low, high), "harmless": _counts(harmless, low, high)}
        found[who] = counts | {k: rounded([v])[0] if np.isfinite(v) else None for k, v in figures.items()}
    return found


def _counts(values: Float64Array, low: float, high: float) -> list[int]:
    """The last digits that `low` and `high` were rounded by must not lose the outermost values."""
    counted = np.histogram(np.clip(values[np.isfinite(values)], low, high), BINS, (low, high))[0]
    return [int(n) for n in counted]
