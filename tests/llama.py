"""llama.cpp itself, called in the wheel that the tests have: what it reads of a file, and what that makes it say.

Its structures are passed as opaque pieces of memory longer than they are: their fields are left as they come.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from abliterate.convert.llama import POINTER, Opaque, call, load, tokens_of

_Tokens = ctypes.POINTER(ctypes.c_int32)


class Llama:
    """A model in a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._model = load(path)
        assert self._model, f"llama.cpp does not load {path}"
        begin = call("llama_init_from_model", POINTER, POINTER, Opaque)
        self._context = begin(self._model, call("llama_context_default_params", Opaque)())
        assert self._context
        call("llama_set_n_threads", None, POINTER, ctypes.c_int32, ctypes.c_int32)(self._context, 1, 1)
        self._vocabulary = call("llama_model_get_vocab", POINTER, POINTER)(self._model)
        self._n_tokens = call("llama_vocab_n_tokens", ctypes.c_int32, POINTER)(self._vocabulary)

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """A text's tokens; `special` adds those that the file says stand around it."""
        assert self._model
        return tokens_of(self._model, text, special)

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """The logits behind the last token of a text that begins anew."""
        memory = call("llama_get_memory", POINTER, POINTER)(self._context)
        call("llama_memory_clear", None, POINTER, ctypes.c_bool)(memory, True)
        return self._next(tokens)

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """The `n` likeliest tokens behind a text, one after the other."""
        found = [int(self.logits(tokens).argmax())]
        while len(found) < n:
            found.append(int(self._next(found[-1:]).argmax()))
        return found

    def add(self, vectors: npt.NDArray[np.float32] | None) -> None:
        """Add `vectors` `[n_layers - 1, d_model]` behind the layers from 1 on, as `--control-vector` does; or none."""
        add = call(
            "llama_set_adapter_cvec", ctypes.c_int32, POINTER, POINTER, ctypes.c_size_t, ctypes.c_int32,
            ctypes.c_int32, ctypes.c_int32,
        )  # fmt: skip
        if vectors is None:
            assert add(self._context, None, 0, 0, 0, 0) == 0
            return
        data = np.ascontiguousarray(vectors, dtype=np.float32)
        assert add(self._context, data.ctypes.data, data.size, data.shape[1], 1, len(data) + 1) == 0

    def _next(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = call("llama_batch_get_one", Opaque, _Tokens, ctypes.c_int32)(given, len(tokens))
        assert call("llama_decode", ctypes.c_int32, POINTER, Opaque)(self._context, batch) == 0
        last = call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), POINTER, ctypes.c_int32)
        return np.ctypeslib.as_array(last(self._context, -1), (self._n_tokens,)).copy()
