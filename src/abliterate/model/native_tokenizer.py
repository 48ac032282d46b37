"""The tokenizer of a GGUF as llama.cpp reads it, with the part of transformers' interface that chats need.

Owns text to tokens and back, and the file's chat template. Never knows weights.
"""

from __future__ import annotations

from ctypes import c_bool, c_char_p, c_int32, create_string_buffer
from functools import cached_property
from typing import Any

from abliterate.model.llamacpp import LlamaCpp, call


class NativeTokenizer:
    """What a chat format asks of a tokenizer."""

    def __init__(self, engine: LlamaCpp) -> None:
        self._engine, self._vocabulary = engine, engine.vocabulary
        self.name_or_path = str(engine.path)
        self.chat_template: Any = engine.template()
        self.bos_token_id, self.eos_token_id, self.pad_token_id = map(self._special, ("bos", "eos", "pad"))

    def _special(self, name: str) -> int | None:
        found: int = call(f"llama_vocab_{name}", c_int32, self._vocabulary)
        return found if found >= 0 else None

    def __call__(self, texts: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """`{"input_ids": ...}` of a text or of many; what looks like a special token is one."""
        if isinstance(texts, str):
            return {"input_ids": self._ids(texts, add_special_tokens)}
        return {"input_ids": [self._ids(text, add_special_tokens) for text in texts]}

    def _ids(self, text: str, special: bool) -> list[int]:
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 2))()  # no token is shorter than a byte
        n: int = call(
            "llama_tokenize", c_int32, self._vocabulary, c_char_p(raw), c_int32(len(raw)), ids, c_int32(len(ids)),
            c_bool(special), c_bool(True),
        )  # fmt: skip
        return list(ids[: max(0, n)])

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        size = 64 + sum(len(self._text(i)) for i in ids)
        text = create_string_buffer(size)
        n: int = call(
            "llama_detokenize", c_int32, self._vocabulary, (c_int32 * len(ids))(*ids), c_int32(len(ids)), text,
            c_int32(size), c_bool(False), c_bool(not skip_special_tokens),
        )  # fmt: skip
        return text.raw[: max(0, n)].decode("utf-8", "replace")

    def _text(self, token: int) -> bytes:
        found: bytes = call("llama_vocab_get_text", c_char_p, self._vocabulary, c_int32(token))
        return found

    def get_vocab(self) -> dict[str, int]:
        """Every token by its text."""
        return dict(self._all)

    @cached_property
    def _all(self) -> dict[str, int]:
        return {self._text(i).decode("utf-8", "replace"): i for i in range(self._engine.n_vocab)}

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer, as llama.cpp knows them."""
        ids = range(self._engine.n_vocab)
        return [i for i in ids if call("llama_vocab_is_eog", c_bool, self._vocabulary, c_int32(i))]

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool, **given: Any) -> str:
        """The text of a chat by the template, rendered as transformers does it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        special = {"bos": self.bos_token_id, "eos": self.eos_token_id, "pad": self.pad_token_id}
        tokens = {f"{name}_token": self._text(i).decode() for name, i in special.items() if i is not None}
        rendered: Any = render_jinja_template([messages], chat_template=self.chat_template, **(tokens | given))
        return str(rendered[0][0])
