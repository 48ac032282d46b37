"""Group token rows by length and pad them on the left.

Owns batching only: every row keeps its own mask and positions, so a batch computes what single rows would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """`indices` of the rows in their list; tensors are `[rows, width]`, padded on the left."""

    indices: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model's forward takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def pad_left(rows: list[list[int]], pad_id: int, device: torch.device, indices: list[int] | None = None) -> Batch:
    """One batch of `rows`, aligned at their last token."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return Batch(indices if indices is not None else list(range(len(rows))), ids, mask, positions)


def batches(rows: list[list[int]], batch_size: int, pad_id: int, device: torch.device) -> Iterator[Batch]:
    """All rows, shortest first, in batches of at most `batch_size`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield pad_left([rows[i] for i in chosen], pad_id, device, chosen)
