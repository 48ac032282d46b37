"""Patterns of tensor names: what a twin of few layers and experts says about a checkpoint of many.

Owns the plain values that describe an architecture, and how they match names. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from abliterate.errors import UnsupportedError

LAYER, NUMBER = "{layer}", "{n}"
#: How a name begins that stands for certain layers only.
ONLY = "{layer:"


@dataclass(frozen=True, slots=True)
class Gain:
    """The norm between a writer and the stream: the tensor of its gain and the parameter's path within the block.

    `offset` is what the norm's formula adds to the parameter, and `included` how much of that the stored gain has in
    it already; `centred` where it subtracts the mean. Both names are None for a norm without gain.
    """

    tensor: str | None
    parameter: str | None
    offset: float
    centred: bool
    included: float = 0.0


@dataclass(frozen=True, slots=True)
class WriterPattern:
    """Tensors that write to the stream along `axis`: a name with `{layer}` and `{n}` for numbers that run.

    Where tensors of one name write differently in layers of different kinds, `{layer:0|2}` names the layers meant.

    `layer` is a layer of the twin, or None outside the blocks. `module` is the path (within the block, or of the
    model outside) of the module whose output carries what is written; `head` is the tensor of the LM head beside the
    token embedding: a checkpoint without it has the head read from the embedding. `parameter` is the path of what the
    tensor is loaded into, whole or (one of many experts) in part.
    """

    tensor: str
    axis: int
    role: str
    layer: int | None
    gain: Gain | None
    module: str
    head: str | None
    parameter: str = ""


@dataclass(frozen=True)
class Architecture:
    """What is known of a model class: its writers, every other tensor of its blocks, the kinds of its layers.

    `prefix` is what stands before a layer's number in tensor names; `kinds` holds for each kind of layer the
    patterns of the writers it has; `leak` what an edit left in the twin's stream; `n_layers` how many layers the
    whole model has, by its configuration.
    """

    model_type: str
    prefix: str
    writers: tuple[WriterPattern, ...]
    bystanders: tuple[str, ...]
    kinds: tuple[frozenset[str], ...]
    leak: float
    n_layers: int = 0


def regex(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression with the group `layer`."""
    text = re.escape(pattern).replace(re.escape(LAYER), r"(?P<layer>\d+)", 1)
    text = re.sub(r"\\{layer:([\d\\|]+)\\}", lambda found: f"(?P<layer>{found[1]})".replace("\\", ""), text, count=1)
    return re.compile(text.replace(re.escape(NUMBER), r"\d+"))


def merge(
    model_type: str,
    writers: Iterable[WriterPattern],
    names: Iterable[str],
    n_layers: int,
    leak: float,
    labels: Sequence[str] = (),
) -> Architecture:
    """Turn the writers found in each layer of a twin, and all its tensor names, into patterns.

    `labels` are the kinds of all layers of the whole model, by its configuration; the twin's layers are its first.

    Raises:
        UnsupportedError: a tensor's name does not hold its layer, or layers disagree about a tensor.
    """
    writers, names = list(writers), list(names)
    inside = [w for w in writers if w.layer is not None]
    if not inside:
        raise UnsupportedError(f"architecture '{model_type}': no block writes to the stream")
    prefix = _prefix(inside, model_type)
    layered = {w.tensor: _with_layer(w.tensor, prefix) for w in inside}
    everything = {n: _with_layer(n, prefix) for n in names if n.startswith(prefix)}
    running = _running(set(everything.values()))
    found: dict[str, dict[WriterPattern, set[int]]] = {}
    for w in inside:
        name = running.get(layered[w.tensor], layered[w.tensor])
        gain = replace(w.gain, tensor=_with_layer(w.gain.tensor, prefix)) if w.gain and w.gain.tensor else w.gain
        pattern = replace(w, tensor=name, gain=gain, layer=0)
        found.setdefault(name, {}).setdefault(pattern, set()).add(w.layer or 0)
    patterns, kinds = list[WriterPattern](), dict[int, set[str]]()
    for variants in found.values():
        for pattern, layers in variants.items():
            patterns.append(pattern if len(variants) == 1 else _of_kinds(pattern, layers, labels, model_type))
            for layer in layers:
                kinds.setdefault(layer, set()).add(patterns[-1].tensor)
    if idle := {layer for layer in map(_layer(prefix), names) if layer is not None} - kinds.keys():
        raise UnsupportedError(f"architecture '{model_type}': layer {min(idle)} does not run on text alone")
    written = {w.tensor for w in inside} | _idle_experts(everything, kinds, running)
    bystanders = {running.get(p, p) for n, p in everything.items() if n not in written}
    if both := bystanders & found.keys():
        raise UnsupportedError(f"architecture '{model_type}': only some layers write with '{min(both)}'")
    if len(kinds) != n_layers:
        raise UnsupportedError(f"architecture '{model_type}': some layers write nothing to the stream")
    outside = [w for w in writers if w.layer is None]
    return Architecture(
        model_type, prefix, (*patterns, *outside), tuple(sorted(bystanders)),
        tuple({frozenset(k): None for k in kinds.values()}), leak,
    )  # fmt: skip


def _of_kinds(pattern: WriterPattern, layers: set[int], labels: Sequence[str], model_type: str) -> WriterPattern:
    """A pattern for those layers of the whole model that are of the same kinds as `layers` of the twin.

    Raises:
        UnsupportedError: layers of these kinds write in another way too.
    """
    alike = [layer for layer, label in enumerate(labels) if label in {labels[i] for i in layers}]
    seen = {layer for layer in alike if layer <= max(layers)}
    if not alike or seen != layers:
        raise UnsupportedError(
            f"architecture '{model_type}': layers differ in how '{pattern.tensor}' writes to the stream"
        )
    return replace(pattern, tensor=pattern.tensor.replace(LAYER, f"{{layer:{'|'.join(map(str, alike))}}}"))


def _idle_experts(names: dict[str, str], kinds: dict[int, set[str]], running: dict[str, str]) -> set[str]:
    """Experts to which the twin routed no text, though it did to others of the same layer: for images, say."""
    found = set()
    for name, layered in names.items():
        pattern = running.get(layered)
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        if pattern is not None and "expert" in pattern and number and pattern in kinds.get(int(number.group()), ()):
            found.add(name)
    return found


def _prefix(writers: list[WriterPattern], model_type: str) -> str:
    """What stands before the layer's number in every writer's name."""
    found = set()
    for w in writers:
        before, number, _ = re.split(r"(?<=\.)(\d+)(?=\.)", w.tensor, maxsplit=1) if "." in w.tensor else ("", "", "")
        if number != str(w.layer):
            raise UnsupportedError(
                f"architecture '{model_type}': '{w.tensor}' serves layer {w.layer}: weights are shared"
            )
        found.add(before)
    if len(found) != 1:
        raise UnsupportedError(f"architecture '{model_type}': layers are named in several ways")
    return found.pop()


def _layer(prefix: str) -> Callable[[str], int | None]:
    """What tells the layer of a tensor by its name."""
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return lambda name: int(found[1]) if (found := pattern.match(name)) else None


def _with_layer(name: str, prefix: str) -> str:
    return re.sub(rf"^({re.escape(prefix)})\d+(?=\.|$)", rf"\g<1>{LAYER}", name)


def _running(names: set[str]) -> dict[str, str]:
    """Names whose numbers run from 0 up (experts), mapped to the pattern with `{n}`."""
    groups: dict[str, set[int]] = {}
    members: dict[str, list[str]] = {}
    for name in names:
        for found in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            pattern = name[: found.start()] + NUMBER + name[found.end() :]
            groups.setdefault(pattern, set()).add(int(found.group()))
            members.setdefault(pattern, []).append(name)
    runs = {p for p, numbers in groups.items() if len(numbers) > 1 and numbers == set(range(len(numbers)))}
    return {name: pattern for pattern in sorted(runs) for name in members[pattern]}
