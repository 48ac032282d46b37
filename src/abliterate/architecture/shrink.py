"""Shrink a model's configuration: tiny sizes, everything else as configured.

Owns which numbers of a configuration are sizes, and how to make them small so that the model still runs.
Never builds a model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

#: The width of the stream where heads have a width of their own; no other size of the twin equals it.
D_MODEL = 96
VOCABULARY = 131
MOST_LAYERS = 8
_HEADS, _EXPERTS, _LAYERS, _SIDE = (2, 4), 4, 3, 16
#: More layers than any model has.
WHOLE = 10**6

_WIDTH = (
    "hidden_size", "d_model", "n_embd", "n_embed", "dim", "emb_dim", "model_dim", "embedding_size", "hidden_dim",
    "word_embed_proj_dim", "embed_dim", "out_hidden_size", "backbone_hidden_size", "lru_width", "embedding_dim",
    "adapter_in_dim", "adapter_input_size", "attention_hidden_size", "hidden_size_global",
)  # fmt: skip
#: Widths beside the stream and the heads, between an image encoder and the text; all are divided by the same number.
_SIDE_WIDTHS = (
    "projector_hidden_size", "merged_hidden_size", "projection_dim", "image_token_embed_dim", "hidden_sizes",
    "audio_hidden_size", "moe_hidden_size",
)  # fmt: skip
_TOWARDS_TEXT = ("adapter_out_dim", "text_hidden_size", "out_hidden_size")
#: Which layers of an image encoder are read, by number.
_READ_LAYERS = ("vision_feature_layer", "vision_feature_layers")
_HEAD_COUNTS = (
    "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads",
    "swa_num_attention_heads", "linear_num_heads", "index_n_heads",
)  # fmt: skip
_KV_HEAD_COUNTS = (
    "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads", "kv_n_heads",
)  # fmt: skip
_FEED_FORWARD = (
    "intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "d_ff",
    "moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "moe_shared_expert_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "mlp_dim",
    "dim_ff",
)  # fmt: skip
_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num")
_CHOSEN_EXPERTS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k",
)  # fmt: skip
_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth",
    "num_blocks", "layers",
)  # fmt: skip
#: How many tokens a recurrence computes at a time; the result is the same.
_CHUNKS = ("chunk_size", "mamba_chunk_size")
_REUSING_LAYERS = ("num_kv_shared_layers",)
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers")
_EXPLICIT_HEADS = ("head_dim", "v_head_dim", "qk_nope_head_dim")


@dataclass(frozen=True, slots=True)
class Form:
    """One way to shrink a configuration.

    `heads` at most; `tied_to_heads` keeps `d_model = heads x head width`. At least `least` layers stay, and every kind
    of layer that the configuration lists is there `repeats` times: layers of one kind may share weights, and then one
    is not enough.
    """

    heads: int
    tied_to_heads: bool
    repeats: int = 1
    least: int = 0


def forms(config: PreTrainedConfig, least: int) -> Iterator[Form]:
    """The ways to shrink a configuration, the likeliest first."""
    text = vars(config.get_text_config(decoder=True))
    explicit = any(_is_size(text.get(name)) for name in _EXPLICIT_HEADS)
    for repeats in (1, 2):
        for heads in _HEADS:
            for tied_to_heads in (False, True) if explicit else (True, False):
                yield Form(heads, tied_to_heads, repeats, least)


def depth(config: PreTrainedConfig) -> int | None:
    """How many layers the text of a configuration runs through."""
    text = config.get_text_config(decoder=True)
    return _first(vars(text) | _derived(text), _LAYER_COUNTS)


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """What a configuration lists for each layer of its text, as one word a layer; nothing where it lists nothing."""
    lists = [
        v for v in vars(config.get_text_config(decoder=True)).values() if isinstance(v, list | tuple)
        if len(v) == depth(config)
    ]  # fmt: skip
    return tuple(map(str, zip(*lists, strict=True)))


def _derived(config: PreTrainedConfig) -> dict[str, Any]:
    """The number of layers where it is not a field of its own, but the length of a list of their kinds."""
    return {"num_hidden_layers": getattr(config, "num_hidden_layers", None)}


def shrink(config: PreTrainedConfig, form: Form) -> PreTrainedConfig:
    """A copy of `config` with small sizes."""
    small = copy.deepcopy(config)
    _shrink(small, form)
    _face_text(config, small, *(_first(vars(c.get_text_config(decoder=True)), _WIDTH) for c in (config, small)))
    fields = small.to_dict()
    _drop_lost_layers(fields)
    return type(small).from_dict(fields)  # sizes that follow from others are set again, as they will be on loading


def _drop_lost_layers(fields: dict[str, Any]) -> None:
    """Take out, in place, what is set apart for layers that the twin does not have."""
    for value in fields.values():
        if isinstance(value, dict):
            _drop_lost_layers(value)
    layers, depth = fields.get("per_layer_config"), _first(fields, _LAYER_COUNTS)
    if isinstance(layers, dict) and depth is not None:
        fields["per_layer_config"] = {layer: value for layer, value in layers.items() if int(layer) < depth}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _first(fields: dict[str, Any], names: Iterable[str]) -> int | None:
    return next((fields[name] for name in names if _is_size(fields.get(name))), None)


def _shrink(config: PreTrainedConfig, form: Form) -> None:
    fields = _derived(config) | vars(config)
    fields |= {name: fields[stored] for name, stored in config.attribute_map.items() if stored in fields}
    for value in fields.values():
        if isinstance(value, PreTrainedConfig):
            _shrink(value, form)
    small = _widths(fields, form) | _recurrence(fields) | _mixture(fields) | _vocabulary(fields)
    small |= _depth(fields | small, form)
    small |= _state_space(fields | small)
    small |= {name: _few_layers(fields[name]) for name in _READ_LAYERS if name in fields}
    for name, value in small.items():
        if name in vars(config) or name in config.attribute_map:
            setattr(config, name, value)


def _few_layers(numbers: Any) -> Any:
    """Numbers of layers that an encoder of few layers has too."""
    if isinstance(numbers, list | tuple):
        return type(numbers)(range(len(numbers))) if len(numbers) <= _LAYERS else [0] * len(numbers)
    return numbers if not isinstance(numbers, int) else max(-_LAYERS, min(numbers, _LAYERS - 1))


def _face_text(config: PreTrainedConfig, small: PreTrainedConfig, before: int | None, after: int | None) -> None:
    """Set, in `small`, the widths by which encoders of images or sound hand on to a text of that width."""
    for name, value in dict(vars(config)).items():
        if isinstance(value, PreTrainedConfig):
            _face_text(value, getattr(small, name), before, after)
        elif name in _TOWARDS_TEXT and value == before:
            setattr(small, name, after)


def _widths(fields: dict[str, Any], form: Form) -> dict[str, Any]:
    """Widths of stream, heads and feed-forward; head widths and ranks stay, so that what depends on them fits."""
    width, heads = _first(fields, _WIDTH), _first(fields, _HEAD_COUNTS)
    small: dict[str, Any] = {}
    few = min(form.heads, heads) if heads else 1
    if width:
        new = few * (width // heads) if form.tied_to_heads and heads else D_MODEL
        small |= {
            name: new if fields[name] == width else max(8, fields[name] * new // width // 8 * 8)
            for name in _WIDTH
            if _is_size(fields.get(name))
        }
    small |= {name: few for name in _HEAD_COUNTS if _is_size(fields.get(name))}
    for name in _KV_HEAD_COUNTS:
        if _is_size(fields.get(name)):
            small[name] = few if fields[name] == heads else max(1, few // 2) if fields[name] > 1 else 1
    for name in _SIDE_WIDTHS:
        value = fields.get(name)
        if _is_size(value):
            small[name] = max(8, fields[name] // _SIDE)
        elif isinstance(value, list | tuple) and all(map(_is_size, value)):
            small[name] = type(value)(max(8, width // _SIDE) for width in value)
    if _is_size(fields.get("base_channels")):  # of convolutions, normalised in 32 groups
        small["base_channels"] = 32
    small |= {name: 104 + 8 * i for i, name in enumerate(_FEED_FORWARD) if _is_size(fields.get(name))}
    return small


def _recurrence(fields: dict[str, Any]) -> dict[str, Any]:
    """Heads of linear attention: one key head, and as many value heads to it as there were, at most two."""
    keys, values = fields.get("linear_num_key_heads"), fields.get("linear_num_value_heads")
    if not isinstance(keys, int) or not isinstance(values, int):
        return {}
    return {"linear_num_key_heads": 1, "linear_num_value_heads": min(2, values // keys)}


def _state_space(fields: dict[str, Any]) -> dict[str, Any]:
    """Heads of a state-space mixer, which must fill its widened stream; one group of them."""
    small: dict[str, Any] = {name: 1 for name in ("mamba_n_groups", "n_groups", "mamba_ngroups") if name in fields}
    width = _first(fields, _WIDTH)
    small |= {name: min(16, fields[name]) for name in _CHUNKS if _is_size(fields.get(name))}
    inner = _first(fields, ("mamba_d_ssm",))
    if inner:
        small["mamba_d_ssm"] = inner = min(inner, 128)
    for count, head_width, factor in (
        ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
        ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
        ("mamba_num_heads", "mamba_head_dim", "expand"),
        ("num_heads", "head_dim", "expand"),
    ):
        if width and all(_is_size(fields.get(name)) for name in (count, head_width, factor)):
            wide = inner or fields[factor] * width
            small[count] = max(1, wide // fields[head_width])
            if wide < fields[head_width]:
                small[head_width] = wide
    return small


def _mixture(fields: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {name: min(_EXPERTS, fields[name]) for name in _EXPERT_COUNTS if _is_size(fields.get(name))}
    small |= {name: min(2, fields[name]) for name in _CHOSEN_EXPERTS if _is_size(fields.get(name))}
    if _is_size(fields.get("n_group")):
        small["n_group"] = min(2, fields["n_group"])
        if _is_size(fields.get("topk_group")):
            small["topk_group"] = min(fields["topk_group"], small["n_group"])
    return small


def _depth(fields: dict[str, Any], form: Form) -> dict[str, Any]:
    """The shortest prefix of layers that has every kind of them `repeats` times, within `MOST_LAYERS`, and `least`.

    Layers at the end that reuse the keys and values of earlier ones are kept apart from those: two of them.
    """
    depth = _first(fields, _LAYER_COUNTS)
    if depth is None:
        return {}
    per_layer = {k: v for k, v in fields.items() if isinstance(v, list | tuple) and len(v) == depth}
    most = MOST_LAYERS * form.repeats
    n_layers = min(depth, _LAYERS)
    for values in per_layer.values():
        kinds = [str(value) for value in values]
        if len(set(kinds)) <= most:
            where = [[i for i, k in enumerate(kinds) if k == kind][: form.repeats] for kind in set(kinds)]
            n_layers = max(n_layers, *(places[-1] + 1 for places in where))
    for name in _DENSE_FIRST:
        if _is_size(fields.get(name)):
            n_layers = max(n_layers, fields[name] + 1)
    reusing = {name: min(2, fields[name]) for name in _REUSING_LAYERS if _is_size(fields.get(name))}
    n_layers = min(max(min(n_layers, most), form.least) + sum(reusing.values()), depth)
    reusing |= {name: n_layers for name in reusing if fields[name] == depth}
    small: dict[str, Any] = {name: min(n_layers, fields[name]) for name in _LAYER_COUNTS if _is_size(fields.get(name))}
    return small | reusing | {name: type(values)(values[:n_layers]) for name, values in per_layer.items()}


def _vocabulary(fields: dict[str, Any]) -> dict[str, Any]:
    """A small vocabulary, with every special token in it; tokens that stand for images lie apart from the rest."""
    small: dict[str, Any] = {
        name: VOCABULARY
        for name, value in fields.items()
        if "vocab" in name and _is_size(value) and (value > 512 or name == "vocab_size")
    }
    for name, value in fields.items():
        if not name.endswith(("token_id", "token_index")):
            continue
        if isinstance(value, list):
            small[name] = 1
        elif _is_size(value) and value >= VOCABULARY:
            small[name] = 1 if name.startswith(("pad", "bos", "eos", "decoder_start")) else VOCABULARY - 1
    return small
