"""Run prompts through a model and fold its residual stream into statistics.

Owns the pass over the prompts; keeps sums, never activations. Never knows directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abliterate.activations.stats import ActivationStats, RunningStats
from abliterate.activations.unfinished import Unfinished
from abliterate.errors import PromptError, VerifyError
from abliterate.model.batches import Batch, batches
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent
from abliterate.model.run import forward
from abliterate.prompts import PromptSet

SITE = "resid_post"


def collect(model: ChatModel, prompts: PromptSet, batch_size: int = 64, **options: Any) -> ActivationStats:
    """`collect_sets` of one set."""
    (found,) = collect_sets(model, [prompts], batch_size, **options)
    return found


def collect_sets(
    model: ChatModel,
    sets: Sequence[PromptSet],
    batch_size: int = 64,
    *,
    model_fingerprint: str = "",
    n_layers: int | None = None,
    unfinished: Path | None = None,
    progress: Progress = silent,
) -> list[ActivationStats]:
    """Mean and variance of `resid_post` at the first `n_layers` layers (all) and every token after the instruction.

    All sets take one pass. A model that is read block by block leaves what it has found so far in the file `unfinished`
    after each block, and goes on from what is there of the same model and prompts.

    Positions are those of the chat template's own tokens behind the request (Arditi et al. 2024,
    arXiv 2406.11717, §2.3). `resid_post[l]` equals transformers' `hidden_states[l + 1]`, except at the
    last layer, where transformers returns it after the final norm.

    Raises:
        PromptError: no prompts.
        VerifyError: NaN or infinity in the activations; names the layer.
    """
    for prompts in sets:
        if not len(prompts):
            raise PromptError(f"{prompts.name}: no prompts to collect activations of")
    n_positions, depth = len(model.chat.tail()), n_layers or model.n_layers
    found = [RunningStats((depth, n_positions, model.d_model)) for _ in sets]
    of = np.repeat(np.arange(len(sets)), [len(prompts) for prompts in sets])

    def fold(batch: Batch, layer: int, hidden: torch.Tensor) -> None:
        if layer >= depth:
            return
        # Rows are aligned at their last token; only the wanted positions leave the block.
        values, whose = _finite(layer, hidden[:, -n_positions:].cpu().double()).numpy(), of[batch.indices]
        for i, stats in enumerate(found):
            if (whose == i).any():
                stats.add(layer, values[whose == i])

    rows = model.chat.encode([prompt for prompts in sets for prompt in prompts.prompts])
    todo, keeper = list(batches(model, rows, batch_size, keep=n_positions)), None
    if unfinished is not None and model.weights is not None:
        shapes = [list(batch.input_ids.shape) for batch in todo]
        same = [model_fingerprint, rows, of.tolist(), shapes, n_positions, str(model.model.dtype)]
        keeper = Unfinished(unfinished, found, same)
    for _ in forward(model, todo, on_block=fold, n_blocks=depth, keep=n_positions, progress=progress, keeper=keeper):
        pass
    positions = tuple(range(-n_positions, 0))
    return [
        ActivationStats(SITE, positions, len(prompts), s.mean, s.m2, prompts.sha256, model_fingerprint)
        for prompts, s in zip(sets, found, strict=True)
    ]


def _finite(layer: int, values: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise VerifyError(
            f"activations: resid_post of layer {layer} holds NaN or infinity; the weights are damaged or the "
            "dtype overflows: try --dtype float32"
        )
    return values
