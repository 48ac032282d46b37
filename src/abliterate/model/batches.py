"""Group token rows by length and pad them on the left, behind the opening they share.

Owns batching only: every row keeps its own mask and positions, so a batch computes what single rows would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from abliterate.model.load import ChatModel
from abliterate.model.prefix import Prefix, run_prefix, shared_length


class Batch(NamedTuple):
    """`indices` of the rows in their list; tensors are `[rows, width]`, padded on the left.

    Where rows share an opening, `past` holds its keys and values, `attention_mask` covers it too, and the other
    tensors hold what comes behind it. A forward pass extends `past`: a batch with one is run once.
    """

    indices: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    past: DynamicCache | None = None

    @property
    def shared(self) -> int:
        """How many tokens of the shared opening come before the batch's own."""
        return self.attention_mask.shape[1] - self.input_ids.shape[1]

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model's forward takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "past_key_values": self.past,
            "use_cache": self.past is not None,
        }


def pad_left(
    model: ChatModel, rows: list[list[int]], indices: list[int] | None = None, prefix: Prefix | None = None
) -> Batch:
    """One batch of `rows`, aligned at their last token.

    A `prefix` with rows of its own serves as many successive rows each.
    """
    length = prefix.length if prefix is not None else 0
    own = [row[length:] for row in rows]
    width = max(map(len, own))
    ids = torch.tensor([[model.pad_id] * (width - len(row)) + row for row in own], device=model.device)
    pads = torch.tensor([width - len(row) for row in own], device=model.device)[:, None]
    columns = torch.arange(width, device=model.device)[None]
    mask = torch.cat([torch.ones(len(rows), length, device=model.device), columns >= pads], 1).long()
    positions = length + (columns - pads).clamp_min(0)
    past = prefix.repeated(len(rows)) if prefix is not None else None
    return Batch(indices if indices is not None else list(range(len(rows))), ids, mask, positions, past)


def batches(model: ChatModel, rows: list[list[int]], batch_size: int, keep: int = 1, more: int = 0) -> Iterator[Batch]:
    """All rows, shortest first, in batches of at most `batch_size`; the opening they share is run once.

    At least the last `keep` tokens of every row are in the batch's own tensors; `more` tokens may follow a row.
    """
    length = shared_length(rows, keep)
    prefix = run_prefix(model, rows[0][:length], max(map(len, rows)) + more)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield pad_left(model, [rows[i] for i in chosen], chosen, prefix)
