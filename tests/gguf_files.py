"""Tiny GGUF files, written by llama.cpp's own package: what each architecture's blocks hold, in its names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from abliterate.checkpoint.ggml_blocks import LAYOUTS, Blocks
from abliterate.checkpoint.gguf_names import name_map

#: More memory than reading any header takes: the window and the table.
LITTLE = 4 << 20
D_MODEL, D_FF, VOCABULARY, HEADS, EXPERTS = 32, 128, 48, 4, 3
#: A width that falls into blocks of every type.
WIDE = 256

_NORMS = {"attn_norm.weight": (D_MODEL,), "ffn_norm.weight": (D_MODEL,)}
_ATTENTION = {f"attn_{n}.weight": (D_MODEL, D_MODEL) for n in ("q", "k", "v", "output")}
_MLP = {
    "ffn_gate.weight": (D_FF, D_MODEL), "ffn_up.weight": (D_FF, D_MODEL), "ffn_down.weight": (D_MODEL, D_FF)
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_inp.weight": (EXPERTS, D_MODEL), "ffn_gate_exps.weight": (EXPERTS, D_FF, D_MODEL),
    "ffn_up_exps.weight": (EXPERTS, D_FF, D_MODEL), "ffn_down_exps.weight": (EXPERTS, D_MODEL, D_FF),
}  # fmt: skip
_BEHIND = {"post_attention_norm.weight": (D_MODEL,), "post_ffw_norm.weight": (D_MODEL,)}
LLAMA = _NORMS | _ATTENTION | _MLP
MIXTRAL = _NORMS | _ATTENTION | _EXPERTS
GEMMA2 = LLAMA | _BEHIND
OLMO2 = _ATTENTION | _MLP | _BEHIND | {"attn_q_norm.weight": (D_MODEL,), "attn_k_norm.weight": (D_MODEL,)}
QWEN2 = LLAMA | {f"attn_{n}.bias": (D_MODEL,) for n in ("q", "k", "v")}
GPT2 = {
    **_NORMS, "attn_norm.bias": (D_MODEL,), "ffn_norm.bias": (D_MODEL,), "attn_qkv.weight": (3 * D_MODEL, D_MODEL),
    "attn_qkv.bias": (3 * D_MODEL,), "attn_output.weight": (D_MODEL, D_MODEL), "attn_output.bias": (D_MODEL,),
    "ffn_up.weight": (D_FF, D_MODEL), "ffn_up.bias": (D_FF,), "ffn_down.weight": (D_MODEL, D_FF),
    "ffn_down.bias": (D_MODEL,),
}  # fmt: skip
GPT_OSS = {
    "attn_norm.weight": (D_MODEL,), "post_attention_norm.weight": (D_MODEL,), **_ATTENTION,
    **{f"attn_{n}.bias": (D_MODEL,) for n in ("q", "k", "v", "output")}, "attn_sinks.weight": (HEADS,), **_EXPERTS,
    "ffn_gate_inp.bias": (EXPERTS,), "ffn_gate_exps.bias": (EXPERTS, D_FF), "ffn_up_exps.bias": (EXPERTS, D_FF),
    "ffn_down_exps.bias": (EXPERTS, D_MODEL),
}  # fmt: skip
DEEPSEEK = {
    **_NORMS, "attn_q.weight": (D_MODEL, D_MODEL), "attn_kv_a_mqa.weight": (16, D_MODEL),
    "attn_kv_a_norm.weight": (8,), "attn_k_b.weight": (HEADS, 8, 8), "attn_v_b.weight": (HEADS, 8, 8),
    "attn_output.weight": (D_MODEL, D_MODEL),
}  # fmt: skip
CONVOLUTION = {
    **_NORMS, "shortconv.conv.weight": (D_MODEL, 3), "shortconv.in_proj.weight": (3 * D_MODEL, D_MODEL),
    "shortconv.out_proj.weight": (D_MODEL, D_MODEL), **_MLP,
}  # fmt: skip
ATTENTION = LLAMA | {"attn_q_norm.weight": (D_MODEL // HEADS,), "attn_k_norm.weight": (D_MODEL // HEADS,)}
SHARED = {f"ffn_{n}_shexp.weight": _MLP[f"ffn_{n}.weight"] for n in ("gate", "up", "down")}
DEEPSEEK_DENSE, DEEPSEEK_MOE = DEEPSEEK | _MLP, DEEPSEEK | _EXPERTS | SHARED


def tiny_gguf(
    path: Path,
    architecture: str = "llama",
    blocks: list[dict[str, tuple[int, ...]]] | None = None,
    outside: dict[str, tuple[int, ...]] | None = None,
    dtype: Any = np.float32,
    split: int = 0,
    **stated: Any,
) -> Path:
    """Write random tensors for the layers `blocks`, embedding and last norm; a head where `outside` has one.

    With `split`, parts of so many tensors are written, named after `path`.
    """
    blocks = [LLAMA, LLAMA] if blocks is None else blocks
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_block_count(len(blocks))
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_FF)
    writer.add_head_count(HEADS)
    if architecture not in ("bloom", "gpt2"):
        writer.add_head_count_kv(stated.pop("heads", HEADS))
    writer.add_context_length(128)
    writer.add_vocab_size(VOCABULARY)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list([f"täg{i}" for i in range(VOCABULARY)])
    writer.add_token_scores([float(-i) for i in range(VOCABULARY)])
    if "alignment" in stated:
        writer.add_custom_alignment(stated.pop("alignment"))
    for key, value in stated.items():
        add(writer, key.replace("__", "."), value)
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (VOCABULARY, D_MODEL), **(outside or {}), "output_norm.weight": (D_MODEL,)}
    for layer, block in enumerate(blocks):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = random.normal(0, 0.3, shape) + ("norm.weight" in name)
        writer.add_tensor(name, values.astype(np.float32 if len(shape) == 1 else dtype))
    return finish(writer)


def of_block_types(path: Path, types: list[str], head: bool = True, split: int = 0) -> Path:
    """A llama of which each tensor that writes to the stream is of another of the types, in turn, the embedding first.

    Of types that cannot be encoded the codes are random.
    """
    layers, in_turn = -(-(len(types) - 1) // 2), iter(types)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_block_count(layers)
    writer.add_embedding_length(WIDE)
    if not split:  # which the package states in the first part alone
        writer.add_custom_alignment(64)
    writer.add_token_list([f"täg{i}" for i in range(VOCABULARY)])
    writer.add_string("general.license", "apache-2.0")
    random = np.random.default_rng(2)
    names = ["token_embd.weight", "output_norm.weight", *(["output.weight"] if head else [])]
    names += [f"blk.{i}.{name}" for i in range(layers) for name in LLAMA]
    for name in names:
        rows = VOCABULARY if name in ("token_embd.weight", "output.weight") else WIDE
        values = random.normal(0, 0.3, (rows, WIDE)).astype(np.float32)
        if "norm" in name:
            writer.add_tensor(name, np.abs(values[0]))
        elif name.startswith("token_embd") or "_output" in name or "_down" in name:
            dtype = next(in_turn, "F32")
            writer.add_tensor(name, _stored(values, dtype, random), raw_dtype=Type[dtype])
        else:
            writer.add_tensor(name, values.astype(np.float16))
    return finish(writer)


def _stored(values: Any, dtype: str, random: np.random.Generator) -> Any:
    if dtype in ("F32", "F16"):
        return values.astype("<f4" if dtype == "F32" else "<f2")
    if dtype in LAYOUTS:
        return Blocks(dtype).round(values, np.arange(len(values)))
    block, nbytes = gguf.GGML_QUANT_SIZES[Type[dtype]]
    raw = random.integers(0, 256, (len(values), WIDE // block, nbytes), dtype=np.uint8)
    raw[..., :2] = np.array([0.01], "<f2").view(np.uint8)
    return raw.reshape(len(values), -1)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key by the type of its value."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def finish(writer: gguf.GGUFWriter) -> Path:
    """Write the file, or all its parts; the path of the (first) one."""
    path = Path(writer.path)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else next(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def of_all_types(path: Path) -> Path:
    """A file with a tensor of two rows in every type that ggml has."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    random = np.random.default_rng(1)
    for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        raw = random.integers(0, 256, (2, max(1, 64 // block) * nbytes), dtype=np.uint8)
        writer.add_tensor(f"t.{kind.name}", raw, raw_dtype=Type(kind))
    return finish(writer)


def chat_gguf(
    path: Path, folder: Path, kind: Type = Type.F32, split: int = 0, factors: float | None = None, **stated: Any
) -> Path:
    """A tiny Llama or Qwen 2 checkpoint of `tests.tiny`, one row larger than its tokenizer, as llama.cpp's converter.

    Matrices are stored as `kind`; `factors` divide the rotary frequencies.
    """
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    architecture, heads, groups = (config[k] for k in ("model_type", "num_attention_heads", "num_key_value_heads"))
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    names = name_map(dict(map(reversed, gguf.MODEL_ARCH_NAMES.items()))[architecture], 9)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _vocabulary(writer, folder, config["vocab_size"])
    for key, value in stated.items():
        add(writer, key.replace("__", "."), value)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.full(config["hidden_size"] // heads // 2, factors, np.float32))
    for name, values in load_file(folder / "model.safetensors").items():
        stem, _, ending = name.rpartition(".")
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            n = heads if stem.endswith("q_proj") else groups
            values = values.reshape(n, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        own = kind if values.ndim > 1 else Type.F32
        values = gguf.quants.quantize(values.astype(np.float32), own)
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", values, raw_dtype=own)
    return finish(writer)


def _vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """The tokens of `tests.tiny` with one more, because no file of this kind is without a merge."""
    from tests.tiny import SPECIAL

    known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(known, key=lambda token: known[token]), "th"]
    assert len(tokens) == size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(True)
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())
