"""llama.cpp's names for what is known of transformers' classes: which class a GGUF is of, and what its tensors are.

Owns the way from `general.architecture` to a class, and from its tensors' names to those in a GGUF, by llama.cpp's own
table in the `gguf` package. Never reads tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from abliterate.architecture import kept
from abliterate.architecture.patterns import LAYER, Architecture, Gain, WriterPattern, regex
from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.gguf_names import name_map, require_gguf
from abliterate.errors import UnsupportedError

BLOCK, HEAD = "blk.", "output.weight"
#: Classes that llama.cpp calls by another name; the others differ in dashes at most.
_CLASSES = {
    "command-r": "cohere", "deepseek2": "deepseek_v3", "gemma3": "gemma3_text", "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text", "glm-dsa": "glm_moe_dsa", "granitehybrid": "granitemoehybrid",
    "hunyuan-dense": "hunyuan_v1_dense", "hunyuan-moe": "hunyuan_v1_moe", "llama4": "llama4_text",
    "mimo2": "mimo_v2_flash", "mistral3": "ministral3", "paddleocr": "paddleocr_vl", "phi2": "phi",
    "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text", "starcoder": "gpt_bigcode",
}  # fmt: skip
#: What only reads the stream, in whatever class: tensors that conversion splits, joins or names anew. Llama's rows of
#: q and k, which it puts in another order, are among them; it never permutes the axis that lies in the stream.
_READERS = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_gate", "attn_k_b", "attn_v_b", "attn_kv_b", "attn_q_norm",
    "attn_k_norm", "attn_rot_embd", "attn_norm", "attn_norm_2", "attn_sub_norm", "ffn_norm", "ffn_sub_norm",
    "ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_gate_shexp",
    "ffn_up_shexp", "exp_probs_b", "ssm_dt", "ssm_norm",
)  # fmt: skip
_ENDINGS = (".weight", ".bias", "")
#: What the mixers of a class are called in its layers without keys and values, and in those with them.
_MIXERS = {
    "lfm2": ("conv", "full_attention"), "lfm2_moe": ("conv", "full_attention"),
    "granitemoehybrid": ("mamba", "attention"),
}  # fmt: skip
#: What is stated that may change which layers there are, or what they compute; widths are those of the class.
_SHAPING = ("num_hidden_layers", "first_k_dense_replace", "swin_norm", "use_parallel_residual")
_TOKEN = re.compile(r"\{layer[^}]*\}")


def find(checkpoint: Checkpoint) -> Architecture | str | None:
    """What is kept for the class of a GGUF's model, in llama.cpp's names; why it is refused; None if nothing is.

    Raises:
        UnsupportedError: llama.cpp or transformers has no such class, or the `gguf` package is not installed.
    """
    found = kept.find(checkpoint.config | {"model_type": class_of(checkpoint)})
    return renamed(found, checkpoint.model_type, checkpoint.tensors) if isinstance(found, Architecture) else found


def learn(checkpoint: Checkpoint) -> Architecture:
    """The same by experiments on the class, with the layers that the GGUF states; takes torch and some seconds.

    Raises:
        UnsupportedError: as `find`, or no edit of the weights can be exact; says why.
    """
    from abliterate.architecture.learn import learn_class

    name = class_of(checkpoint)
    stated: dict[str, Any] = {k: checkpoint.config[k] for k in _SHAPING if k in checkpoint.config}
    heads = checkpoint.config.get("num_key_value_heads")
    if isinstance(heads, list) and name in _MIXERS:
        stated["layer_types"] = [_MIXERS[name][n > 0] for n in heads]
    return renamed(learn_class(name, stated), checkpoint.model_type, checkpoint.tensors)


def class_of(checkpoint: Checkpoint) -> str:
    """The `model_type` in transformers of a GGUF's model.

    Raises:
        UnsupportedError: llama.cpp or transformers has no such class.
    """
    name = checkpoint.model_type
    _tables(name)
    if name == "llama" and any("_exps." in tensor for tensor in checkpoint.tensors):
        return "mixtral"
    found = _CLASSES.get(name) or next((known for known in kept.model_types() if _plain(known) == _plain(name)), None)
    if found is None:
        raise UnsupportedError(
            f"architecture '{name}': llama.cpp has it, and transformers no class for it that is known to generate text"
        )
    return found


def renamed(known: Architecture, architecture: str, names: Collection[str]) -> Architecture:
    """What is known of a class, in the names that llama.cpp has for its tensors.

    ggml multiplies by matrices `[out, in]` and `[experts, out, in]`, whatever the layout was before, and by gains as
    they are: conversion adds what a class adds to them. Biases are those that the file, of tensors `names`, has.

    Raises:
        UnsupportedError: llama.cpp has no name for what writes to the stream outside the blocks.
    """
    names_of = _tables(architecture)

    def tensor(name: str) -> str | None:
        return _renamed(name, names_of)

    called = {w.tensor: tensor(w.tensor) for w in known.writers}
    writers: dict[str, WriterPattern] = {}
    for w in known.writers:
        name = called[w.tensor]
        if name is None and w.layer is None:
            raise UnsupportedError(f"architecture '{architecture}': llama.cpp has no tensor for '{w.tensor}'")
        # What has no name in a block is in no file of it, or stays unplaced there.
        if name is not None and name not in writers:
            axis = w.axis if w.layer is None else int("_exps." in name)
            head = HEAD if w.head is not None else None
            writers[name] = replace(w, tensor=name, axis=axis, head=head, gain=_gain(w.gain, tensor))
    kinds = {frozenset(name for p in kind if (name := called[p]) is not None): None for kind in known.kinds}
    kinds.pop(frozenset(), None)
    aside = {f"{BLOCK}{LAYER}.{reader}" for reader in _READERS}
    aside |= {_stem(name) for b in known.bystanders if (name := tensor(b)) is not None}
    bystanders = tuple(stem + ending for stem in sorted(aside - set(map(_stem, writers))) for ending in _ENDINGS)
    return _with_biases(
        replace(known, prefix=BLOCK, writers=tuple(writers.values()), bystanders=bystanders, kinds=tuple(kinds)), names
    )


def _gain(gain: Gain | None, tensor: Any) -> Gain | None:
    """The gain by the name of its tensor, which has in it what the class adds."""
    if gain is None or gain.tensor is None:
        return gain
    name = tensor(gain.tensor)
    if name is None:
        raise UnsupportedError(
            f"llama.cpp has no tensor for '{gain.tensor}', the gain behind what writes to the stream"
        )
    return replace(gain, tensor=name, included=gain.offset)


def _with_biases(known: Architecture, names: Iterable[str]) -> Architecture:
    """The architecture with biases beside those of its writers that have one in the file, and with no others."""
    names, biases = list(names), {}
    for w in known.writers:
        bias = w.tensor.removesuffix(".weight") + ".bias"
        if w.layer is not None and w.tensor.endswith(".weight") and any(map(regex(bias).fullmatch, names)):
            parameter = re.sub(r"(?<=\.)weight$", "bias", w.parameter)
            biases[bias] = replace(w, tensor=bias, parameter=parameter, head=None)
    inside = [w for w in known.writers if w.layer is None or w.tensor.endswith(".weight")]
    beside = [next((w for w in known.writers if w.tensor == name), made) for name, made in biases.items()]

    def kind(weights: frozenset[str]) -> frozenset[str]:
        kept_ones = {name for name in weights if not name.endswith(".bias")}
        return frozenset(kept_ones | {b for b in biases if b.removesuffix(".bias") + ".weight" in kept_ones})

    return replace(
        known,
        writers=(*inside, *beside),
        kinds=tuple(dict.fromkeys(map(kind, known.kinds))),
    )


def _renamed(name: str, names_of: Any) -> str | None:
    """llama.cpp's name for a tensor, or for a pattern of one; None where it has none."""
    token = _TOKEN.search(name)
    stem = re.sub(r"\.(\{n\}|\d+)(?=\.)", "", _TOKEN.sub("LAYER", name)).replace("LAYER", "0")
    stem = re.sub(r"_bias$", ".bias", stem)
    ending = next(e for e in _ENDINGS if stem.endswith(e))
    stem = stem.removesuffix(ending)
    bare = re.sub(r"^(model\.)?language_model\.(model\.)?", "", stem)
    for way in (stem, f"model.{bare}", bare, bare.partition(".")[2]):
        found: str | None = names_of.get_name(way)
        if found is not None:
            layer = token[0] if token is not None else ""
            return re.sub(r"^blk\.0\.", f"{BLOCK}{layer}.", found) + (ending or ".weight")
    return None


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _plain(name: str) -> str:
    return re.sub(r"[-_]", "", name)


def _tables(architecture: str) -> Any:
    """llama.cpp's table of names for the tensors of an architecture of one block.

    Raises:
        UnsupportedError: it knows no such architecture, or the table is not here.
    """
    require_gguf()
    from gguf.constants import MODEL_ARCH_NAMES

    for number, name in MODEL_ARCH_NAMES.items():
        if name == architecture:
            return name_map(number, 1)
    raise UnsupportedError(
        f"architecture '{architecture}' is not known to the package gguf as one of llama.cpp's; a newer one may"
    )
