"""Run a frozen model so that gradients reach what changes it: the directions and strengths of its hooks.

Owns memory and reuse on the way back; never knows what the loss means.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from abliterate.model.batches import Batch, opening_of, pad_left
from abliterate.model.cache import continued, new_cache
from abliterate.model.load import ChatModel
from abliterate.model.memory import available

#: Enters what changes the model; anew for every batch, as each goes back through it once.
Change = Callable[[], AbstractContextManager[None]]
#: A loss to minimise, of a batch's row indices and the logits `[rows, keep, d_vocab]` that follow its last tokens.
Loss = Callable[[list[int], torch.Tensor], torch.Tensor]

#: Tokens of a batch: as many as keep a processor busy.
_AT_ONCE = {"cpu": 768}
_AT_ONCE_ELSEWHERE = 8192
#: Share of the free memory that a batch may keep for the way back.
_SHARE = 0.5
#: Bytes for each logit: itself, its logarithm in float32, and the gradients of both.
_LOGIT = 14


def backward(
    model: ChatModel, rows: list[list[int]], keep: int, loss: Loss, change: Change, at_once: int | None
) -> float:
    """The summed loss of all rows, its gradient added to whatever `change` reads; the weights get none.

    The opening that rows share runs once: gradients to its keys and values are summed over all batches and sent back
    through it last, which is the gradient of running every row whole. Where the memory for that is short, each block is
    run again on the way back instead of keeping what it computed, and openings are not shared.

    Args:
        model: what runs; its weights are frozen by this.
        rows: token ids.
        keep: how many of each row's last positions have their logits computed.
        loss: called once for every batch.
        change: what the gradients are for.
        at_once: tokens of a batch, by `tokens_at_once`.
    """
    model.model.requires_grad_(False)
    with torch.enable_grad(), recomputed(model) if at_once is None else nullcontext():
        opening = None if at_once is None else opening_of(model, rows, keep)
        with _opened(model, opening, change) as past:
            total = 0.0
            for batch in _batches(model, rows, opening, at_once or 1):
                with change():
                    before = None if past is None else continued(past, batch.after)
                    logits = model.model(**batch.inputs(before), logits_to_keep=keep).logits[:, -keep:]
                    found = loss(batch.indices, logits)
                    found.backward()
                total += found.item()
    return total


@contextmanager
def recomputed(model: ChatModel) -> Iterator[None]:
    """Blocks keep only what they were given, and run again on the way back (Chen et al. 2016, arXiv 1604.06174)."""
    with ExitStack() as stack:
        for block in model.blocks:

            def again(*args: Any, forward: Callable[..., Any] = block.forward, **kwargs: Any) -> Any:
                return checkpoint(forward, *args, use_reentrant=False, **kwargs)

            block.forward = again
            stack.callback(delattr, block, "forward")
        yield


@contextmanager
def _opened(model: ChatModel, opening: Batch | None, change: Change) -> Iterator[DynamicCache | None]:
    """Keys and values of the opening as leaves; what they gather goes back through the opening at the end."""
    if opening is None:
        yield None
        return
    made = new_cache(model)
    with change():
        model.model(**opening.inputs(made), logits_to_keep=1)
    leaves = copy.copy(made)
    leaves.layers = [copy.copy(layer) for layer in made.layers]
    pairs = list[tuple[torch.Tensor, torch.Tensor]]()
    layers: list[Any] = leaves.layers
    for layer in layers:
        for name in ("keys", "values"):
            computed = getattr(layer, name)
            setattr(layer, name, computed.detach().requires_grad_())
            if computed.requires_grad:
                pairs.append((computed, getattr(layer, name)))
    yield leaves
    reached = [(computed, leaf.grad) for computed, leaf in pairs if leaf.grad is not None]
    if reached:
        torch.autograd.backward([c for c, _ in reached], [g for _, g in reached])


def _batches(model: ChatModel, rows: list[list[int]], opening: Batch | None, tokens: int) -> Iterator[Batch]:
    """All rows, of similar length together, at most `tokens` tokens of their own in a batch of more than one row."""
    shared = 0 if opening is None else opening.input_ids.shape[1]
    order, start = sorted(range(len(rows)), key=lambda i: len(rows[i])), 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or (stop + 1 - start) * (len(rows[order[stop]]) - shared) > tokens:
            yield pad_left(model, [rows[i] for i in order[start:stop]], order[start:stop], opening)
            start = stop


def tokens_at_once(model: ChatModel, rows: Sequence[list[int]], keep: int, change: Change) -> int | None:
    """How many tokens a batch may have, so that its way back fits into memory; None where not even one row's does."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier passes left there is free, and counts as taken
    most, free = _AT_ONCE.get(model.device.type, _AT_ONCE_ELSEWHERE), available(model.device)
    if free is None:
        return most
    longest, shortest = max(rows, key=len), min(rows, key=len)
    vocabulary = keep * model.model.config.get_text_config(decoder=True).vocab_size * _LOGIT / len(shortest)
    tokens = int(_SHARE * free / (_bytes_per_token(model, shortest, change) + vocabulary))
    return min(tokens, most) if tokens >= len(longest) else None


def _bytes_per_token(model: ChatModel, row: list[int], change: Change) -> float:
    """What one token keeps for the way back, seen on one row."""
    sizes = dict[int, int]()
    weights = {p.untyped_storage().data_ptr() for p in model.model.parameters()}

    def count(kept: torch.Tensor) -> torch.Tensor:
        storage = kept.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return kept

    model.model.requires_grad_(False)
    with torch.enable_grad(), change(), torch.autograd.graph.saved_tensors_hooks(count, lambda kept: kept):
        logits = model.model(**pad_left(model, [row]).inputs(), logits_to_keep=1).logits
    del logits
    return max(1.0, sum(sizes.values()) / len(row))
