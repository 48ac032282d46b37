"""Run a loaded model: forward passes over batches, and log-probabilities.

Owns the one way in which everything else runs a model, whole in memory or block by block; never knows what the rows
ask or how the model was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from typing import TypeVar

import torch
from transformers import DynamicCache

from abliterate.model.batches import Batch, batches, pad_left
from abliterate.model.blockwise import Keeper, run_blockwise
from abliterate.model.cache import continued, new_cache
from abliterate.model.hooks import record_resid_post
from abliterate.model.load import ChatModel, StopForward
from abliterate.model.native import AnyModel, NativeModel
from abliterate.model.progress import Progress, silent

_Found = TypeVar("_Found")
#: Changes the running model while a batch (or an opening) runs.
Change = Callable[[Batch], AbstractContextManager[None]]
#: Is given a batch, a layer and `resid_post[layer]` `[rows, tokens, d_model]` of the batch's own tokens.
OnBlock = Callable[[Batch, int, torch.Tensor], None]


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32: a softmax over a vocabulary in bfloat16 would add noise of its own."""
    return logits.float().log_softmax(-1)


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats along the last axis: `Σ_t p_t (log p_t − log q_t)` from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def along(answer: list[int]) -> slice:
    """The positions, counted from a row's end, whose logits are about the tokens of the answer it ends with."""
    return slice(-len(answer) - 1, -1)


def starts_as_embedding(model: ChatModel) -> bool:
    """Whether what the embedding's rows hold is what the stream starts with: not scaled, and behind no norm.

    Positions may add to it: two tokens that change places must differ by their rows.
    """
    found = list[torch.Tensor]()

    def looked_up(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module.weight, torch.Tensor)
        found.extend([module.weight[args[0]].float(), output.float()])

    def entered(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).float())

    with ExitStack() as stack, torch.inference_mode():
        embedding = model.model.get_input_embeddings()
        stack.callback(embedding.register_forward_hook(looked_up).remove)
        stack.callback(model.blocks[0].register_forward_pre_hook(entered, with_kwargs=True).remove)
        for _ in forward(model, [pad_left(model, [[5, 9], [9, 5]])], tokens=1):
            pass
    rows, output, stream = (x[0, 0] - x[1, 0] for x in found)
    return torch.allclose(rows, output, rtol=1e-2, atol=1e-6) and torch.allclose(rows, stream, rtol=1e-2, atol=1e-4)


def unchanged(_batch: Batch) -> AbstractContextManager[None]:
    """The model as it is."""
    return nullcontext()


def forward(
    model: AnyModel,
    todo: Iterable[Batch],
    *,
    tokens: int = 0,
    change: Change = unchanged,
    on_block: OnBlock | None = None,
    n_blocks: int | None = None,
    keep: int = 0,
    progress: Progress = silent,
    keeper: Keeper | None = None,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Run batches, and yield each with the logits `[rows, tokens, d_vocab]` of what follows its last `tokens` tokens.

    A model in memory runs batch by batch, one that is read from its files block by block: then the first result comes
    when all blocks have run, the head being applied batch by batch. llama.cpp gives logits alone.

    Args:
        model: what runs.
        todo: in the order of the results; an opening is run once for successive batches that share it.
        tokens: 0 leaves out the head.
        change: entered around all that is computed for a batch, and for an opening.
        on_block: called after every block.
        n_blocks: how many of the first blocks run (with `tokens` 0).
        keep: how many of each row's last tokens `on_block` needs of the last block (0: all).
        progress: called with the number of rows done.
        keeper: what a run block by block leaves after each of them, and goes on from.
    """
    if isinstance(model, NativeModel):
        assert tokens and on_block is None and change is unchanged
        yield from model.passes(todo, tokens, progress)
    elif model.weights is not None:
        yield from run_blockwise(
            model, todo, tokens, change, on_block, n_blocks, keep if on_block else tokens, progress, keeper
        )
    else:
        yield from _run_whole(model, todo, tokens, change, on_block, n_blocks, progress)


def _run_whole(
    model: ChatModel,
    todo: Iterable[Batch],
    tokens: int,
    change: Change,
    on_block: OnBlock | None,
    n_blocks: int | None,
    progress: Progress,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    for batch, past in with_openings(model, todo, change):
        with torch.inference_mode(), ExitStack() as stack:
            stack.enter_context(change(batch))
            if on_block is not None:
                stack.enter_context(record_resid_post(model, partial(on_block, batch)))
            if tokens:
                # Some classes take no notice of how many are to be kept.
                logits = model.model(**batch.inputs(past), logits_to_keep=tokens).logits[:, -tokens:]
            else:
                logits = torch.empty(0)
                _run_first(model, batch, past, n_blocks)
        progress(len(batch.indices))
        yield batch, logits


def with_openings(
    model: ChatModel, todo: Iterable[Batch], change: Change = unchanged
) -> Iterator[tuple[Batch, DynamicCache | None]]:
    """Each batch with the keys and values before it; an opening runs once for successive batches that share it."""
    opening, kept = None, None
    for batch in todo:
        if batch.opening is not opening:
            opening = batch.opening
            kept = open_cache(model, opening, change) if opening is not None else None
        yield batch, _past(batch, kept)


def _past(batch: Batch, opened: DynamicCache | None) -> DynamicCache | None:
    """The keys and values before a batch: its own cache where it has one, filled with those of its opening."""
    if opened is None or batch.opening is None:
        return batch.past
    filled = continued(opened, batch.after)
    if batch.past is not None:
        batch.past.layers = filled.layers
        return batch.past
    return filled


def _run_first(model: ChatModel, batch: Batch, past: DynamicCache | None, n_blocks: int | None) -> None:
    """The first blocks alone."""

    def stop(*_: object) -> None:
        raise StopForward

    stops = n_blocks is not None and n_blocks < model.n_layers
    with ExitStack() as stack, suppress(StopForward):
        if stops:
            stack.callback(model.blocks[n_blocks or 0].register_forward_pre_hook(stop).remove)
        model.model.base_model(**batch.inputs(past))


def open_cache(model: ChatModel, opening: Batch, change: Change = unchanged) -> DynamicCache:
    """The keys and values of an opening, and of what comes before it."""
    before = opening.opening
    cache = new_cache(model) if before is None else continued(open_cache(model, before, change), opening.after)
    with torch.inference_mode(), change(opening):
        model.model.base_model(**opening.inputs(cache))
    return cache


def first_token_log_probs(
    model: AnyModel, rows: list[list[int]], batch_size: int, progress: Progress = silent
) -> torch.Tensor:
    """`[len(rows), d_vocab]` log-probabilities of the token after each row."""
    return torch.stack(after_each(model, rows, batch_size, lambda _i, p: p, progress))


def after_each(
    model: AnyModel,
    rows: list[list[int]],
    batch_size: int,
    measure: Callable[[int, torch.Tensor], _Found],
    progress: Progress = silent,
) -> list[_Found]:
    """What `measure` finds of a row's index and the log-probabilities `[d_vocab]` of the token after it."""
    found = {
        i: measure(i, p)
        for batch, logits in forward(model, batches(model, rows, batch_size), tokens=1, progress=progress)
        for i, p in zip(batch.indices, log_probs(logits[:, -1]), strict=True)
    }
    return [found[i] for i in range(len(rows))]
