"""A tokenizer of transformers as llama.cpp has it, and by experiment how that splits text before it looks for tokens.

Owns tokens, their types and scores. Never knows the model.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from abliterate.checkpoint.gguf_file import STRING, read_gguf
from abliterate.convert.families import ELSEWHERE
from abliterate.errors import CheckpointError, UnsupportedError
from abliterate.model.llamacpp import LlamaCpp
from abliterate.model.native_tokenizer import NativeTokenizer

FILE = "tokenizer.json"
_SPLIT, _FILLER = "tokenizer.ggml.pre", "general.description"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
#: llama.cpp's ways to split text for vocabularies of bytes, the most usual first; "default" is its fallback.
SPLITS = (
    "qwen2", "llama-bpe", "smollm", "tekken", "gpt-4o", "gpt-2", "dbrx", "deepseek-llm", "deepseek-coder",
    "deepseek-v3", "deepseek-r1-qwen", "falcon", "starcoder", "refact", "command-r", "stablelm2", "olmo", "smaug-bpe",
    "llama4", "qwen35", "chatglm-bpe", "glm4", "viking", "poro-chat", "jais", "codeshell", "exaone", "exaone4",
    "minerva-7b", "megrez", "hunyuan", "hunyuan-dense", "kimi-k2", "seed-coder", "superbpe", "trillion", "bailingmoe",
    "a.x-4.0", "mellum", "lfm2", "granite-docling", "gpt3-finnish", "bloom", "mpt", "default",
)  # fmt: skip
#: What tells them apart: contractions in both cases, digits in rows, runs of spaces, tabs and line ends, signs behind
#: spaces, letters of other scripts, and signs of several bytes. Composed letters only: llama.cpp composes none.
_TEXTS = (
    "I'm sure they'LL say we've 1 12 123 1234 12345 1234567.89, isn't it?  Two  spaces,   three\tand\t\ttabs \t mixed",
    "line\n\nbreaks\r\n \n  \n\n\n   indented\n\ttabbed \nend  ",
    "x=foo(bar[0])+=3;//!?? ...--->>> 'quoted' \"both\" @#$%",
    "Ünïcödé naïve ΑΒΓ привет Мир12 नमस्ते ทดสอบ 3๓٣ ½ ² ⅷ",
    "漢字かな交じり文、한국어 텍스트。12月3日 ＡＢＣ",
    "🙂👩‍👩‍👧‍👦 🇩🇪 ✅\u200b\u00a0nbsp\u3000wide —– “x” ‘y’ _under_score CamelCaseHTTPServer fooBar2Baz",
)


@dataclass(frozen=True)
class Vocabulary:
    """`model` is llama.cpp's name of the kind (gpt2: bytes as letters, llama: spaces as ▁), `split` of its splitting.

    `tokens`, `types` and for the second kind `scores` are by token; the last stand for the order of `merges`, which the
    first kind has. `bos` and `eos` say whether a text gets them, `space` whether it begins with a space.
    """

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos: bool
    eos: bool
    space: bool
    split: str = "default"

    def write(self, writer: Any, folder: Path) -> None:
        """Add it to a GGUF, with the special tokens and the chat template of a folder."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space)
        if self.merges:
            writer.add_token_merges(self.merges)
        special = SpecialVocab(folder, n_vocab=len(self.tokens))
        special.add_special_token = {"bos": self.bos, "eos": self.eos}
        special.add_to_gguf(writer, quiet=True)


def vocabulary_of(folder: Path, n_tokens: int) -> Vocabulary:
    """The vocabulary of a folder, filled up to `n_tokens`, for which the embedding has rows.

    llama.cpp's tokens of a few odd texts are compared with the tokenizer's own.

    Raises:
        CheckpointError: no tokenizer.json, or a damaged one.
        UnsupportedError: a kind that llama.cpp does not have, or one of which it makes other tokens.
    """
    from tokenizers import Tokenizer

    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {FILE}; load its tokenizer with transformers and save it, which writes one"
        )
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        kind = stated["model"].get("type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a tokenizer ({str(error)[:80]})") from None
    if kind != "BPE":
        raise UnsupportedError(f"{path}: a tokenizer of kind {kind}; {ELSEWHERE}")
    tokenizer = Tokenizer.from_file(str(path))
    found = _vocabulary(tokenizer, stated, n_tokens, path)
    return replace(found, split=_split_of(found, tokenizer, folder))


def _vocabulary(tokenizer: Any, stated: dict[str, Any], n_tokens: int, path: Path) -> Vocabulary:
    kind, known = stated["model"], tokenizer.get_vocab(with_added_tokens=True)
    if max(known.values()) >= n_tokens:
        raise UnsupportedError(f"{path}: has a token {max(known.values())}, and the embedding {n_tokens} rows")
    tokens, types = [f"[PAD{i}]" for i in range(n_tokens)], [UNUSED] * n_tokens
    spaced = bool(kind.get("byte_fallback"))
    for token, i in known.items():
        tokens[i], types[i] = token, BYTE if spaced and _BYTE.fullmatch(token) else NORMAL
    for i, added in tokenizer.get_added_tokens_decoder().items():
        types[i] = CONTROL if added.special else USER_DEFINED
    if spaced and kind.get("unk_token") in known:
        types[known[kind["unk_token"]]] = UNKNOWN
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in kind["merges"]]
    around = tokenizer.encode("a", add_special_tokens=True).ids
    inside = tokenizer.encode("a", add_special_tokens=False)
    at = next((i for i in range(len(around)) if around[i : i + len(inside.ids)] == inside.ids), 0)
    return Vocabulary(
        "llama" if spaced else "gpt2", tokens, types, _scores(merges, known, n_tokens) if spaced else [],
        [] if spaced else [" ".join(merge) for merge in merges],
        bos=at > 0, eos=len(around) > at + len(inside.ids), space=spaced and inside.tokens[0].startswith("▁"),
    )  # fmt: skip


def _scores(merges: list[tuple[str, ...]], known: dict[str, int], n_tokens: int) -> list[float]:
    """Scores by which llama.cpp joins pieces in the order of `merges`: what is made first has the highest."""
    scores = [-float(len(merges))] * n_tokens
    for rank in reversed(range(len(merges))):
        joined = "".join(merges[rank])
        if joined in known:
            scores[known[joined]] = -float(rank)
    return scores


def _split_of(vocabulary: Vocabulary, tokenizer: Any, folder: Path) -> str:
    """The first of llama.cpp's ways to split text with which its tokens of all texts are the tokenizer's."""
    texts = [*_TEXTS, *_with_controls(vocabulary)]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    whole = [tokenizer.encode(_TEXTS[0], add_special_tokens=True).ids]
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "vocabulary.gguf"
        for split in _tried(vocabulary, folder, path):
            if _tokens(path, texts) == (expected, whole):
                return split
    raise UnsupportedError(
        f"{folder / FILE}: llama.cpp makes other tokens of texts than this tokenizer, however it splits them; "
        f"{ELSEWHERE}"
    )


def _tokens(path: Path, texts: list[str]) -> tuple[list[list[int]], list[list[int]]] | None:
    """What llama.cpp makes of texts by a file, and of the first one with what stands around a text; None: no model."""
    try:
        tokenizer = NativeTokenizer(LlamaCpp(path, threads=1))
    except CheckpointError:
        return None
    return tokenizer(texts, add_special_tokens=False)["input_ids"], tokenizer(texts[:1])["input_ids"]


def _with_controls(vocabulary: Vocabulary) -> list[str]:
    """A text with control tokens in it, as chat templates write."""
    controls = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL][:4]
    return ["".join(f"{token}word\n" for token in controls)] if vocabulary.model == "gpt2" else []


def _tried(vocabulary: Vocabulary, folder: Path, path: Path) -> Iterator[str]:
    """One way of splitting after the other, each as it stands in the file `path`."""
    _write(vocabulary, folder, path)
    spans = read_gguf(path).spans
    start, stop = spans[_FILLER][0], spans[_SPLIT][1]
    with path.open("r+b") as file:
        for split in SPLITS if vocabulary.model == "gpt2" else ("default",):
            keys = _key("tokenizer.ggml.model", vocabulary.model) + _key(_SPLIT, split)
            file.seek(start)
            # The filler takes what the name leaves, so that nothing behind them moves.
            file.write(_key(_FILLER, " " * (stop - start - len(keys) - len(_key(_FILLER, "")))) + keys)
            file.flush()
            yield split


def _key(name: str, value: str) -> bytes:
    """A key with a text as a GGUF has them."""
    texts = [struct.pack("<Q", len(t.encode())) + t.encode() for t in (name, value)]
    return texts[0] + struct.pack("<I", STRING) + texts[1]


def _write(vocabulary: Vocabulary, folder: Path, path: Path) -> None:
    """The vocabulary in a model of no size."""
    from gguf import GGUFWriter

    width = 32
    writer = GGUFWriter(path, "llama")
    for name in ("block_count", "context_length", "feed_forward_length", "head_count", "head_count_kv"):
        getattr(writer, f"add_{name}")(width if name in ("context_length", "feed_forward_length") else 1)
    writer.add_embedding_length(width)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_string(_FILLER, " " * max(map(len, SPLITS)))
    vocabulary.write(writer, folder)
    square = np.zeros((width, width), np.float32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", square[0])
    writer.add_tensor("token_embd.weight", np.zeros((len(vocabulary.tokens), width), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
