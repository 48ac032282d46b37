"""Run a loaded model: next-token and teacher-forced log-probabilities, greedy generation.

Owns forward passes over lists of token rows; never knows what the rows ask or how the model was changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import GenerationConfig

from abliterate.model.batches import Batch, batches
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent


class Completion(NamedTuple):
    """A greedy answer: its `text`, its token `ids` (without the stop token), and whether it `ended` by itself."""

    text: str
    ids: list[int]
    ended: bool


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32: a softmax over a vocabulary in bfloat16 would add noise of its own."""
    return logits.float().log_softmax(-1)


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats along the last axis: `Σ_t p_t (log p_t − log q_t)` from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


@torch.inference_mode()
def next_token_log_probs(model: ChatModel, batch: Batch) -> torch.Tensor:
    """`[rows, d_vocab]` log-probabilities of the token after each row."""
    return log_probs(model.model(**batch.inputs, logits_to_keep=1).logits[:, -1])


def first_token_log_probs(model: ChatModel, rows: list[list[int]], batch_size: int) -> torch.Tensor:
    """`[len(rows), d_vocab]` log-probabilities of the token after each row."""
    found = {
        i: p
        for b in batches(model, rows, batch_size)
        for i, p in zip(b.indices, next_token_log_probs(model, b), strict=True)
    }
    return torch.stack([found[i] for i in range(len(rows))])


@torch.inference_mode()
def last_token_log_probs(model: ChatModel, batch: Batch, tokens: int) -> torch.Tensor:
    """`[rows, tokens + 1, d_vocab]` log-probabilities of what follows each of the last `tokens + 1` positions."""
    return log_probs(model.model(**batch.inputs, logits_to_keep=tokens + 1).logits)


@torch.inference_mode()
def generate(
    model: ChatModel,
    rows: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress = silent,
) -> list[Completion]:
    """Greedy completions in the order of the rows, free of the checkpoint's own sampling settings."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=model.stop_ids, pad_token_id=model.pad_id
    )
    done: dict[int, Completion] = {}
    for batch in batches(model, rows, batch_size, more=max_new_tokens):
        opening = torch.tensor(rows[0][: batch.shared], dtype=torch.long, device=model.device)
        whole = torch.cat([opening.expand(len(batch.indices), -1), batch.input_ids], 1)
        made: torch.Tensor = model.model.generate(  # type: ignore[operator]
            whole, attention_mask=batch.attention_mask, past_key_values=batch.past, generation_config=config
        )
        for index, ids in zip(batch.indices, made[:, whole.shape[1] :].tolist(), strict=True):
            done[index] = _completion(model, ids)
        progress(len(batch.indices))
    return [done[i] for i in range(len(rows))]


def _completion(model: ChatModel, ids: list[int]) -> Completion:
    stop = next((i for i, token in enumerate(ids) if token in model.stop_ids), None)
    ids = ids if stop is None else ids[:stop]
    text = model.chat.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return Completion(text, ids, stop is not None)
