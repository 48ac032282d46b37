"""The opening that all rows share, such as a template's system prompt: run once, its keys and values reused.

Owns how long it is and what the model remembers of it; never knows what the rows ask.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from abliterate.model.load import ChatModel

#: A shorter opening is not worth a pass of its own.
_LEAST = 4


@dataclass(frozen=True)
class Prefix:
    """The keys and values of `length` tokens, of one row for all or of one row each."""

    length: int
    cache: DynamicCache
    rows: int = 1

    def repeated(self, rows: int) -> DynamicCache:
        """A copy for `rows` rows that a pass may extend: each row of the prefix in equally many successive ones."""
        cache = copy.deepcopy(self.cache)
        if rows != self.rows:
            cache.batch_repeat_interleave(rows // self.rows)
        return cache


def shared_length(rows: list[list[int]], keep: int = 1) -> int:
    """How many leading tokens all rows share, leaving each row at least `keep` tokens of its own; 0 if few."""
    longest = min(map(len, rows)) - keep
    first = rows[0]
    length = next((i for i in range(longest) if any(row[i] != first[i] for row in rows)), max(0, longest))
    return length if length >= _LEAST else 0


@torch.inference_mode()
def run_prefix(model: ChatModel, ids: list[int], longest: int, rows: int = 1) -> Prefix | None:
    """The prefix `ids` of rows of at most `longest` tokens, as the model with its present hooks computes it.

    None where there is nothing to share, or where the model remembers more than keys and values of every token
    (recurrent states, a window shorter than the rows).
    """
    if not ids:
        return None
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids] * rows, device=model.device)}
    cache = model.model.base_model(**inputs, use_cache=True).past_key_values
    plain = isinstance(cache, DynamicCache) and all(_remembers_all(layer, longest) for layer in cache.layers)
    return Prefix(len(ids), cache, rows) if plain else None


def _remembers_all(layer: object, longest: int) -> bool:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > longest
    return type(layer) is DynamicLayer
