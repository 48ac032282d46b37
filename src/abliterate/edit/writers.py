"""Which tensors of a checkpoint write to the residual stream, on which axis, behind which gain.

Owns the match between a checkpoint's names and what is known of its class, and the rule that every tensor of a block
must be placed. Never reads tensor data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from abliterate.architecture import kept, llamacpp
from abliterate.architecture.patterns import LAYER, Architecture, Gain, WriterPattern, regex
from abliterate.checkpoint import Checkpoint, TensorInfo
from abliterate.checkpoint.gguf_names import require_gguf
from abliterate.checkpoint.storage import logical_name, stored_axis
from abliterate.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class ResidualWriter:
    """One tensor that writes to the residual stream.

    `axis` is the tensor's residual axis: 0 where rows are the stream (`nn.Linear`), 1 for embedding rows.
    `gain` names the tensor of the normalisation between this writer and the stream, `gain_offset` what is to be added
    to the stored gain, `gain_included` what the formula adds and it has in it already, `centred` whether the formula
    subtracts the mean. `tied_to` names what else the tensor
    serves as. `module` and `gain_parameter` are paths within the block, or of the model outside the blocks;
    `parameter` is the path in the model of what the tensor is loaded into. `strength` is this writer's own share of
    what is removed.
    """

    tensor: str
    role: str
    layer: int | None
    axis: int
    module: str
    gain: str | None = None
    gain_offset: float = 0.0
    gain_included: float = 0.0
    gain_parameter: str | None = None
    centred: bool = False
    tied_to: str | None = None
    parameter: str = ""
    strength: float = 1.0

    @property
    def place(self) -> str:
        """Layer and module, such as `12.mlp.down_proj`, or the module alone: what a tuned strength belongs to."""
        return self.module if self.layer is None else f"{self.layer}.{self.module}"


def residual_writers(checkpoint: Checkpoint, known: Architecture | None = None) -> list[ResidualWriter]:
    """Every tensor of the checkpoint that writes to the residual stream, in checkpoint order.

    Every other tensor of a block is known to read the stream, or the call fails: a writer that is overlooked would
    leave part of the direction behind without a word. What writes is as `known`, or kept from earlier experiments on
    such a configuration, or learned by experiment now.

    Raises:
        UnsupportedError: no edit can be exact, or there are tensors that cannot be placed; names them.
    """
    if known is not None:
        return _placed(checkpoint, known)
    found = _kept(checkpoint)
    if isinstance(found, str):
        raise _unknown(checkpoint, f"architecture '{checkpoint.model_type}': no edit can be exact: {found}")
    if found is not None:
        try:
            return _placed(checkpoint, found)
        except UnsupportedError:
            pass  # its sizes, which are not compared, may make other layers than those seen: look at them
    return _placed(checkpoint, _learned(checkpoint))


def _kept(checkpoint: Checkpoint) -> Architecture | str | None:
    """What earlier experiments found on the checkpoint's model class, or why it is refused."""
    if checkpoint.format == "gguf":
        require_gguf()  # names its tensors
    try:
        return llamacpp.find(checkpoint) if checkpoint.format == "gguf" else kept.find(checkpoint.config)
    except UnsupportedError as error:
        raise _unknown(checkpoint, str(error)) from None


def _learned(checkpoint: Checkpoint) -> Architecture:
    """What experiments on the checkpoint's model class find; takes torch and some seconds."""
    try:
        if checkpoint.format == "gguf":
            return llamacpp.learn(checkpoint)
        from abliterate.architecture.learn import learn

        return learn(checkpoint.path)
    except UnsupportedError as error:
        raise _unknown(checkpoint, str(error)) from None


def _unknown(checkpoint: Checkpoint, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{checkpoint.source}: {why}; cannot tell which of {len(checkpoint.tensors)} weights write to the residual "
        f"stream: {', '.join(list(checkpoint.tensors)[:4])}, …"
    )


def _refuse(checkpoint: Checkpoint, names: list[str]) -> None:
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    raise UnsupportedError(
        f"{checkpoint.source}: architecture '{checkpoint.model_type}': cannot tell whether these weights write to the "
        f"residual stream: {shown}; the model class has no such weights in its blocks"
    )


def _placed(checkpoint: Checkpoint, known: Architecture) -> list[ResidualWriter]:
    """The checkpoint's writers by what experiments on its model class found.

    Raises:
        UnsupportedError: names or shapes are not those of the class; names the difference.
    """
    known = _as_named(checkpoint, known)
    patterns = [(regex(p.tensor), p) for p in known.writers]
    bystanders = [regex(p) for p in known.bystanders]
    in_block = re.compile(rf"{re.escape(known.prefix)}(\d+)\.")
    writers, unplaced, matched = list[ResidualWriter](), [], dict[int, set[str]]()
    n_layers = known.n_layers or checkpoint.n_layers
    for name, tensor in checkpoint.tensors.items():
        logical = logical_name(checkpoint, name)
        if logical is None or _is_leftover(tensor):
            continue
        inside = in_block.match(logical)
        if inside is not None and n_layers <= int(inside[1]) < n_layers + checkpoint.n_further_layers:
            continue  # heads that predict further tokens are stored as layers behind the last; left alone
        if inside is not None and int(inside[1]) >= n_layers:
            raise UnsupportedError(
                f"{checkpoint.source}: has '{name}', but by its configuration there are {n_layers} layers"
            )
        found = next((p for expression, p in patterns if expression.fullmatch(logical)), None)
        if found is not None:
            layer = int(inside[1]) if inside is not None else None
            writers.append(_by_pattern(checkpoint, name, layer, found))
            matched.setdefault(-1 if layer is None else layer, set()).add(found.tensor)
        elif inside is not None and not any(expression.fullmatch(logical) for expression in bystanders):
            unplaced.append(name)
    if unplaced:
        _refuse(checkpoint, unplaced)
    _check_kinds(checkpoint, known, matched, n_layers)
    widths = {checkpoint.tensors[w.tensor].shape[w.axis] for w in writers}
    if len(widths) != 1:
        raise UnsupportedError(f"{checkpoint.source}: what writes to the stream has several widths: {sorted(widths)}")
    return writers


def _as_named(checkpoint: Checkpoint, known: Architecture) -> Architecture:
    """The architecture in the names of a checkpoint that was saved without its head: all lack the first part."""
    first = known.prefix.split(".")[0] + "."
    if any(name.startswith(first) for name in checkpoint.tensors):
        return known

    def short(name: str) -> str:
        return name.removeprefix(first)

    def short_gain(gain: Gain | None) -> Gain | None:
        return replace(gain, tensor=short(gain.tensor)) if gain is not None and gain.tensor is not None else gain

    writers = tuple(replace(w, tensor=short(w.tensor), gain=short_gain(w.gain)) for w in known.writers)
    kinds = tuple(frozenset(short(n) for n in kind) for kind in known.kinds)
    return replace(
        known, prefix=short(known.prefix), writers=writers, bystanders=tuple(map(short, known.bystanders)), kinds=kinds
    )


def _by_pattern(checkpoint: Checkpoint, name: str, layer: int | None, p: WriterPattern) -> ResidualWriter:
    tensor = checkpoint.tensors[name]
    axis = stored_axis(tensor, p.axis)
    if len(tensor.shape) <= axis:
        raise UnsupportedError(
            f"{checkpoint.source}: '{name}' has shape {list(tensor.shape)}; in '{checkpoint.model_type}' it has "
            f"an axis {axis} that writes to the residual stream"
        )
    tied = p.head if p.head is not None and not _has_head(checkpoint, p.head) else None
    path = p.parameter.replace(LAYER, str(layer))
    if p.gain is None:
        return ResidualWriter(name, p.role, layer, axis, p.module, tied_to=tied, parameter=path)
    gain = p.gain.tensor.replace(LAYER, str(layer)) if p.gain.tensor is not None else None
    if gain is not None and gain not in checkpoint.tensors:
        raise UnsupportedError(f"{checkpoint.source}: '{gain}', the gain behind '{name}', is missing")
    return ResidualWriter(
        name, p.role, layer, axis, p.module, gain, p.gain.offset - p.gain.included, p.gain.included, p.gain.parameter,
        p.gain.centred, tied, path,
    )  # fmt: skip


def _is_leftover(tensor: TensorInfo) -> bool:
    """Buffers that old releases stored beside their weights: causal masks, and frequencies of rotary positions."""
    mask = len(tensor.shape) == 4 and tensor.name.endswith(("attn.bias", "attention.bias"))
    return mask or tensor.name.endswith((".masked_bias", "rotary_emb.inv_freq"))


def _has_head(checkpoint: Checkpoint, head: str) -> bool:
    """Whether there is such a tensor, whatever comes before its last two names: that differs between releases."""
    short = ".".join(head.split(".")[-2:])
    return any(name == short or name.endswith(f".{short}") for name in checkpoint.tensors)


def _check_kinds(checkpoint: Checkpoint, known: Architecture, matched: dict[int, set[str]], n_layers: int) -> None:
    """Every layer writes like one of the layers that experiments saw, and the embeddings are there."""
    lacking = [p.tensor for p in known.writers if p.layer is None and p.tensor not in matched.get(-1, set())]
    for layer in range(n_layers):
        have = frozenset(matched.get(layer, ()))
        if have not in known.kinds:
            nearest = min(known.kinds, key=lambda kind: len(kind ^ have))
            lacking += [p.replace(LAYER, str(layer)) for p in sorted(nearest ^ have)]
    if lacking:
        raise UnsupportedError(
            f"{checkpoint.source}: the weights do not match the model class '{known.model_type}', which has {n_layers} "
            f"layers here: missing, or where no layer of it has them: {', '.join(lacking[:4])}"
        )
