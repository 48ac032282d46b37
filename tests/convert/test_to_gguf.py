"""A folder becomes a GGUF of which llama.cpp makes the same tokens, and computes the same, as transformers does."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.ggml import decode, encode
from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.convert import to_gguf as converting
from abliterate.convert.mixes import MIXES, Model, types_of
from abliterate.convert.to_gguf import to_gguf
from abliterate.convert.vocabulary import vocabulary_of
from abliterate.errors import AbliterateError, CheckpointError, UnsupportedError, UsageError, VerifyError
from tests.llama import Llama
from tests.tiny import SPECIAL

Tiny = Callable[..., Path]
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SLOWER = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": STRETCHED, "attention_bias": True},
    "mistral": {},
    "qwen2": {"tied": True, "rope_parameters": SLOWER},
    "qwen3": {},
    "phi3": {},
    "olmo2": {},
    "gemma2": {"tied": True, "query_pre_attn_scalar": 8},
    "gemma3_text": {"tied": True, "query_pre_attn_scalar": 8},
}


def converted(folder: Path, out: Path, mix: str = "f32") -> Path:
    to_gguf(open_checkpoint(folder), out, mix)
    return out


def apart(folder: Path, file: Path) -> float:
    """How far llama.cpp's logits behind a chat lie from transformers', in standard deviations; the tokens are equal."""
    llama, tokenizer = Llama(file), AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a river in Asia"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llama.tokens(text, special=False) == ids and len(ids) > 20
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = model(torch.tensor([ids])).logits[0, -1].numpy()
    return float(np.abs(llama.logits(ids) - logits).max() / logits.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(
    family: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: heads left as they are, positions turned without the factors, or gains without what is added."""
    folder = tiny(family, dtype=torch.float32, **FAMILIES[family])
    assert apart(folder, converted(folder, tmp_path / "x.gguf")) < 0.03
    if family in ("llama", "gemma2"):
        wrong = {"llama": ("_heads", lambda *_: None), "gemma2": ("_added", lambda *_: 0.0)}[family]
        monkeypatch.setattr(converting, *wrong)
        assert apart(folder, converted(folder, tmp_path / "wrong.gguf")) > 0.3


def test_a_mix_has_the_encoder_s_numbers_and_runs(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama", dtype=torch.float32, d_model=256)
    file = converted(folder, tmp_path / "x.gguf", "q4_k_m")
    header, weights = read_gguf(file), load_file(folder / "model.safetensors")
    assert header.metadata["general.file_type"] == 15
    assert Counter(t.dtype for t in header.tensors.values()) == {"F32": 7, "Q4_K": 20, "Q6_K": 3}
    for name, stored in (("blk.1.ffn_up", "mlp.up_proj"), ("blk.1.attn_q", "self_attn.q_proj")):
        tensor, values = header.tensors[f"{name}.weight"], weights[f"model.layers.1.{stored}.weight"].numpy()
        if name.endswith("attn_q"):  # of a head first a number of the first half, then one of the second
            values = np.concatenate([h[[i // 2 + i % 2 * 32 for i in range(64)]] for h in np.split(values, 4)])
        raw = np.fromfile(file, np.uint8, tensor.nbytes, offset=tensor.offset).reshape(len(values), -1)
        assert np.array_equal(raw, encode(values, tensor.dtype, raw.shape[1]))
        assert np.abs(decode(raw, tensor.dtype, 256) - values).max() < 0.1 < np.abs(values).max()
    assert np.isfinite(Llama(file).logits([3, 5, 7])).all()


#: What llama-quantize of llama.cpp (in @node-llama-cpp/linux-x64 3.21.1) gave the tensors of two models: how many of
#: each type, and by name those of the layers that a mix tells from others.
QUANTIZED: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "q8_0": ({"Q8_0": 142}, {"Q8_0": 37}),
    "q4_0": ({"Q6_K": 1, "Q4_0": 141}, {"Q8_0": 1, "Q4_0": 36}),
    "q5_1": ({"Q6_K": 1, "Q5_1": 141}, {"Q8_0": 1, "Q5_1": 36}),
    "q2_k": ({"Q6_K": 1, "Q2_K": 81, "Q3_K": 40, "Q4_K": 20}, {"Q8_0": 1, "Q4_0": 27, "Q3_K": 9}),
    "q3_k_s": ({"Q6_K": 1, "Q3_K": 141}, {"Q8_0": 1, "Q4_0": 27, "Q3_K": 9}),
    "q3_k_m": (
        {"Q6_K": 1, "Q3_K": 81, "Q4_K": 57, "Q5_K": 3}, {"Q8_0": 1, "Q5_0": 16, "Q5_1": 2, "Q4_K": 9, "Q4_0": 9}
    ),
    "q3_k_l": ({"Q6_K": 1, "Q3_K": 81, "Q5_K": 60}, {"Q8_0": 1, "Q5_1": 18, "Q5_K": 9, "Q4_0": 9}),
    "q4_k_s": (
        {"Q6_K": 1, "Q4_K": 135, "Q5_K": 6}, {"Q8_0": 1, "Q5_0": 23, "Q5_1": 4, "Q5_K": 1, "Q4_K": 8}
    ),
    "q4_k_m": ({"Q6_K": 21, "Q4_K": 121}, {"Q8_0": 6, "Q5_0": 22, "Q6_K": 5, "Q4_K": 4}),
    "q5_k_s": ({"Q6_K": 1, "Q5_K": 141}, {"Q8_0": 1, "Q5_1": 27, "Q5_K": 9}),
    "q5_k_m": ({"Q6_K": 21, "Q5_K": 121}, {"Q8_0": 6, "Q5_1": 22, "Q6_K": 5, "Q5_K": 4}),
    "q6_k": ({"Q6_K": 142}, {"Q8_0": 28, "Q6_K": 9}),
    "bf16": ({"BF16": 142}, {"BF16": 37}),
}  # fmt: skip


@pytest.mark.parametrize("mix", QUANTIZED)
def test_a_mix_is_that_of_llama_cpp_s_quantiser(mix: str) -> None:
    wide, fused = {"token_embd.weight": (264, 256), "output.weight": (264, 256)}, {"token_embd.weight": (264, 288)}
    for i in range(20):
        parts = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), (256, 256))
        wide |= {f"blk.{i}.{n}.weight": s for n, s in (parts | {"ffn_down": (256, 512)}).items()}
        wide |= {f"blk.{i}.{n}_norm.weight": (256,) for n in ("attn", "ffn")}
    for i in range(9):
        parts = dict.fromkeys(("attn_qkv", "attn_output", "ffn_up"), (288, 288)) | {"ffn_down": (288, 256)}
        fused |= {f"blk.{i}.{n}.weight": s for n, s in parts.items()}
    for shapes, model, expected in zip(
        (wide, fused), (Model(20, 4, tied=False), Model(9, 1, tied=True)), QUANTIZED[mix], strict=True
    ):
        found = types_of(shapes, mix, model)
        assert Counter(t for n, t in found.items() if len(shapes[n]) > 1) == expected
        assert {t for n, t in found.items() if len(shapes[n]) == 1} <= {"F32"}


def test_a_model_s_finer_layers_are_the_first_the_last_and_every_third() -> None:
    shapes = {f"blk.{i}.ffn_down.weight": (256, 256) for i in range(24)}
    finer = types_of(shapes, "q4_k_m", Model(24, 1, tied=False))
    assert [i for i, t in enumerate(finer.values()) if t == "Q6_K"] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]


# ------------------------------------------------------------------ tokenizers

CORPUS = [
    "the river 1234 and 12345 in 2024, it's what we've been told; they'll say 100,000,000 times",
    "Ünïcödé привет мир 漢字かな 한국어 the the and and   spaces\n\n\nlines\n\tdef foo(bar): return bar[0]+=1 ...!!",
] * 20  # fmt: skip
DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(folder: Path, split: Any, base: Path, size: int = 700) -> Path:
    """A folder with a tokenizer of bytes that was trained behind a splitting of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    return with_tokenizer(folder, tokenizer, base)


def with_tokenizer(folder: Path, tokenizer: Tokenizer, base: Path) -> Path:
    shutil.copytree(base, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_how_text_is_split_is_found_by_experiment(tiny: Tiny, tmp_path: Path) -> None:
    level = pre_tokenizers.ByteLevel
    lower = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    ways = {
        "gpt-2": level(add_prefix_space=False, use_regex=True),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level(add_prefix_space=False)]),
        "qwen2": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(lower + DIGITS), "isolated"), level(add_prefix_space=False, use_regex=False)]
        ),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(lower + DIGITS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), "isolated"),
                level(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    for name, way in ways.items():
        assert vocabulary_of(trained(tmp_path / name, way, tiny("llama")), 1000).split == name
    odd = Tokenizer.from_file(str(tmp_path / "gpt-2" / "tokenizer.json"))
    odd.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("e", "isolated"), ways["gpt-2"]])
    with pytest.raises(UnsupportedError, match="other tokens"):
        vocabulary_of(with_tokenizer(tmp_path / "odd", odd, tiny("llama")), 1000)


def spaced(prefix: bool) -> Tokenizer:
    """A tokenizer as SentencePiece makes them: spaces as ▁, what is unknown as bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replaced = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prefix else replaced
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
    tokenizer.train_from_iterator([line.replace("\n", " ") for line in CORPUS], trainer)
    stated = json.loads(tokenizer.to_str())
    stated["added_tokens"] = [t for t in stated["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(stated))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_vocabulary_of_pieces_gets_scores_in_the_order_of_its_merges(
    prefix: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_tokenizer(tmp_path / "m", spaced(prefix), tiny("llama"))
    found = vocabulary_of(folder, 700)
    assert found.model == "llama" and found.space is prefix and not found.merges
    assert Counter(found.types)[6] == 256 and found.types[0] == 2
    monkeypatch.setattr("abliterate.convert.vocabulary._scores", lambda _m, _k, n: [0.0] * n)
    with pytest.raises(UnsupportedError, match="other tokens"):
        vocabulary_of(folder, 700)


def test_what_cannot_be_converted_is_named(tiny: Tiny, tmp_path: Path) -> None:
    def changed(name: str, of: str = "llama", **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny(of, tied=of.startswith("gemma")), folder)
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stated | config))
        return folder

    def weights(folder: Path, name: str, value: Any) -> Path:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: value}, folder / "model.safetensors", {"format": "pt"})
        return folder

    bare, pieces, many = changed("bare"), changed("pieces"), changed("many")
    (bare / "tokenizer.json").unlink()
    Tokenizer(models.WordPiece({"a": 0}, unk_token="a")).save(str(pieces / "tokenizer.json"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    shutil.copy(trained(tmp_path / "more", level, tiny("llama")) / "tokenizer.json", many)
    large = weights(changed("large"), "model.norm.weight", torch.full((32,), 1e38))
    wide = weights(changed("wide"), "lm_head.weight", torch.full((262, 32), 1e6))
    nan = weights(changed("nan"), "lm_head.weight", torch.full((262, 32), torch.nan))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    wrong: list[tuple[Path, str, type[AbliterateError], str]] = [
        (tiny("llama"), "q9", UsageError, "--type q9: expected f32"),
        (changed("type", model_type="gpt2"), "f16", UnsupportedError, "'gpt2' is not converted"),
        (changed("act", hidden_act="relu"), "f16", UnsupportedError, "activation is relu"),
        (changed("rope", rope_parameters=dynamic), "f16", UnsupportedError, "'dynamic'"),
        (changed("scaled", "gemma2"), "f16", UnsupportedError, "query_pre_attn_scalar is 256, not 8"),
        (weights(changed("extra"), "model.new.weight", torch.zeros(3)), "f16", UnsupportedError, "no name for tensor"),
        (bare, "f16", CheckpointError, r"has no tokenizer\.json"),
        (pieces, "f16", UnsupportedError, "kind WordPiece"),
        (many, "f16", UnsupportedError, "a token 3.., and the embedding 262 rows"),
        (wide, "f16", VerifyError, "choose --type bf16"),
        (nan, "bf16", VerifyError, "NaN"),
    ]  # fmt: skip
    for folder, mix, kind, words in wrong:
        with pytest.raises(kind, match=words):
            converted(folder, tmp_path / "x.gguf", mix)
    assert converted(large, tmp_path / "y.gguf", "f16").is_file()  # gains stay float32
    assert set(QUANTIZED) < set(MIXES)
