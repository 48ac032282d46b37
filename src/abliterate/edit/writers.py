"""Which tensors of a checkpoint write to the residual stream, on which axis, behind which gain.

Owns the table of families, the match between a checkpoint's names and what was learned of its class, and the rule
that every tensor of a block must be placed. Never reads tensor data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from abliterate.architecture.patterns import LAYER, Architecture, WriterPattern, regex
from abliterate.checkpoint import Checkpoint
from abliterate.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class ResidualWriter:
    """One tensor that writes to the residual stream.

    `axis` is the tensor's residual axis: 0 where rows are the stream (`nn.Linear`), 1 for embedding rows.
    `gain` names the tensor of the normalisation between this writer and the stream, `gain_offset` what its
    formula adds to the stored gain, `centred` whether it subtracts the mean. `tied_to` names what else the tensor
    serves as. `module` and `gain_parameter` are paths within the block, or of the model outside the blocks.
    """

    tensor: str
    role: str
    layer: int | None
    axis: int
    module: str
    gain: str | None = None
    gain_offset: float = 0.0
    gain_parameter: str | None = None
    centred: bool = False
    tied_to: str | None = None


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between Llama-like families: the norms behind the writers, and Gemma's `1 + gain`."""

    attention_norm: str | None = None
    mlp_norm: str | None = None
    gain_offset: float = 0.0


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES: dict[str, _Family] = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "phi3": _Family(),
    "gemma2": _Family(*_POST_NORMS, gain_offset=1.0),
    "gemma3_text": _Family(*_POST_NORMS, gain_offset=1.0),
    "olmo2": _Family(*_POST_NORMS),
}

_LAYER = re.compile(r"(?P<prefix>(?:model\.)?layers\.(?P<layer>\d+)\.)(?P<rest>.+)")
_EMBEDDING = re.compile(r"(?:model\.)?embed_tokens\.weight")
_WRITERS: dict[str, str] = {"self_attn.o_proj": "attention out", "mlp.down_proj": "MLP out"}
#: What reads the stream, normalises it, or never touches it; left alone.
_BYSTANDERS = re.compile(
    r"(?:model\.)?norm\.weight|lm_head\.(?:weight|bias)|(?:model\.)?(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|"
    r"(?:model\.)?layers\.\d+\.(?:"
    r"self_attn\.(?:q|k|v|qkv)_proj\.(?:weight|bias)|self_attn\.[qk]_norm\.weight|"
    r"mlp\.(?:gate|up|gate_up)_proj\.(?:weight|bias)|"
    r"(?:input|post_attention|pre_feedforward|post_feedforward)_layernorm\.weight)"
)


def residual_writers(checkpoint: Checkpoint) -> list[ResidualWriter]:
    """Every tensor of the checkpoint that writes to the residual stream, in checkpoint order.

    Every other tensor is known to read the stream, or the call fails: a writer that is overlooked would
    leave part of the direction behind without a word.

    Raises:
        UnsupportedError: the family is not known, or has tensors that cannot be placed; names them.
    """
    family = FAMILIES.get(checkpoint.model_type)
    if family is None:
        return _placed(checkpoint, _learned(checkpoint))
    writers, unplaced = [], []
    for name in checkpoint.tensors:
        writer = _writer(checkpoint, name, family)
        if writer is not None:
            writers.append(writer)
        elif _BYSTANDERS.fullmatch(name) is None:
            unplaced.append(name)
    if unplaced:
        _refuse(checkpoint, unplaced)
    _check_complete(checkpoint, writers)
    return writers


def _learned(checkpoint: Checkpoint) -> Architecture:
    """What experiments on the checkpoint's model class find; takes torch and some seconds."""
    from abliterate.architecture.learn import learn

    try:
        return learn(checkpoint.path)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{checkpoint.path}: {error}; cannot tell which of {len(checkpoint.tensors)} weights write to the residual "
            f"stream: {', '.join(list(checkpoint.tensors)[:4])}, …"
        ) from None


def _refuse(checkpoint: Checkpoint, names: list[str]) -> None:
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    raise UnsupportedError(
        f"{checkpoint.path}: architecture '{checkpoint.model_type}': cannot tell whether these weights write to the "
        f"residual stream: {shown}; the model class has no such weights in its blocks"
    )


def _placed(checkpoint: Checkpoint, known: Architecture) -> list[ResidualWriter]:
    """The checkpoint's writers by what experiments on its model class found.

    Raises:
        UnsupportedError: names or shapes are not those of the class; names the difference.
    """
    patterns = [(regex(p.tensor), p) for p in known.writers]
    bystanders = [regex(p) for p in known.bystanders]
    in_block = re.compile(rf"{re.escape(known.prefix)}(\d+)\.")
    writers, unplaced, matched = list[ResidualWriter](), [], dict[int, set[str]]()
    n_layers = checkpoint.n_layers
    for name in checkpoint.tensors:
        inside = in_block.match(name)
        if inside is not None and int(inside[1]) >= n_layers:
            continue  # heads that predict further tokens are stored as layers beyond the last; left alone
        found = next((p for expression, p in patterns if expression.fullmatch(name)), None)
        if found is not None:
            layer = int(inside[1]) if inside is not None else None
            writers.append(_by_pattern(checkpoint, name, layer, found))
            matched.setdefault(-1 if layer is None else layer, set()).add(found.tensor)
        elif inside is not None and not any(expression.fullmatch(name) for expression in bystanders):
            unplaced.append(name)
    if unplaced:
        _refuse(checkpoint, unplaced)
    _check_kinds(checkpoint, known, matched, n_layers)
    widths = {checkpoint.tensors[w.tensor].shape[w.axis] for w in writers}
    if len(widths) != 1:
        raise UnsupportedError(f"{checkpoint.path}: what writes to the stream has several widths: {sorted(widths)}")
    return writers


def _by_pattern(checkpoint: Checkpoint, name: str, layer: int | None, p: WriterPattern) -> ResidualWriter:
    if len(checkpoint.tensors[name].shape) <= p.axis:
        raise UnsupportedError(f"{checkpoint.path}: '{name}' has shape {list(checkpoint.tensors[name].shape)}")
    tied = p.tied_to if p.tied_to is not None and p.tied_to not in checkpoint.tensors else None
    if p.gain is None:
        return ResidualWriter(name, p.role, layer, p.axis, p.module, tied_to=tied)
    gain = p.gain.tensor.replace(LAYER, str(layer)) if p.gain.tensor is not None else None
    if gain is not None and gain not in checkpoint.tensors:
        raise UnsupportedError(f"{checkpoint.path}: '{gain}', the gain behind '{name}', is missing")
    return ResidualWriter(
        name, p.role, layer, p.axis, p.module, gain, p.gain.offset, p.gain.parameter, p.gain.centred, tied
    )


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
            f"{checkpoint.path}: the weights do not match the model class '{known.model_type}': missing, or where no "
            f"layer of it has them: {', '.join(lacking[:4])}"
        )


def _writer(checkpoint: Checkpoint, name: str, family: _Family) -> ResidualWriter | None:
    """The writer that tensor `name` is, or None."""
    if _EMBEDDING.fullmatch(name):
        tied = not any(n.endswith("lm_head.weight") for n in checkpoint.tensors)
        return ResidualWriter(name, "embed", None, 1, "embed", tied_to="lm_head.weight" if tied else None)
    found = _LAYER.fullmatch(name)
    if found is None:
        return None
    module, _, kind = found["rest"].rpartition(".")
    role = _WRITERS.get(module)
    if role is None or kind not in ("weight", "bias"):
        return None
    norm = family.attention_norm if role == "attention out" else family.mlp_norm
    gain = f"{found['prefix']}{norm}.weight" if norm else None
    offset, parameter = (family.gain_offset, f"{norm}.weight") if norm else (0.0, None)
    return ResidualWriter(name, role, int(found["layer"]), 0, module, gain, offset, parameter)


def _check_complete(checkpoint: Checkpoint, writers: list[ResidualWriter]) -> None:
    """Every layer has both writers, of the right width, with their gains; and there is one embedding."""
    n_layers, d_model = checkpoint.config.get("num_hidden_layers"), checkpoint.config.get("hidden_size")
    problems = [
        f"{w.tensor} of shape {list(checkpoint.tensors[w.tensor].shape)} (d_model is {d_model})"
        for w in writers
        if checkpoint.tensors[w.tensor].shape[w.axis] != d_model
    ]
    if not isinstance(n_layers, int) or not isinstance(d_model, int):
        raise UnsupportedError(
            f"{checkpoint.path}: config.json: num_hidden_layers {n_layers!r}, hidden_size {d_model!r}; "
            "expected two numbers"
        )
    problems += [f"{w.tensor} (there are {n_layers} layers)" for w in writers if (w.layer or 0) >= n_layers]
    problems += [f"{w.gain} (missing)" for w in writers if w.gain is not None and w.gain not in checkpoint.tensors]
    have = {(w.layer, w.module) for w in writers if w.tensor.endswith(".weight")}
    expected = [(layer, module) for layer in range(n_layers) for module in _WRITERS]
    problems += [
        f"layers.{layer}.{module}.weight (missing)" for layer, module in expected if (layer, module) not in have
    ]
    if (None, "embed") not in have:
        problems.append("embed_tokens.weight (missing)")
    if problems:
        raise UnsupportedError(
            f"{checkpoint.path}: the weights do not match config.json ({n_layers} layers): {'; '.join(problems[:4])}"
        )
