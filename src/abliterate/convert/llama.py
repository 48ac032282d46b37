"""llama.cpp's own tokenizer, called in the library of the `xllamacpp` wheel on a file of ours.

Owns the calls. Its structures are passed as opaque pieces of memory longer than they are, as it fills them itself, so
that their fields need not be known. Never knows what a vocabulary should be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abliterate.checkpoint.ggml import library

_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _Log(lambda *_: None)
_Tokens = ctypes.POINTER(ctypes.c_int32)
POINTER = ctypes.c_void_p


class Opaque(ctypes.Structure):
    """More memory than any structure of llama.cpp's takes."""

    _fields_ = (("memory", ctypes.c_uint64 * 128),)


def call(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of llama.cpp."""
    found = getattr(library(), name)
    found.restype, found.argtypes = result, list(arguments)
    return found  # type: ignore[no-any-return]


def load(path: Path) -> int | None:
    """The model in a file, to be freed; None where llama.cpp does not take it."""
    call("llama_log_set", None, _Log, POINTER)(_SILENT, None)
    call("llama_backend_init", None)()
    settings = call("llama_model_default_params", Opaque)()
    found = call("llama_model_load_from_file", POINTER, ctypes.c_char_p, Opaque)(str(path).encode(), settings)
    return None if found is None else int(found)


def tokens_of(model: int, text: str, special: bool) -> list[int]:
    """A text's tokens, with those that the file says stand around it if `special`; control tokens in it are read."""
    vocabulary = call("llama_model_get_vocab", POINTER, POINTER)(model)
    raw, room = text.encode(), len(text.encode()) + 8
    found = (ctypes.c_int32 * room)()
    run = call(
        "llama_tokenize", ctypes.c_int32, POINTER, ctypes.c_char_p, ctypes.c_int32, _Tokens, ctypes.c_int32,
        ctypes.c_bool, ctypes.c_bool,
    )  # fmt: skip
    return list(found[: run(vocabulary, raw, len(raw), found, room, special, True)])


def tokenised(path: Path, texts: Sequence[str], special: bool) -> list[list[int]] | None:
    """The tokens that llama.cpp makes of texts by the vocabulary in a file; None where it does not take the file."""
    model = load(path)
    if model is None:
        return None
    try:
        return [tokens_of(model, text, special) for text in texts]
    finally:
        call("llama_model_free", None, POINTER)(model)
