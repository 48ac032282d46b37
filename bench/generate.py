"""Write a checkpoint of Llama-3.1-8B's shapes and a wanted size: the model's own width, as many layers as fit.

uv run python bench/generate.py 4 FOLDER       about 4 GB in shards of at most 5 GB, random bfloat16 weights
uv run python bench/generate.py 4 FOLDER --tokenizer      with a tokenizer and a chat template too, so that it runs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

D_MODEL, D_FF, KV, VOCABULARY, SHARD = 4096, 14336, 1024, 128256, 5_000_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D_MODEL, "intermediate_size": D_FF,
    "num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "hidden_act": "silu",
}  # fmt: skip


def tensors(n_layers: int, vocabulary: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the released files."""
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, D_MODEL))]
    for i in range(n_layers):
        shapes = {
            "input_layernorm": (D_MODEL,), "mlp.down_proj": (D_MODEL, D_FF), "mlp.gate_proj": (D_FF, D_MODEL),
            "mlp.up_proj": (D_FF, D_MODEL), "post_attention_layernorm": (D_MODEL,),
            "self_attn.k_proj": (KV, D_MODEL), "self_attn.o_proj": (D_MODEL, D_MODEL),
            "self_attn.q_proj": (D_MODEL, D_MODEL), "self_attn.v_proj": (KV, D_MODEL),
        }  # fmt: skip
        found += [(f"model.layers.{i}.{name}.weight", shape) for name, shape in shapes.items()]
    return [*found, ("model.norm.weight", (D_MODEL,)), ("lm_head.weight", (vocabulary, D_MODEL))]


def size(names: list[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes in bfloat16."""
    return sum(2 * int(np.prod(shape)) for _, shape in names)


def generate(gigabytes: float, folder: Path) -> None:
    """Write the folder; the largest model of at most `gigabytes`, its vocabulary halved until two layers fit."""
    vocabulary = VOCABULARY
    while size(tensors(2, vocabulary)) > gigabytes * 1e9:
        vocabulary //= 2
    n_layers = next(n for n in range(32, 0, -1) if size(tensors(n, vocabulary)) <= gigabytes * 1.01e9)
    folder.mkdir(parents=True)
    config = CONFIG | {"num_hidden_layers": n_layers, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text("{}")
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for tensor in tensors(n_layers, vocabulary):
        if shards[-1] and size([*shards[-1], tensor]) > SHARD:
            shards.append([])
        shards[-1].append(tensor)
    rng, weight_map = np.random.default_rng(0), dict[str, str]()
    pool = (rng.normal(size=1 << 26).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for i, names in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, names, pool, rng)
        weight_map |= {n: name for n, _ in names}
    index = {"metadata": {"total_size": size(tensors(n_layers, vocabulary))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write(
    path: Path,
    names: list[tuple[str, tuple[int, ...]]],
    pool: np.ndarray,
    rng: np.random.Generator,  # type: ignore[type-arg]
) -> None:
    header, at = dict[str, object](), 0
    for name, shape in names:
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = at // 2
        while left:  # pieces of one pool of numbers, from places of their own
            start = int(rng.integers(len(pool) // 2))
            piece = pool[start : start + left]
            file.write(piece.tobytes())
            left -= len(piece)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer learned from the built-in prompts, and a template with a system prompt, as chat models have them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from abliterate.prompts.load import builtin_splits

    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [p for kind in ("harmful", "harmless") for p in builtin_splits(kind).whole.prompts]  # type: ignore[arg-type]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4000, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=special[2:],
    )  # fmt: skip
    fast.chat_template = (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|system|>You are a helpful assistant.<|end|>"
        "{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)


if __name__ == "__main__":
    generate(float(sys.argv[1]), Path(sys.argv[2]))
    if "--tokenizer" in sys.argv:
        write_tokenizer(Path(sys.argv[2]))
