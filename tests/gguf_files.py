"""Tiny GGUF files, written by llama.cpp's own package: what each architecture's blocks hold, in its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from abliterate.checkpoint.ggml_blocks import LAYOUTS, Blocks

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
