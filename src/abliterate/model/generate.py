"""Greedy answers of a model, whole in memory, read block by block, or in llama.cpp.

Owns when an answer ends; never knows what the rows ask or how the model was changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import DynamicCache, GenerationConfig

from abliterate.errors import UnsupportedError
from abliterate.model.batches import Batch, batches
from abliterate.model.cache import keeps_keys, new_cache
from abliterate.model.load import ChatModel
from abliterate.model.native import AnyModel, NativeModel
from abliterate.model.progress import Progress, silent
from abliterate.model.run import forward, with_openings

#: Tokens after which answers that have ended leave their batch: as many as a plain refusal has.
_FIRST = 12


class Completion(NamedTuple):
    """A greedy answer: its `text`, its token `ids`, and the `stop` token behind them if it ended by itself."""

    text: str
    ids: list[int]
    stop: int | None

    @property
    def ended(self) -> bool:
        """Whether it ended by itself."""
        return self.stop is not None


@torch.inference_mode()
def generate(
    model: AnyModel,
    rows: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress = silent,
) -> list[Completion]:
    """Greedy completions in the order of the rows, free of the checkpoint's own sampling settings."""
    if not rows:
        return []
    if isinstance(model, NativeModel):
        return [_completion(model, ids) for ids in model.made(rows, max_new_tokens, progress)]
    make = _made_whole if model.weights is None else _made_blockwise
    made = make(model, rows, max_new_tokens, batch_size, progress)
    return [_completion(model, made[i]) for i in range(len(rows))]


def _made_whole(
    model: ChatModel, rows: list[list[int]], budget: int, batch_size: int, progress: Progress
) -> dict[int, list[int]]:
    done: dict[int, list[int]] = {}
    for batch, past in with_openings(model, batches(model, rows, batch_size, more=budget)):
        shared = torch.tensor(rows[0][: batch.shared], dtype=torch.long, device=model.device)
        whole = torch.cat([shared.expand(len(batch.indices), -1), batch.input_ids], 1)
        made = _continue(model, whole, batch.attention_mask, past, budget)
        done |= dict(zip(batch.indices, made, strict=True))
        progress(len(batch.indices))
    return done


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


def _made_blockwise(
    model: ChatModel, rows: list[list[int]], budget: int, batch_size: int, progress: Progress
) -> dict[int, list[int]]:
    """One token of a group of rows in each pass over the files; rows that ended leave.

    A group is as many rows as there is memory for their keys and values.

    Raises:
        UnsupportedError: the model remembers more than keys and values.
    """
    assert model.weights is not None
    if not keeps_keys(model):
        raise UnsupportedError(
            f"architecture '{model.model.config.model_type}' writes no answers block by block; --no-generate does "
            "without them"
        )
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    at_once = max(1, model.weights.stream_memory // (_bytes_per_token(model) * (max(map(len, rows)) + budget)))
    groups = [order[i : i + at_once] for i in range(0, len(order), at_once)]
    made: dict[int, list[int]] = {}
    for group in groups:
        own = _made_together(model, [rows[i] for i in group], budget, batch_size, progress)
        made |= dict(zip(group, own, strict=True))
    return made


def _made_together(
    model: ChatModel, rows: list[list[int]], budget: int, batch_size: int, progress: Progress
) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in rows]
    reported = 0
    going = [b._replace(past=new_cache(model)) for b in batches(model, rows, batch_size, more=budget)]
    for passes in range(1, budget + 1):
        following = []
        for batch, logits in forward(model, going, tokens=1):
            token = logits[:, -1].argmax(-1)
            for i, t in zip(batch.indices, token.tolist(), strict=True):
                made[i].append(t)
            if (more := _next(batch, token, model.stop_ids)) is not None:
                following.append(more)
        going = following
        done = len(rows) - sum(len(b.indices) for b in going) * (budget - passes) // budget
        progress(done - reported)
        reported = done
        if not going:
            break
    return made


def _bytes_per_token(model: ChatModel) -> int:
    """What the keys and values of one token take, by the configuration."""
    config = model.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or model.d_model // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * model.n_layers * heads * width * model.model.dtype.itemsize)


def _next(batch: Batch, token: torch.Tensor, stop: list[int]) -> Batch | None:
    """The batch that goes on from one with a token more; None where all its rows have ended."""
    stays = [i for i, t in enumerate(token.tolist()) if t not in stop]
    if not stays or batch.past is None:
        return None
    if len(stays) < len(batch.indices):
        batch.past.batch_select_indices(torch.tensor(stays, device=token.device))
    mask = torch.cat([batch.attention_mask, batch.attention_mask.new_ones(len(token), 1)], 1)[stays]
    positions = batch.position_ids[stays, -1:] + 1
    return Batch([batch.indices[i] for i in stays], token[stays, None], mask, positions, past=batch.past)


def _completion(model: AnyModel, ids: list[int]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in model.stop_ids), None)
    return Completion(model.chat.text(ids[:end]), ids[:end], None if end is None else ids[end])
