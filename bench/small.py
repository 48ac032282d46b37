"""Write a small random checkpoint of Llama's layout in many shards, and a direction, for measurements that repeat.

uv run python bench/small.py FOLDER       138 MB in 12 shards, with FOLDER/../direction.npy
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint; `shards` of about as many tensors each, or one file."""

    d_model: int = 768
    d_ff: int = 2048
    layers: int = 8
    vocabulary: int = 8000
    shards: int = 12
    tied: bool = False


#: Small enough to be edited in hundredths of a second.
TINY = Shape(16, 24, 2, 20, 3)


def generate(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """Write the checkpoint, and `direction.npy` beside it; the same shape and seed give the same bytes."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(s, np.float32).astype(np.float16) for name, s in _shapes(shape).items()}
    folder.mkdir(parents=True)
    weight_map = dict[str, str]()
    for i, part in enumerate(np.array_split(list(tensors), shape.shards)):
        file = f"model-{i + 1:05d}-of-{shape.shards:05d}.safetensors" if shape.shards > 1 else "model.safetensors"
        save_file({name: tensors[name] for name in part.tolist()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part.tolist(), file)
    if shape.shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": shape.layers,
        "hidden_size": shape.d_model, "intermediate_size": shape.d_ff, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps({"vocabulary": ["word"] * 1000}))
    (folder / "README.md").write_text("the base's own card\n")
    np.save(folder.parent / "direction.npy", rng.standard_normal(shape.d_model))
    return folder


def _shapes(s: Shape) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s.vocabulary, s.d_model)}
    for i in range(s.layers):
        square, up = (s.d_model, s.d_model), (s.d_ff, s.d_model)
        parts = {
            "self_attn.q_proj": square, "self_attn.k_proj": square, "self_attn.v_proj": square,
            "self_attn.o_proj": square, "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": up[::-1],
            "input_layernorm": (s.d_model,), "post_attention_layernorm": (s.d_model,),
        }  # fmt: skip
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
    found["model.norm.weight"] = (s.d_model,)
    return found if s.tied else found | {"lm_head.weight": (s.vocabulary, s.d_model)}


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
