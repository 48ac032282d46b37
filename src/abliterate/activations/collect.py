"""Run prompts through a model and fold its residual stream into statistics.

Owns the pass over the prompts; holds one batch of one block at a time. Never knows directions.
"""

from __future__ import annotations

import numpy as np
import torch

from abliterate.activations.stats import ActivationStats
from abliterate.errors import PromptError, VerifyError
from abliterate.model.batches import Batch, batches
from abliterate.model.hooks import record_resid_post
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent
from abliterate.prompts import PromptSet

SITE = "resid_post"


@torch.inference_mode()
def collect(
    model: ChatModel, prompts: PromptSet, batch_size: int = 64, model_fingerprint: str = "", progress: Progress = silent
) -> ActivationStats:
    """Mean and variance of `resid_post` at every layer and every token after the instruction.

    Positions are those of the chat template's own tokens behind the request (Arditi et al. 2024,
    arXiv 2406.11717, §2.3). `resid_post[l]` equals transformers' `hidden_states[l + 1]`, except at the
    last layer, where transformers returns it after the final norm.

    Raises:
        PromptError: no prompts.
        VerifyError: NaN or infinity in the activations; names the layer.
    """
    if not len(prompts):
        raise PromptError(f"{prompts.name}: no prompts to collect activations of")
    n_positions = len(model.chat.tail())
    stats = None
    for batch in batches(model, model.chat.encode(prompts.prompts), batch_size, keep=n_positions):
        part = _batch_stats(model, batch, n_positions, prompts.sha256, model_fingerprint)
        stats = part if stats is None else stats.merge(part)
        progress(len(batch.indices))
    assert stats is not None
    return ActivationStats(SITE, stats.positions, stats.count, stats.mean, stats.m2, prompts.sha256, model_fingerprint)


def _batch_stats(model: ChatModel, batch: Batch, n_positions: int, prompts: str, fingerprint: str) -> ActivationStats:
    """The statistics of one batch, each block's output reduced as soon as it appears."""
    shape = (model.n_layers, n_positions, model.d_model)
    mean, m2 = np.zeros(shape), np.zeros(shape)

    def fold(layer: int, hidden: torch.Tensor) -> None:
        # Rows are aligned at their last token; only the wanted positions leave the block.
        wanted = hidden[:, -n_positions:].cpu().double()
        if not torch.isfinite(wanted).all():
            raise VerifyError(
                f"activations: resid_post of layer {layer} holds NaN or infinity; the weights are damaged or the "
                "dtype overflows: try --dtype float32"
            )
        center = wanted.mean(0)
        mean[layer] = center.numpy()
        m2[layer] = ((wanted - center) ** 2).sum(0).numpy()

    with record_resid_post(model, fold):
        model.model.base_model(**batch.inputs)
    positions = tuple(range(-n_positions, 0))
    return ActivationStats(SITE, positions, len(batch.indices), mean, m2, prompts, fingerprint)
