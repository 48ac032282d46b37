"""What a model remembers of tokens it has read: keys and values, kept once for all rows that share them.

Owns transformers' caches and when they can be shared; never knows what the rows ask.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from abliterate.model.load import ChatModel, StopForward

if TYPE_CHECKING:
    from abliterate.model.native import AnyModel


def new_cache(model: ChatModel) -> DynamicCache:
    """An empty cache of the model's own kinds of layers."""
    return DynamicCache(config=model.model.config)


def remembers_all(model: AnyModel, longest: int) -> bool:
    """Whether the model remembers keys and values of every token of rows of at most `longest`, and nothing else.

    What llama.cpp remembers is out of reach, and its own business.
    """
    if not isinstance(model, ChatModel) or getattr(model.model, "_is_stateful", False):
        return False
    return all(_plain(layer, longest) for layer in new_cache(model).layers)


def keeps_keys(model: ChatModel) -> bool:
    """Whether all that the model remembers is keys and values, of all tokens or of a window."""
    stateful = getattr(model.model, "_is_stateful", False)
    return not stateful and all(type(i) in (DynamicLayer, DynamicSlidingWindowLayer) for i in new_cache(model).layers)


def _plain(layer: object, longest: int) -> bool:
    if isinstance(layer, DynamicSlidingWindowLayer):
        return type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > longest
    return type(layer) is DynamicLayer


def continued(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """A copy of these rows that a pass may extend."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(torch.tensor(rows))
    return found


def blank(model: ChatModel, rows: int, length: int) -> DynamicCache:
    """A cache that looks as if it held `length` tokens of `rows` rows: enough to build masks and positions from."""
    cache = new_cache(model)
    nothing = torch.zeros(1, device=model.device).expand(rows, 1, length, 1)
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.update(nothing, nothing)
    return cache


@contextmanager
def until_filled(cache: DynamicCache, layer: int) -> Iterator[None]:
    """What runs is left as soon as a layer of the cache has its keys and values: nothing else of it is wanted."""
    held: Any = cache.layers[layer]
    update = held.update

    def fill(*args: Any, **kwargs: Any) -> None:
        update(*args, **kwargs)
        raise StopForward

    held.update = fill
    try:
        yield
    except StopForward:
        pass
    finally:
        del held.update
