"""Whether a model class gives the same block by block as in one pass: tried on a shrunken twin.

Owns the trial; the engine that is tried is `model.blockwise`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from abliterate.architecture.twin import REFUSALS, build_twin, random_ids, text_part
from abliterate.errors import UnsupportedError
from abliterate.model.batches import Batch
from abliterate.model.cache import remembers_all
from abliterate.model.load import ChatModel
from abliterate.model.run import forward
from abliterate.model.weights import Weights, block_list, require_loader


class _InMemory:
    """The blocks of a twin are there already."""

    stream_memory = 1 << 30

    @contextmanager
    def loaded(self, _layer: int, _last: int | None = None) -> Iterator[None]:
        """Nothing to do."""
        yield

    def release(self) -> None:
        """Nothing to let go of."""


class _Tokens:
    """In place of a chat format: a twin has no tokenizer."""

    pad_token_id, eos_token_id = 0, 0

    @property
    def tokenizer(self) -> _Tokens:
        """Itself."""
        return self


def why_not_blockwise(config: PreTrainedConfig) -> str | None:
    """Why models of this configuration cannot run block by block, or None where they can.

    Streams after every block and logits, with and without a shared opening, must be those of a whole pass.
    """
    if getattr(config, "quantization_config", None) is not None:
        return "quantised weights run whole only"
    try:
        require_loader()
    except UnsupportedError as error:
        return str(error)
    try:
        part = text_part(build_twin(config))
        if _shares_weights(part):
            return f"architecture '{config.model_type}' uses weights of one block in another"
        same = same_blockwise(part, part, _InMemory())
    except (*REFUSALS, UnsupportedError) as error:
        return f"architecture '{config.model_type}' does not run block by block ({type(error).__name__})"
    return None if same else f"architecture '{config.model_type}' does not give the same block by block"


def _shares_weights(model: PreTrainedModel) -> bool:
    """Whether a parameter lies in two blocks."""
    parameters = [id(p) for block in block_list(model)[1] for p in set(block.parameters())]
    return len(parameters) > len(set(parameters))


def same_blockwise(whole: PreTrainedModel, part: PreTrainedModel, weights: Weights) -> bool:
    """Whether `part`, its blocks brought by `weights`, gives what `whole` gives in one pass, on some random text."""
    chat: Any = _Tokens()
    one, other = ChatModel(whole, chat), ChatModel(part, chat, weights)
    results = [(_results(one, batches), _results(other, batches)) for batches in _trials(one)]
    return all(len(a) == len(b) and all(map(_close, a, b)) for a, b in results)


def _trials(model: ChatModel) -> list[list[Batch]]:
    ids = random_ids()
    ones, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    plain = Batch([0, 1], ids, ones, positions)
    if not remembers_all(model, ids.shape[1]):
        return [[plain]]
    opening = Batch([0], ids[:1, :3], ones[:1, :3], positions[:1, :3])
    return [[plain], [Batch([0, 1], ids[:, 3:], ones, positions[:, 3:], opening, (0, 0))]]


def _results(model: ChatModel, batches: list[Batch]) -> list[torch.Tensor]:
    """The stream after every block, and the logits, of all tokens and with the last block's last one alone."""
    found: dict[int, torch.Tensor] = {}

    def keep(_batch: Batch, layer: int, hidden: torch.Tensor) -> None:
        found[layer] = hidden.clone()

    ((_, logits),) = forward(model, batches, tokens=1, on_block=keep)
    ((_, alone),) = forward(model, batches, tokens=1)
    return [*(found[layer] for layer in sorted(found)), logits, alone]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)
