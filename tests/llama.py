"""llama.cpp itself, called in the wheel that the tests have: what it reads of a file, and what that makes it say.

Calls of its own, so that the package's are held against something. Structures are passed as opaque pieces of memory
longer than they are: their fields are left as they come.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint.ggml import c_function, llama_cpp

POINTER = ctypes.c_void_p
_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _Log(lambda *_: None)
_Tokens = ctypes.POINTER(ctypes.c_int32)


class Opaque(ctypes.Structure):
    """More memory than any structure of llama.cpp's takes."""

    _fields_ = (("memory", ctypes.c_uint64 * 128),)


def call(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of llama.cpp."""
    return c_function(llama_cpp(), name, result, *arguments)


class Llama:
    """A model in a GGUF file."""

    def __init__(self, path: Path) -> None:
        call("llama_log_set", None, _Log, POINTER)(_SILENT, None)
        call("llama_backend_init", None)()
        load = call("llama_model_load_from_file", POINTER, ctypes.c_char_p, Opaque)
        self._model = load(str(path).encode(), call("llama_model_default_params", Opaque)())
        assert self._model, f"llama.cpp does not load {path}"
        begin = call("llama_init_from_model", POINTER, POINTER, Opaque)
        self._context = begin(self._model, call("llama_context_default_params", Opaque)())
        assert self._context
        call("llama_set_n_threads", None, POINTER, ctypes.c_int32, ctypes.c_int32)(self._context, 1, 1)
        self._vocabulary = call("llama_model_get_vocab", POINTER, POINTER)(self._model)
        self._n_tokens = call("llama_vocab_n_tokens", ctypes.c_int32, POINTER)(self._vocabulary)

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """A text's tokens; `special` adds those that the file says stand around it."""
        raw, found = text.encode(), (ctypes.c_int32 * (len(text.encode()) + 8))()
        run = call(
            "llama_tokenize", ctypes.c_int32, POINTER, ctypes.c_char_p, ctypes.c_int32, _Tokens, ctypes.c_int32,
            ctypes.c_bool, ctypes.c_bool,
        )  # fmt: skip
        return list(found[: run(self._vocabulary, raw, len(raw), found, len(found), special, True)])

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
