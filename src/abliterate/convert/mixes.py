"""Which type llama.cpp's mixes of types give each tensor: what `llama-quantize` does without an importance matrix.

Owns the names of the mixes and their rules. Never knows what is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from abliterate.checkpoint.gguf_file import NUMBERS, TYPES

#: By the name that a person types: llama.cpp's number of the file type, and the type of most matrices.
MIXES: dict[str, tuple[int, str]] = {
    "f32": (0, "F32"), "f16": (1, "F16"), "bf16": (32, "BF16"), "q8_0": (7, "Q8_0"), "q4_0": (2, "Q4_0"),
    "q4_1": (3, "Q4_1"), "q5_0": (8, "Q5_0"), "q5_1": (9, "Q5_1"), "q2_k": (10, "Q2_K"), "q3_k_s": (11, "Q3_K"),
    "q3_k_m": (12, "Q3_K"), "q3_k_l": (13, "Q3_K"), "q4_k_s": (14, "Q4_K"), "q4_k_m": (15, "Q4_K"),
    "q5_k_s": (16, "Q5_K"), "q5_k_m": (17, "Q5_K"), "q6_k": (18, "Q6_K"),
}  # fmt: skip
#: What stands in for a type whose blocks a row does not fill.
_SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_WHOLE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Model:
    """What the rules ask of a model: layers, query heads for each head of keys, whether the head is the embedding."""

    n_layers: int
    shared: int
    tied: bool
    #: llama.cpp calls a Llama or Qwen 2 of 80 layers 70B, and gives it finer values.
    large: bool = False


def types_of(shapes: Mapping[str, tuple[int, ...]], mix: str, model: Model) -> dict[str, str]:
    """The type of every tensor, by its name in a GGUF and its shape in torch's order."""
    return {name: _type_of(name, shape, mix, model) for name, shape in shapes.items()}


def _type_of(name: str, shape: tuple[int, ...], mix: str, model: Model) -> str:
    most = MIXES[mix][1]
    if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight"):
        return "F32"
    if most in _WHOLE:
        return most
    wanted = _of_head(most, shape) if _is_head(name, model) else _of_block(name, mix, most, model)
    return _fitting(wanted, shape[-1])


def _is_head(name: str, model: Model) -> bool:
    return name == "output.weight" or (model.tied and name == "token_embd.weight")


def _of_head(most: str, shape: tuple[int, ...]) -> str:
    return "Q8_0" if most == "Q8_0" or shape[-1] % TYPES[NUMBERS[most]][1] else "Q6_K"


def _fitting(wanted: str, columns: int) -> str:
    """The type, or one of smaller blocks that rows of so many columns are made of."""
    for dtype in (wanted, _SMALLER.get(wanted, wanted)):
        if columns % TYPES[NUMBERS[dtype]][1] == 0:
            return dtype
    return "F16"


def _of_block(name: str, mix: str, most: str, model: Model) -> str:
    found = _BLOCK.fullmatch(name)
    if found is None:
        return most
    layer, part, n = int(found[1]), found[2], model.n_layers
    finer = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
    if part in ("attn_v", "attn_qkv"):
        wanted = _of_values(layer, mix, most, finer, model)
        return "Q5_K" if model.large and wanted in ("Q3_K", "Q4_K") else wanted
    if part == "ffn_down":
        return {
            "q2_k": "Q3_K",
            "q3_k_m": "Q5_K" if layer < n // 16 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if layer < n // 8 else most,
            "q4_k_m": "Q6_K" if finer else most,
            "q5_k_m": "Q6_K" if finer else most,
        }.get(mix, most)
    if part == "attn_output":
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(mix, most)
    return most


def _of_values(layer: int, mix: str, most: str, finer: bool, model: Model) -> str:
    return {
        "q2_k": "Q4_K" if model.shared >= 4 else "Q3_K",
        "q3_k_m": "Q5_K" if layer < 2 else "Q4_K",
        "q3_k_l": "Q5_K",
        "q4_k_s": "Q5_K" if layer < 4 else most,
        "q4_k_m": "Q6_K" if finer else most,
        "q5_k_m": "Q6_K" if finer else most,
    }.get(mix, most)
