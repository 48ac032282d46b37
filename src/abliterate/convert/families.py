"""What llama.cpp computes for a model class of transformers, as the keys of a GGUF say it.

Owns which classes that is done for, and what of their configuration llama.cpp cannot do. Never reads tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.errors import UnsupportedError

#: What there is for every other class.
ELSEWHERE = "convert it with convert_hf_to_gguf.py of llama.cpp, and edit that GGUF"
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Family:
    """What a class is to llama.cpp: `architecture`, how its weights are stored, and its activation.

    `paired`: llama.cpp turns neighbouring rows of a head of q and k together, where transformers turns rows that lie
    half a head apart. `gains_add` is what a norm adds to its gain, which a GGUF has in it. `windows` is the number of
    layers of which the last sees all tokens and the others a window, as llama.cpp has it fixed; None without windows.
    """

    architecture: str
    activation: str = "silu"
    paired: bool = False
    gains_add: float = 0.0
    windows: int | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", paired=True),
    "mistral": Family("llama", paired=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "olmo2": Family("olmo2"),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh", gains_add=1.0, windows=2),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh", gains_add=1.0, windows=6),
}
#: Layers of those Gemmas whose attention llama.cpp scales by the width of the stream's share of a head.
_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


def family_of(folder: Path, config: Any) -> Family:
    """The family of a configuration of transformers.

    Raises:
        UnsupportedError: it is not converted here, or asks for what llama.cpp does not do; says what.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedError(
            f"{folder}: model type '{config.model_type}' is not converted to GGUF here, only {', '.join(FAMILIES)}; "
            f"{ELSEWHERE}"
        )

    def refuse(what: str) -> None:
        raise UnsupportedError(f"{folder}: {what}, which llama.cpp does not do for '{family.architecture}'")

    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", family.activation)
    if activation != family.activation:
        refuse(f"its activation is {activation}, not {family.activation}")
    if getattr(config, "use_sliding_window", False):
        refuse("use_sliding_window is true")
    if family.windows is not None:
        _check_gemma(config, family.windows, refuse)
    return family


def _check_gemma(config: Any, period: int, refuse: Callable[[str], None]) -> None:
    full = [i % period == period - 1 for i in range(config.num_hidden_layers)]
    if [kind == "full_attention" for kind in config.layer_types] != full:
        refuse(f"its layers that see all tokens are not every {period}th")
    by_width = config.num_hidden_layers == _BY_WIDTH[config.model_type]
    expected = config.hidden_size / config.num_attention_heads if by_width else config.head_dim
    if config.query_pre_attn_scalar != expected:
        refuse(f"query_pre_attn_scalar is {config.query_pre_attn_scalar:g}, not {expected:g}")
    wanted = config.model_type == "gemma2"
    if (config.attn_logit_softcapping is not None) != wanted:
        refuse(f"attn_logit_softcapping is {config.attn_logit_softcapping}")
    if wanted and config.final_logit_softcapping is None:
        refuse("final_logit_softcapping is null")


def head_dim(config: Any) -> int:
    """Numbers of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_keys(writer: Any, config: Any, family: Family, folder: Path) -> dict[str, Float32Array]:
    """Write the sizes and choices of a configuration; the tensors that say how it turns its positions, by their name.

    Raises:
        UnsupportedError: positions are turned in a way that is not converted.
    """
    size = head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if family.windows is not None:
        writer.add_sliding_window(config.sliding_window)
    elif family.architecture == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None) is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    return _add_positions(writer, config, folder)


def _add_positions(writer: Any, config: Any, folder: Path) -> dict[str, Float32Array]:
    from gguf.constants import RopeScalingType

    by_kind = config.rope_parameters
    local = by_kind.get("sliding_attention", {})
    rope = by_kind.get("full_attention", by_kind)
    kind, size = rope.get("rope_type", "default"), head_dim(config)
    turned = int(size * rope.get("partial_rotary_factor", 1.0))
    if local.get("rope_type", "default") != "default" or kind not in (
        "default",
        "linear",
        "yarn",
        "llama3",
        "longrope",
    ):
        raise UnsupportedError(f"{folder}: positions are turned as '{kind}', which is not converted here; {ELSEWHERE}")
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(rope["rope_theta"])
    if "rope_theta" in local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
    if kind == "llama3":
        return {"rope_freqs.weight": slowed(config, rope["rope_theta"], turned)}
    if kind != "longrope":
        return {}
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    longer = config.max_position_embeddings / config.original_max_position_embeddings
    larger = np.sqrt(1 + np.log(longer) / np.log(config.original_max_position_embeddings)) if longer > 1 else 1.0
    writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or float(larger))
    return {f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32) for name in ("long", "short")}


def slowed(config: Any, base: float, turned: int) -> Float32Array:
    """By what transformers divides each frequency `base^(-2i/turned)` of a class that was stretched as Llama 3 was."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = np.float64(base) ** (-np.arange(0, turned, 2, dtype=np.float64) / turned)
    found: Float32Array = (plain / frequencies.double().numpy()).astype(np.float32)
    return found
