"""llama.cpp by its C interface, in the wheel of `xllamacpp`: a GGUF's vocabulary, and logits of many rows at once.

Owns the calls and the memory behind them. Never knows chats, nor why a row is read.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from abliterate.checkpoint.codecs import Float32Array
from abliterate.checkpoint.ggml import MEND, c_function, llama_cpp
from abliterate.errors import CheckpointError, ResourceError, UnsupportedError, VerifyError

#: Tokens that llama.cpp takes in one call.
_AT_ONCE = 256
#: Room for rows is made in steps of so many tokens, so that it is seldom made anew.
_LENGTHS = 256
#: Where its settings for a context begin: tokens, tokens in a call, of those at once, sequences; and their defaults.
_SETTINGS = (512, 2048, 512, 1)
_ERROR = 4  # ggml's number for messages of this kind
_MEND = f"install the release that was tested: {MEND}"


class _Settings(ctypes.Structure):
    """Settings of a model or a context, which llama.cpp hands over by value; longer than either is in any release."""

    _fields_ = (("words", c_uint32 * 256),)


class _Batch(ctypes.Structure):
    """Tokens with their places in their sequences, and of which of them logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


class Token(NamedTuple):
    """A token to be read, at a place of a sequence, and whether the logits behind it are wanted."""

    token: int
    place: int
    sequence: int
    wanted: bool


_said: deque[str] = deque(maxlen=3)


def _keep(level: int, text: bytes, _: Any) -> None:
    """Keep the last errors; nothing of what llama.cpp says reaches the terminal."""
    if level == _ERROR:
        _said.append(text.decode("utf-8", "replace").strip())


_log = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(_keep)


def call(name: str, result: Any, *arguments: Any) -> Any:
    """Call a function of llama.cpp; arguments are C values, whose types say what it takes.

    Raises:
        UnsupportedError: llama.cpp is not installed, or does not offer the function.
    """
    return c_function(llama_cpp(), name, result, *map(type, arguments))(*arguments)


class LlamaCpp:
    """A GGUF file, of a split one the first part, in llama.cpp.

    Raises:
        UnsupportedError: the wheel is not installed, or is of another form than known here.
        CheckpointError: llama.cpp cannot load the file; says why.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        _said.clear()
        call("llama_log_set", None, _log, c_void_p())
        call("llama_backend_init", None)
        settings = call("llama_model_default_params", _Settings)
        self._model = c_void_p(call("llama_model_load_from_file", c_void_p, c_char_p(str(path).encode()), settings))
        if not self._model:
            raise CheckpointError(f"{path}: llama.cpp cannot load it ({_reason()}); {_mend()}")
        self._contexts = list[_Context]()  # at most one
        weakref.finalize(self, _free, self._model, self._contexts)
        self.vocabulary = c_void_p(call("llama_model_get_vocab", c_void_p, self._model))
        self.n_vocab: int = call("llama_vocab_n_tokens", c_int32, self.vocabulary)
        self.n_layers: int = call("llama_model_n_layer", c_int32, self._model)
        self.d_model: int = call("llama_model_n_embd", c_int32, self._model)

    def template(self) -> str | None:
        """The file's chat template."""
        found: bytes | None = call("llama_model_chat_template", c_char_p, self._model, c_char_p())
        return None if found is None else found.decode("utf-8", "replace")

    def room(self, sequences: int, length: int) -> None:
        """Make room for so many sequences of up to `length` tokens each, and forget what was read.

        Raises:
            ResourceError: there is not enough memory.
        """
        held = self._contexts[0] if self._contexts else None
        if held is not None and held.sequences >= sequences and held.length >= length:
            held.forget()
            return
        while self._contexts:
            self._contexts.pop().free()
        self._contexts.append(_Context(self, sequences, -(-length // _LENGTHS) * _LENGTHS))

    def read(self, tokens: Sequence[Token]) -> list[Float32Array]:
        """Read tokens; the logits `[n_vocab]` behind each one that is wanted, in order.

        Raises:
            VerifyError: they are no numbers.
            ResourceError: llama.cpp cannot run them.
        """
        return self._contexts[0].read(tokens)

    def copy(self, sequence: int, to: int) -> None:
        """Let a sequence hold what another one does."""
        memory = self._contexts[0].memory
        call("llama_memory_seq_rm", c_bool, memory, c_int32(to), c_int32(-1), c_int32(-1))
        call("llama_memory_seq_cp", None, memory, c_int32(sequence), c_int32(to), c_int32(-1), c_int32(-1))


def _free(model: c_void_p, contexts: list[_Context]) -> None:
    for context in contexts:
        context.free()
    call("llama_model_free", None, model)


def _reason() -> str:
    """What llama.cpp said last of an error."""
    return ": ".join(_said)[:200] or "it does not say why"


def _mend() -> str:
    if "unknown model architecture" in _reason():
        return "a newer one may: pip install -U xllamacpp"
    return "download or convert it again"


class _Context:
    """What llama.cpp remembers of some sequences."""

    def __init__(self, model: LlamaCpp, sequences: int, length: int) -> None:
        self.sequences, self.length, self._path, self._n_vocab = sequences, length, model.path, model.n_vocab
        settings = call("llama_context_default_params", _Settings)
        if tuple(settings.words[:4]) != _SETTINGS:
            raise UnsupportedError(f"llama.cpp has other settings of a context than known here; {_MEND}")
        settings.words[:4] = [sequences * length, _AT_ONCE, _AT_ONCE, sequences]
        self._context = c_void_p(call("llama_init_from_model", c_void_p, model._model, settings))
        if not self._context:
            raise ResourceError(
                f"{model.path}: llama.cpp has no memory for {sequences} answers at once ({_reason()}); try a "
                "smaller --batch-size or --max-new-tokens"
            )
        if call("llama_n_seq_max", c_uint32, self._context) != sequences:
            raise UnsupportedError(f"llama.cpp takes its settings in another order than known here; {_MEND}")
        call("llama_set_n_threads", None, self._context, c_int32(model.threads), c_int32(model.threads))
        self.memory = c_void_p(call("llama_get_memory", c_void_p, self._context))
        self._batch = call("llama_batch_init", _Batch, c_int32(_AT_ONCE), c_int32(0), c_int32(1))

    def free(self) -> None:
        """Give the memory back; nothing can be read any more."""
        call("llama_batch_free", None, self._batch)
        call("llama_free", None, self._context)

    def forget(self) -> None:
        call("llama_memory_clear", None, self.memory, c_bool(True))

    def read(self, tokens: Sequence[Token]) -> list[Float32Array]:
        found = list[Float32Array]()
        for start in range(0, len(tokens), _AT_ONCE):
            part = tokens[start : start + _AT_ONCE]
            self._fill(part)
            if code := call("llama_decode", c_int32, self._context, self._batch):
                raise ResourceError(f"{self._path}: llama.cpp could not run {len(part)} tokens (code {code})")
            found += [self._logits(i) for i, token in enumerate(part) if token.wanted]
        return found

    def _fill(self, tokens: Sequence[Token]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, place, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, wanted
            batch.seq_id[i][0] = sequence

    def _logits(self, index: int) -> Float32Array:
        at = call("llama_get_logits_ith", POINTER(c_float), self._context, c_int32(index))
        values: Float32Array = np.ctypeslib.as_array(at, (self._n_vocab,)).copy()
        if not np.isfinite(values).all():
            raise VerifyError(f"{self._path}: the model gives NaN or infinity; its weights are damaged")
        return values
