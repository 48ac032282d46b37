"""Run a loaded model: next-token and teacher-forced log-probabilities, greedy generation.

Owns forward passes over lists of token rows; never knows what the rows ask or how the model was changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig

from abliterate.model.batches import Batch, batches
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent

#: Tokens after which answers that have ended leave their batch: as many as a plain refusal has.
_FIRST = 12


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
    done: dict[int, Completion] = {}
    for batch in batches(model, rows, batch_size, more=max_new_tokens):
        opening = torch.tensor(rows[0][: batch.shared], dtype=torch.long, device=model.device)
        whole = torch.cat([opening.expand(len(batch.indices), -1), batch.input_ids], 1)
        made = _continue(model, whole, batch.attention_mask, batch.past, max_new_tokens)
        done |= {index: _completion(model, ids) for index, ids in zip(batch.indices, made, strict=True)}
        progress(len(batch.indices))
    return [done[i] for i in range(len(rows))]


def _continue(
    model: ChatModel, whole: torch.Tensor, mask: torch.Tensor, past: DynamicCache | None, budget: int
) -> list[list[int]]:
    """At most `budget` greedy tokens behind each row of `whole`; rows that ended drop out after the first few."""
    first = budget if past is None else min(_FIRST, budget)
    config = GenerationConfig(
        max_new_tokens=first, do_sample=False, eos_token_id=model.stop_ids, pad_token_id=model.pad_id
    )
    longer: torch.Tensor = model.model.generate(  # type: ignore[operator]
        whole, attention_mask=mask, past_key_values=past, generation_config=config
    )
    made: list[list[int]] = longer[:, whole.shape[1] :].tolist()
    going = [i for i, ids in enumerate(made) if not set(ids) & set(model.stop_ids)]
    if past is None or budget == first or not going:
        return made
    past.batch_select_indices(torch.tensor(going, device=model.device))
    mask = torch.cat([mask, mask.new_ones(len(mask), first)], 1)[going]
    for i, more in zip(going, _continue(model, longer[going], mask, past, budget - first), strict=True):
        made[i] += more
    return made


def _completion(model: ChatModel, ids: list[int]) -> Completion:
    stop = next((i for i, token in enumerate(ids) if token in model.stop_ids), None)
    ids = ids if stop is None else ids[:stop]
    text = model.chat.tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return Completion(text, ids, stop is not None)
