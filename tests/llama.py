"""llama.cpp itself, called in the wheel that the tests have: what it reads of a file, and what that makes it say.

Its structures are passed as opaque pieces of memory longer than they are: their fields are left as they come.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from abliterate.checkpoint.ggml import _library

_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _Log(lambda *_: None)
_Tokens, _Pointer = ctypes.POINTER(ctypes.c_int32), ctypes.c_void_p
_MOST = 512


class _Opaque(ctypes.Structure):
    _fields_ = (("memory", ctypes.c_uint64 * 128),)


def _call(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    found = getattr(_library(), name)
    found.restype, found.argtypes = result, list(arguments)
    return found  # type: ignore[no-any-return]


class Llama:
    """A model in a GGUF file."""

    def __init__(self, path: Path) -> None:
        _call("llama_log_set", None, _Log, _Pointer)(_SILENT, None)
        _call("llama_backend_init", None)()
        settings = _call("llama_model_default_params", _Opaque)()
        load = _call("llama_model_load_from_file", _Pointer, ctypes.c_char_p, _Opaque)
        self._model = load(str(path).encode(), settings)
        assert self._model, f"llama.cpp does not load {path}"
        begin = _call("llama_init_from_model", _Pointer, _Pointer, _Opaque)
        self._context = begin(self._model, _call("llama_context_default_params", _Opaque)())
        assert self._context
        _call("llama_set_n_threads", None, _Pointer, ctypes.c_int32, ctypes.c_int32)(self._context, 1, 1)
        self._vocabulary = _call("llama_model_get_vocab", _Pointer, _Pointer)(self._model)
        self._n_tokens = _call("llama_vocab_n_tokens", ctypes.c_int32, _Pointer)(self._vocabulary)

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """A text's tokens; `special` adds those that the file says stand around it."""
        found, raw = (ctypes.c_int32 * _MOST)(), text.encode()
        call = _call(
            "llama_tokenize", ctypes.c_int32, _Pointer, ctypes.c_char_p, ctypes.c_int32, _Tokens, ctypes.c_int32,
            ctypes.c_bool, ctypes.c_bool,
        )  # fmt: skip
        return list(found[: call(self._vocabulary, raw, len(raw), found, _MOST, special, True)])

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """The logits behind the last token of a text that begins anew."""
        memory = _call("llama_get_memory", _Pointer, _Pointer)(self._context)
        _call("llama_memory_clear", None, _Pointer, ctypes.c_bool)(memory, True)
        return self._next(tokens)

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """The `n` likeliest tokens behind a text, one after the other."""
        found = [int(self.logits(tokens).argmax())]
        while len(found) < n:
            found.append(int(self._next(found[-1:]).argmax()))
        return found

    def add(self, vectors: npt.NDArray[np.float32] | None) -> None:
        """Add `vectors` `[n_layers - 1, d_model]` behind the layers from 1 on, as `--control-vector` does; or none."""
        call = _call(
            "llama_set_adapter_cvec", ctypes.c_int32, _Pointer, _Pointer, ctypes.c_size_t, ctypes.c_int32,
            ctypes.c_int32, ctypes.c_int32,
        )  # fmt: skip
        if vectors is None:
            assert call(self._context, None, 0, 0, 0, 0) == 0
            return
        data = np.ascontiguousarray(vectors, dtype=np.float32)
        assert call(self._context, data.ctypes.data, data.size, data.shape[1], 1, len(data) + 1) == 0

    def _next(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = _call("llama_batch_get_one", _Opaque, _Tokens, ctypes.c_int32)(given, len(tokens))
        assert _call("llama_decode", ctypes.c_int32, _Pointer, _Opaque)(self._context, batch) == 0
        last = _call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), _Pointer, ctypes.c_int32)
        return np.ctypeslib.as_array(last(self._context, -1), (self._n_tokens,)).copy()
