"""Learn by experiment which parameters write to the residual stream, on which axis, behind which gain.

Owns the experiments on a twin. A parameter writes along an axis if projecting a random direction out of it on
that axis leaves what it contributes to the stream without that direction. Never knows files or families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from abliterate.architecture.stream import BlockCall, Stream, find_stream

#: Relative: norms compute in float32 even in a float64 model, so exact experiments end near 1e-7.
TOLERANCE = 1e-5
#: The same for a model that computes in float32 throughout.
COARSE = 1e-3


@dataclass(frozen=True, slots=True)
class Gain:
    """What lies between a writer and the stream: a norm with gain `parameter + offset` (None: no gain).

    `centred` where the norm subtracts the mean (LayerNorm).
    """

    parameter: str | None
    offset: float
    centred: bool


@dataclass(frozen=True, slots=True)
class Writer:
    """A parameter that writes to the stream along `axis`; `layer` is None outside the blocks."""

    parameter: str
    axis: int
    layer: int | None
    gain: Gain | None


@dataclass(frozen=True)
class Finding:
    """What was learned of a twin: its stream, its writers, what an edit of all of them leaves of the direction.

    `before` and `after` are the largest shares of the direction in the stream of a forward pass. `refused` says
    why no edit of the weights can be exact, or is None.
    """

    stream: Stream
    writers: tuple[Writer, ...]
    before: float
    after: float
    refused: str | None


def probe(model: PreTrainedModel) -> Finding:
    """Find every writer of a twin and prove it: edit them all and measure the stream of a whole forward pass.

    Raises:
        UnsupportedError: the model has no residual stream to look at.
    """
    with torch.no_grad():
        stream = find_stream(model)
        r = random_unit(stream.d_model)
        inner = f"{stream.path}."
        outside = {n: p for n, p in model.named_parameters() if not n.startswith(inner)}
        writers: list[Writer] = []
        for layer, call in stream.calls.items():
            why = _stream_is_changed(call, r)
            found = None if why is not None else _of_block(stream, layer, call, r)
            if found is None:
                share = stream.share(r)
                return Finding(stream, (), share, share, why or _without_writer(stream, outside, r))
            writers += found
        writers += [Writer(n, axis, None, gain) for n, (axis, gain) in _Search(stream.embed, outside, r).find().items()]
        before = stream.share(r)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        edits = {w.parameter: _edited(parameters, w, r) for w in writers}
        with _replaced(parameters, edits):
            after = stream.share(r)
        refused = None if after <= TOLERANCE and after < 1e-3 * before else _without_writer(stream, outside, r)
    return Finding(stream, tuple(writers), before, after, refused)


def direction_behind(r: torch.Tensor, gain: torch.Tensor | float, centred: bool) -> torch.Tensor:
    """`normalise(C(g ⊙ r))`: what to remove from a writer behind a norm, `C` subtracting the mean in a LayerNorm."""
    d = gain * r
    d = d - d.mean() if centred else d
    unit: torch.Tensor = d / d.norm()
    return unit


def removed_from(parameters: dict[str, torch.nn.Parameter], writer: Writer, r: torch.Tensor) -> torch.Tensor:
    """What to remove from a writer so that `r` does not reach the stream, `[d_model]`."""
    if writer.gain is None:
        return r
    gain = parameters[writer.gain.parameter].double() + writer.gain.offset if writer.gain.parameter else 1.0
    return direction_behind(r, gain, writer.gain.centred)


def project(weight: torch.Tensor, axis: int, d: torch.Tensor) -> torch.Tensor:
    """`W − d (dᵀ W)` along `axis`."""
    last = weight.movedim(axis, -1)
    d = d.to(weight.dtype)
    return (last - (last @ d)[..., None] * d).movedim(-1, axis)


def random_unit(width: int) -> torch.Tensor:
    """A random direction, the same at every call."""
    r = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    unit: torch.Tensor = r / r.norm()
    return unit


def _of_block(stream: Stream, layer: int, call: BlockCall, r: torch.Tensor) -> list[Writer] | None:
    """The writers of a block; None if something else writes the direction too."""
    hidden = call.hidden
    hidden = hidden - (hidden @ r)[..., None] * r
    search = _Search(lambda: call.run(hidden), dict(call.block.named_parameters()), r)
    found = search.find()
    if not search.complete():
        return None
    prefix = f"{stream.path}.{layer}."

    def full(gain: Gain | None) -> Gain | None:
        named = gain is not None and gain.parameter is not None
        return Gain(f"{prefix}{gain.parameter}", gain.offset, gain.centred) if gain and named else gain

    return [Writer(f"{prefix}{name}", axis, layer, full(gain)) for name, (axis, gain) in found.items()]


def _stream_is_changed(call: BlockCall, r: torch.Tensor) -> str | None:
    """Why a block without its matrices puts the direction into a stream that has none of it; None if it does not."""
    parameters = dict(call.block.named_parameters())
    silent = {n: torch.zeros_like(p) for n, p in parameters.items() if p.ndim > 1}
    one = call.hidden - (call.hidden @ r)[..., None] * r
    other = one.flip(-1) * 1.7 + 0.3 * one.roll(1, -1)
    other = other - (other @ r)[..., None] * r
    with _replaced(parameters, silent):
        out, step = call.run(one) - call.run(other), one - other
    if not bool(torch.isfinite(out).all()) or (out @ r).norm() <= 1e-5 * out.norm():
        return None
    ratio = out / step
    if (ratio - ratio.reshape(-1, ratio.shape[-1]).median(0).values).abs().median() < 1e-6:
        return "blocks multiply the stream by a gain"
    with _replaced(parameters, silent):
        large, larger = call.run(1e4 * one), call.run(2e4 * one)
    if (larger - large).norm() < 0.1 * large.norm():
        return "blocks normalise the stream itself"
    if one.ndim > 3:
        return "blocks mix several streams (hyper-connections)"
    return "blocks mix or gate the stream itself"


def _without_writer(stream: Stream, outside: dict[str, torch.nn.Parameter], r: torch.Tensor) -> str:
    """Why what reaches the stream is not only what weights write to it, as far as can be told."""
    with _replaced(outside, {name: torch.zeros_like(p) for name, p in outside.items()}):
        if bool((stream.embed() @ r).abs().max() > COARSE):
            return "positions that are computed, not learned, enter the stream"
    embedding = stream.model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    width = embedding.shape[-1]
    if stream.d_model > width and stream.d_model % width == 0:
        return "blocks mix several streams (hyper-connections)"
    if any(
        p.ndim == 3 and p.shape[0] == stream.d_model and p.shape[1] == 1 and p.shape[2] > 1
        for call in stream.calls.values()
        for p in call.block.parameters()
    ):
        return "a convolution over tokens lies between what writes and the stream"
    return "some of what reaches the stream has no writer"


@contextmanager
def _replaced(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> Iterator[None]:
    kept = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(kept[name].dtype)
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value


def _edited(parameters: dict[str, torch.nn.Parameter], writer: Writer, r: torch.Tensor) -> torch.Tensor:
    return project(parameters[writer.parameter].data, writer.axis, removed_from(parameters, writer, r))


class _Search:
    """The writers among `parameters` of the computation `run`, which returns `[..., d_model]`."""

    def __init__(self, run: Callable[[], torch.Tensor], parameters: dict[str, torch.nn.Parameter], r: torch.Tensor):
        self.run, self.parameters, self.r = run, parameters, r
        self.tolerance = TOLERANCE if any(p.dtype == torch.float64 for p in parameters.values()) else COARSE
        width = len(r)
        self.candidates = [(n, a) for n, p in parameters.items() for a, size in enumerate(p.shape) if size == width]
        self.candidates.sort(key=lambda c: -parameters[c[0]].ndim)
        self.gains = [n for n, p in parameters.items() if p.shape == (width,)]
        self.found: dict[str, tuple[int, Gain | None]] = {}

    def find(self) -> dict[str, tuple[int, Gain | None]]:
        """Axis and gain of every writer.

        The last writers show at once; earlier ones when those found are zeroed; several that add up before one
        norm when another, or all others, of them are zeroed too.
        """
        while self._extend(()):
            pass
        if not self.complete():
            while any(self._extend((name,)) for name in self._open_matrices()):
                while self._extend(()):
                    pass
        if not self.complete():
            self._extend_apart()
        for name in [n for n in self.found if self.complete(without=n)]:
            del self.found[name]  # its edit changes nothing along the direction: it does not write
        return self.found

    def _open_matrices(self) -> list[str]:
        names = dict.fromkeys(n for n, _ in self.candidates if n not in self.found and self.parameters[n].ndim > 1)
        return list(names)

    def _extend(self, also_zero: tuple[str, ...]) -> bool:
        """Add what now shows as a writer; whether anything did."""
        new: dict[str, tuple[int, Gain | None]] = {}
        behind = {gain.parameter for _, gain in self.found.values() if gain is not None}
        for name, axis in self.candidates:
            if name in self.found or name in new or name in also_zero or name in behind:
                continue
            if also_zero and self.parameters[name].ndim == 1:
                continue
            shown = self._test(name, axis, (*self.found, *also_zero))
            if shown is not None:
                new[name] = (axis, shown[0])
                behind |= {shown[0].parameter} if shown[0] is not None else set()
        self.found |= new
        return bool(new)

    def _extend_apart(self) -> None:
        """Add the matrices that show as writers while all others are zeroed."""
        for name, axis in [c for c in self.candidates if c[0] in self._open_matrices()]:
            shown = self._test(name, axis, [n for n in (*self.found, *self._open_matrices()) if n != name])
            if shown is not None and name not in self.found:
                self.found[name] = (axis, shown[0])

    def _test(self, name: str, axis: int, zeroed: Iterable[str]) -> tuple[Gain | None] | None:
        """The gain (in a tuple) under which `name` writes along `axis` while others are zeroed; None if it does not."""
        weight = self.parameters[name].data
        silent = {n: torch.zeros_like(self.parameters[n]) for n in zeroed}
        base = self._with(silent | {name: torch.zeros_like(weight)})
        before = ((self._with(silent) - base) @ self.r).abs().max()
        if not bool(before > 1e-7 * base.abs().max().clamp(min=1e-3)):
            return None
        for gain, d in self._hypotheses():
            after = ((self._with(silent | {name: project(weight, axis, d)}) - base) @ self.r).abs().max()
            if bool(after <= self.tolerance * before):
                return (gain,)
        return None

    def _hypotheses(self) -> Iterator[tuple[Gain | None, torch.Tensor]]:
        yield None, self.r
        for name in self.gains:
            for offset in (0.0, 1.0):
                for centred in (False, True):
                    gain = self.parameters[name].data.double() + offset
                    yield Gain(name, offset, centred), direction_behind(self.r, gain, centred)
        yield Gain(None, 0.0, True), direction_behind(self.r, 1.0, True)

    def _with(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        with _replaced(self.parameters, values):
            return self.run()

    def complete(self, without: str | None = None) -> bool:
        """Whether editing all that was found (but `without`) takes the direction out of the whole computation."""
        edits = {
            name: _edited(self.parameters, Writer(name, axis, None, gain), self.r)
            for name, (axis, gain) in self.found.items()
            if name != without
        }
        before, after = (self._with({}) @ self.r).abs().max(), (self._with(edits) @ self.r).abs().max()
        return bool(after <= 10 * self.tolerance * before)
