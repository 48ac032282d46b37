"""Run batches block by block: a block is loaded once, and all batches go through it before the next one is.

Owns the order. What a block is called with (masks, rotary tables, caches) comes from transformers' own forward, run
once for each batch with stand-ins for the blocks; so does the head, behind them. Never knows what is measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import DynamicCache

from abliterate.checkpoint.codecs import Raw
from abliterate.checkpoint.matrix import write_all
from abliterate.errors import ResourceError
from abliterate.model.batches import Batch, parted
from abliterate.model.cache import blank, new_cache, remembers_all, until_filled
from abliterate.model.hooks import hidden_states
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress

#: What a stand-in does: from the layer and its block's positional and named arguments, the stream behind it.
Answer = Callable[[int, tuple[Any, ...], dict[str, Any]], torch.Tensor]


class Keeper(Protocol):
    """Keeps the streams of a run after every block, so that another can go on from there."""

    def resumed(self) -> tuple[int, list[Raw]]:
        """How many blocks were run before, and the streams behind them as raw bytes, in the order of the batches."""
        ...

    def after(self, layer: int, streams: list[Raw]) -> None:
        """Block `layer` has run."""
        ...


class _StandIn(nn.Module):
    """In a block's place: what it is called with goes elsewhere. It has the block's attributes, not its hooks."""

    def __init__(self, model: ChatModel, layer: int, answer: Answer) -> None:
        super().__init__()
        self._answer, self._layer, self._returns = answer, layer, model.block_returns
        self._block = (model.blocks[layer],)  # in a tuple: no part of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._returns(self._answer(self._layer, args, kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"][0], name)


@contextmanager
def _standing_in(model: ChatModel, answer: Answer) -> Iterator[None]:
    places, blocks = model.block_list, model.blocks
    stand_ins = [_StandIn(model, layer, answer) for layer in range(len(blocks))]
    try:
        for layer, stand_in in enumerate(stand_ins):
            places[layer] = stand_in
        yield
    finally:
        for layer, block in enumerate(blocks):
            places[layer] = block


@dataclass(frozen=True)
class _Place:
    """Bytes of a file that hold a stream while other batches run."""

    file: IO[bytes]
    offset: int

    def write(self, stream: torch.Tensor) -> None:
        write_all(self.file.fileno(), _bytes(stream.contiguous()), self.offset, "the file of unfinished streams")

    def read(self, like: torch.Tensor) -> torch.Tensor:
        stream = torch.empty(like.shape, dtype=like.dtype)
        wanted, done = _bytes(stream), 0
        while done < len(wanted):
            got = os.preadv(self.file.fileno(), [wanted[done:]], self.offset + done)
            if not got:
                raise ResourceError("the file of unfinished streams ended early; is the temporary folder's disk full?")
            done += got
        return stream


def _bytes(stream: torch.Tensor) -> memoryview:
    return memoryview(stream.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


class _Arguments(NamedTuple):
    """What a block is called with beside the stream; where it was shown the cache `blank`, it is given another."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    blank: DynamicCache | None

    def run(self, block: nn.Module, hidden: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
        """The stream behind the block."""

        def own(value: Any) -> Any:
            return cache if value is self.blank and value is not None else value

        kwargs = {name: own(value) for name, value in self.kwargs.items()}
        return hidden_states(block(hidden, *map(own, self.args), **kwargs))


@dataclass
class _Call:
    """A batch on its way: what each block is called with, and the stream so far, in memory or in a file."""

    batch: Batch
    opening: _Call | None
    serves: bool
    blank: DynamicCache | None
    cache: DynamicCache | None
    place: _Place | None = None
    calls: list[_Arguments] = field(default_factory=list)
    #: What the last block is called with for the tokens that others only look back at, and for the wanted ones.
    parts: tuple[_Arguments, _Arguments] | None = None
    _hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def hidden(self) -> torch.Tensor:
        """The stream `[rows, tokens, d_model]`."""
        return self._hidden if self.place is None else self.place.read(self._hidden)

    @hidden.setter
    def hidden(self, value: torch.Tensor) -> None:
        if self.place is not None:
            self.place.write(value)
            value = value.to("meta")
        self._hidden = value

    @classmethod
    def begin(cls, model: ChatModel, batch: Batch, opening: _Call | None, serves: bool = False) -> _Call:
        """A batch before its first block; `serves` where it is an opening, with keys and values for others."""
        remembers = serves or opening is not None or batch.past is not None
        shown = blank(model, len(batch.indices), batch.shared) if remembers else None
        cache = batch.past if batch.past is not None else new_cache(model) if remembers else None
        return cls(batch, opening, serves, shown, cache)

    def record(self, model: ChatModel, last: int, keep: int) -> None:
        """Embed the batch, and note what each block is to be called with; block `last` for `keep` tokens alone."""
        self.hidden, self.calls = _recorded(model, self.batch, self.blank)
        width, behind = self.batch.input_ids.shape[1], self.batch.attention_mask.shape[1]
        if not self.serves and 0 < keep < width and remembers_all(model, behind):
            self.cache = self.cache if self.cache is not None else new_cache(model)
            before, wanted = (
                _recorded(model, part, blank(model, len(part.indices), part.shared))[1][last]
                for part in parted(self.batch, keep)
            )
            self.parts = before, wanted

    def run(self, model: ChatModel, layer: int) -> torch.Tensor:
        """The stream after block `layer`, which is loaded."""
        self._look_back(layer)
        self.hidden = hidden = self.calls[layer].run(model.blocks[layer], self.hidden, self.cache)
        return hidden

    def run_last(self, model: ChatModel, layer: int, keep: int) -> torch.Tensor:
        """The stream after the last block: of the last `keep` tokens alone, where the others need no more than keys."""
        if self.parts is None or self.cache is None:
            return self.run(model, layer)
        self._look_back(layer)
        before, wanted = self.parts
        block, hidden = model.blocks[layer], self.hidden
        with until_filled(self.cache, layer):
            before.run(block, hidden[:, :-keep], self.cache)
        self.hidden = hidden = wanted.run(block, hidden[:, -keep:], self.cache)
        return hidden

    def _look_back(self, layer: int) -> None:
        """Take up the opening's keys and values."""
        if self.opening is not None and self.cache is not None and self.opening.cache is not None:
            rows = torch.tensor(self.batch.after)
            held: Any = self.opening.cache.layers[layer]
            own: Any = self.cache.layers[layer]
            own.update(held.keys[rows], held.values[rows])

    def forget(self, model: ChatModel, layer: int) -> None:
        """Keys and values of a layer that all batches have run."""
        if self.cache is not None and self.batch.past is None:
            self.cache.layers[layer] = new_cache(model).layers[layer]

    def head(self, model: ChatModel, tokens: int) -> torch.Tensor:
        """Logits `[rows, tokens, d_vocab]` behind the last block, of the tokens whose stream there is."""
        last, batch, shown = model.n_layers - 1, self.batch, self.blank
        if self.parts is not None:
            batch, shown = parted(batch, tokens)[1], self.parts[1].blank

        def play(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            before: torch.Tensor = args[0] if args else kwargs["hidden_states"]
            return self.hidden if layer == last else before

        with _standing_in(model, play):
            logits: torch.Tensor = model.model(**batch.inputs(shown), logits_to_keep=tokens).logits[:, -tokens:]
        return logits


def _recorded(model: ChatModel, batch: Batch, shown: DynamicCache | None) -> tuple[torch.Tensor, list[_Arguments]]:
    """The stream before the first block, and what each block is called with behind the cache that it is shown."""
    calls, first = list[_Arguments](), torch.empty(0)

    def note(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        nonlocal first
        hidden: torch.Tensor
        hidden, *others = args or (kwargs["hidden_states"],)
        if layer == 0:
            first = hidden
        others_named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(_Arguments(tuple(others), others_named, shown))
        return hidden

    with _standing_in(model, note):
        model.model.base_model(**batch.inputs(shown))
    return first, calls


def run_blockwise(
    model: ChatModel,
    todo: Iterable[Batch],
    tokens: int,
    change: Callable[[Batch], AbstractContextManager[None]],
    on_block: Callable[[Batch, int, torch.Tensor], None] | None,
    n_blocks: int | None,
    keep: int,
    progress: Progress,
    keeper: Keeper | None,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """As `run.forward` says, block by block."""
    calls, depth = _begun(model, todo), n_blocks or model.n_layers
    if any(call.place is not None for call in calls):
        keeper = None  # what does not fit in memory is not written a second time
    with torch.inference_mode():
        for call in calls:
            with change(call.batch):
                call.record(model, depth - 1, keep)
        _run_blocks(model, calls, change, on_block, depth, keep, progress, keeper)
    for call in calls:
        if not call.serves:
            with torch.inference_mode(), change(call.batch):
                logits = call.head(model, tokens) if tokens else torch.empty(0)
            yield call.batch, logits


def _begun(model: ChatModel, todo: Iterable[Batch]) -> list[_Call]:
    """All batches before their first block, each opening once, before those that share it."""
    calls, openings = list[_Call](), dict[int, _Call]()

    def begin(batch: Batch, serves: bool) -> _Call:
        opening = batch.opening
        before = None if opening is None else openings.get(id(opening)) or begin(opening, serves=True)
        calls.append(_Call.begin(model, batch, before, serves))
        if serves:
            openings[id(batch)] = calls[-1]
        return calls[-1]

    for batch in todo:
        begin(batch, serves=False)
    _spill(model, calls)
    return calls


def _run_blocks(
    model: ChatModel,
    calls: list[_Call],
    change: Callable[[Batch], AbstractContextManager[None]],
    on_block: Callable[[Batch, int, torch.Tensor], None] | None,
    depth: int,
    keep: int,
    progress: Progress,
    keeper: Keeper | None,
) -> None:
    weights = model.weights
    assert weights is not None
    rows, done = sum(len(call.batch.indices) for call in calls if not call.serves), 0
    try:
        for layer in range(_resumed(calls, keeper), depth):
            with weights.loaded(layer, depth - 1):
                for call in calls:
                    with change(call.batch):
                        hidden = call.run(model, layer) if layer < depth - 1 else call.run_last(model, layer, keep)
                    if on_block is not None and not call.serves:
                        on_block(call.batch, layer, hidden)
            for call in calls:
                call.forget(model, layer)
            if keeper is not None and layer < depth - 1:
                keeper.after(layer, [call.hidden.cpu().view(torch.uint8).numpy() for call in calls])
            progress(rows * (layer + 1) // depth - done)
            done = rows * (layer + 1) // depth
    finally:
        weights.release()


def _spill(model: ChatModel, calls: list[_Call]) -> None:
    """Where the streams of all batches would take too much memory, let them lie in a file."""
    assert model.weights is not None
    each = [call.batch.input_ids.numel() * model.d_model * model.model.dtype.itemsize for call in calls]
    if sum(each) > model.weights.stream_memory and model.device.type == "cpu":
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the last batch that lies in it
        for call, offset in zip(calls, accumulate(each, initial=0), strict=False):
            call.place = _Place(file, offset)


def _resumed(calls: list[_Call], keeper: Keeper | None) -> int:
    """How many blocks an earlier run has done, the streams behind them taken up."""
    first, streams = keeper.resumed() if keeper is not None else (0, [])
    if first:
        for call, raw in zip(calls, streams, strict=True):
            here = call.hidden
            call.hidden = torch.from_numpy(raw).view(here.dtype).reshape(here.shape).to(here.device)
    return first
