"""Group token rows by length and pad them on the left, behind the opening they share.

Owns batching only: every row keeps its own mask and positions, so a batch computes what single rows would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from abliterate.model.cache import remembers_all
from abliterate.model.load import ChatModel

#: Share of a batch that may be padding.
_PADDING = 0.1
#: A shorter opening is not worth a pass of its own.
_LEAST = 4


class Batch(NamedTuple):
    """`indices` of the rows in their list; tensors are `[rows, width]`, padded on the left.

    Where rows share an opening, it is a batch of its own (of one row for all, or of one for equally many successive
    rows each), `attention_mask` covers it too, and the other tensors hold what comes behind it.
    """

    indices: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    opening: Batch | None = None
    past: DynamicCache | None = None

    @property
    def shared(self) -> int:
        """How many tokens of the shared opening come before the batch's own."""
        return self.attention_mask.shape[1] - self.input_ids.shape[1]

    def inputs(self, past: DynamicCache | None = None) -> dict[str, Any]:
        """What a model's forward takes; `past` holds the opening's keys and values, and is extended."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "past_key_values": past,
            "use_cache": past is not None,
        }


def pad_left(
    model: ChatModel, rows: list[list[int]], indices: list[int] | None = None, opening: Batch | None = None
) -> Batch:
    """One batch of `rows`, aligned at their last token, behind the opening that they begin with."""
    length = opening.input_ids.shape[1] if opening is not None else 0
    own = [row[length:] for row in rows]
    width = max(map(len, own))
    ids = torch.tensor([[model.pad_id] * (width - len(row)) + row for row in own], device=model.device)
    pads = torch.tensor([width - len(row) for row in own], device=model.device)[:, None]
    columns = torch.arange(width, device=model.device)[None]
    mask = torch.cat([torch.ones(len(rows), length, device=model.device), columns >= pads], 1).long()
    positions = length + (columns - pads).clamp_min(0)
    return Batch(indices if indices is not None else list(range(len(rows))), ids, mask, positions, opening)


def opening_of(model: ChatModel, rows: list[list[int]], keep: int = 1, more: int = 0, copies: int = 1) -> Batch | None:
    """The leading tokens that all rows share, `copies` times, leaving each row at least `keep` tokens of its own.

    None where there are few, or where the model remembers more than keys and values of every token of rows to which
    `more` tokens are added (recurrent states, a window shorter than the rows).
    """
    longest, first = min(map(len, rows)) - keep, rows[0]
    length = next((i for i in range(longest) if any(row[i] != first[i] for row in rows)), max(0, longest))
    if length < _LEAST or not remembers_all(model, max(map(len, rows)) + more):
        return None
    return pad_left(model, [first[:length]] * copies)


def batches(model: ChatModel, rows: list[list[int]], batch_size: int, keep: int = 1, more: int = 0) -> Iterator[Batch]:
    """All rows, shortest first, in batches of at most `batch_size`; the opening they share is a batch of its own.

    At least the last `keep` tokens of every row are in the batch's own tensors. A tenth of a batch is padding at most,
    unless `more` tokens follow each row: then fewer batches are worth more.
    """
    opening = opening_of(model, rows, keep, more)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    own = len(opening.input_ids[0]) if opening is not None else 0
    while order:
        size = min(batch_size, len(order)) if more else _fitting([len(rows[i]) - own for i in order[:batch_size]])
        yield pad_left(model, [rows[i] for i in order[:size]], order[:size], opening)
        order = order[size:]


def _fitting(lengths: list[int]) -> int:
    """How many rows of rising `lengths` make a batch of which little is padding."""
    total, size = 0, 0
    for n, length in enumerate(lengths, 1):
        total += length
        if total >= (1 - _PADDING) * n * length:
            size = n
    return size
