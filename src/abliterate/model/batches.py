"""Group token rows by length and pad them on the left, behind the opening they share.

Owns batching only: every row keeps its own mask and positions, so a batch computes what single rows would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import DynamicCache

from abliterate.model.cache import remembers_all

if TYPE_CHECKING:
    from abliterate.model.native import AnyModel

#: Share of a batch that may be padding.
_PADDING = 0.1
#: Tokens of a batch on a CPU: products of so many rows run fastest there, and what they give stays in its caches.
_AT_ONCE = 512
#: Rows whose beginnings are looked for at once: their keys and values are held together.
_TOGETHER = 256
#: A batch of such beginnings must save this share of the tokens to be worth a pass of its own ...
_SAVED = 0.02
#: ... and few rows share longer ones.
_LONGEST = 8
#: A shorter opening is not worth a pass of its own.
_LEAST = 4


class Batch(NamedTuple):
    """`indices` of the rows in their list; tensors are `[rows, width]`, padded on the left.

    Where rows share openings, these are the rows of a batch of their own, which may have an opening too: row `i` goes
    on from row `after[i]` of it. `attention_mask` covers it, and the other tensors hold what comes behind it.
    """

    indices: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    opening: Batch | None = None
    after: tuple[int, ...] = ()
    past: DynamicCache | None = None

    @property
    def shared(self) -> int:
        """How many tokens come before the batch's own."""
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
    model: AnyModel,
    rows: list[list[int]],
    indices: list[int] | None = None,
    opening: Batch | None = None,
    after: Sequence[int] | None = None,
) -> Batch:
    """One batch of `rows`, aligned at their last token, each behind row `after` (all: the first) of its opening."""
    length = opening.attention_mask.shape[1] if opening is not None else 0
    own = [row[length:] for row in rows]
    width = max(map(len, own))
    ids = torch.tensor([[model.pad_id] * (width - len(row)) + row for row in own], device=model.device)
    pads = torch.tensor([width - len(row) for row in own], device=model.device)[:, None]
    columns = torch.arange(width, device=model.device)[None]
    mask = torch.cat([torch.ones(len(rows), length, device=model.device), columns >= pads], 1).long()
    positions = length + (columns - pads).clamp_min(0)
    places = indices if indices is not None else list(range(len(rows)))
    return Batch(places, ids, mask, positions, opening, tuple(after if after is not None else [0] * len(rows)))


def parted(batch: Batch, keep: int) -> tuple[Batch, Batch]:
    """A batch without its last `keep` tokens, and these behind it."""
    split = batch.attention_mask.shape[1] - keep
    before = batch._replace(
        input_ids=batch.input_ids[:, :-keep],
        attention_mask=batch.attention_mask[:, :split],
        position_ids=batch.position_ids[:, :-keep],
    )
    return before, batch._replace(input_ids=batch.input_ids[:, -keep:], position_ids=batch.position_ids[:, -keep:])


def opening_of(model: AnyModel, rows: list[list[int]], keep: int = 1, more: int = 0, copies: int = 1) -> Batch | None:
    """The leading tokens that all rows share, `copies` times, leaving each row at least `keep` tokens of its own.

    None where there are few, or where the model remembers more than keys and values of every token of rows to which
    `more` tokens are added (recurrent states, a window shorter than the rows).
    """
    longest, first = min(map(len, rows)) - keep, rows[0]
    length = next((i for i in range(longest) if any(row[i] != first[i] for row in rows)), max(0, longest))
    if length < _LEAST or not remembers_all(model, max(map(len, rows)) + more):
        return None
    return pad_left(model, [first[:length]] * copies)


def batches(model: AnyModel, rows: list[list[int]], batch_size: int, keep: int = 1, more: int = 0) -> Iterator[Batch]:
    """All rows in batches of at most `batch_size`, of similar length in each; what rows begin with alike runs before.

    At least the last `keep` tokens of every row are in the batch's own tensors. A tenth of a batch is padding at most,
    and on a CPU it is small, unless `more` tokens follow each row: then fewer batches are worth more.
    """
    shared = opening_of(model, rows, keep, more)
    group = len(rows) if more or shared is None else _TOGETHER
    alike = sorted(range(len(rows)), key=lambda i: rows[i])
    for start in range(0, len(rows), group):
        order = sorted(alike[start : start + group], key=lambda i: (len(rows[i]), i))
        begun = shared if more or shared is None else _begun_alike(model, [rows[i] for i in order], shared, keep)
        yield from _split(model, rows, order, batch_size, begun, more)


def _begun_alike(model: AnyModel, rows: list[list[int]], shared: Batch, keep: int) -> Batch:
    """The different beginnings of rows, so long that most tokens are saved, behind the opening that all share.

    That opening itself where hardly any are.
    """
    start = shared.input_ids.shape[1]
    longest = min(_LONGEST, min(map(len, rows)) - keep - start)
    begins = [sorted({tuple(row[: start + k]) for row in rows}) for k in range(1, longest + 1)]
    saved = [(len(rows) - len(b)) * k for k, b in enumerate(begins, 1)]
    if max(saved, default=0) < _SAVED * sum(len(row) - start for row in rows):
        return shared
    return pad_left(model, [list(b) for b in begins[saved.index(max(saved))]], opening=shared)


def _split(
    model: AnyModel, rows: list[list[int]], order: list[int], batch_size: int, opening: Batch | None, more: int
) -> Iterator[Batch]:
    """Batches of the rows in `order`, which are of rising length, behind an opening without padding."""
    first, own = (opening.shared, opening.attention_mask.shape[1]) if opening is not None else (0, 0)
    at_once = _AT_ONCE if model.device.type == "cpu" else None
    begins = {} if opening is None else {tuple(ids): n for n, ids in enumerate(opening.input_ids.tolist())}
    while order:
        following = order[:batch_size]
        size = len(following) if more else _fitting([len(rows[i]) - own for i in following], at_once)
        batch = [rows[i] for i in order[:size]]
        after = [begins[tuple(row[first:own])] for row in batch] if opening is not None else None
        yield pad_left(model, batch, order[:size], opening, after)
        order = order[size:]


def _fitting(lengths: list[int], at_once: int | None) -> int:
    """How many rows of rising `lengths` make a batch of which little is padding, of `at_once` tokens or of one row."""
    total, size = 0, 0
    for n, length in enumerate(lengths, 1):
        total += length
        if size and at_once is not None and n * length > at_once:
            break
        if total >= (1 - _PADDING) * n * length:
            size = n
    return size
