"""A GGUF file as transformers loads it: configuration, tokenizer, weights.

Owns the stand-in for the reader that transformers uses, which takes half a minute for a vocabulary and knows no parts;
how an architecture's names and layouts are turned back stays transformers' own knowledge.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import numpy as np

from abliterate.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from abliterate.checkpoint.gguf_decode import decoded
from abliterate.checkpoint.gguf_file import ARRAY, BOOL, NUMBERS, STRING, Listed, Value, read_gguf, read_list
from abliterate.checkpoint.gguf_names import FACTORS, name_map, require_gguf
from abliterate.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What a number or a text of a header is, by ggml's code for its kind.
_KINDS = ((bool, BOOL), (int, 11), (float, 12), (str, STRING))
#: The factors by which rotary frequencies are divided, which Llama 3.1 and its kin keep as a tensor.


class _Field(NamedTuple):
    """One key, as the `gguf` package's reader gives it: `data` says which of `parts` are its values."""

    types: list[int]
    parts: list[Any]
    data: range


class _Tensor(NamedTuple):
    """One tensor as that reader gives it, not read yet."""

    name: str
    tensor_type: int
    data: TensorInfo


class _Reader:
    """What transformers asks of the reader, of all parts of a file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        source = checkpoint.source
        self.fields = {key: _field(source, value) for key, value in read_gguf(source).metadata.items()}
        self.tensors = [_Tensor(t.name, NUMBERS[t.dtype], t) for t in checkpoint.tensors.values()]


def _field(path: Path, value: Value) -> _Field:
    if isinstance(value, Listed):
        parts = [v.encode() if isinstance(v, str) else (v,) for v in read_list(path, value)]
        return _Field([ARRAY, value.kind], parts, range(len(parts)))
    kind = next(code for of, code in _KINDS if isinstance(value, of))
    return _Field([kind], [value.encode() if isinstance(value, str) else np.array([value])], range(1))


@contextmanager
def _read_by_us(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """While entered, transformers reads this file through us; gives a folder without any files, and the file.

    Raises:
        UnsupportedError: transformers cannot load the architecture from a GGUF, or a package is missing.
    """
    require_gguf()
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    def numbers(tensor: TensorInfo, _type: int) -> np.ndarray[Any, Any]:
        return decoded(checkpoint.path, tensor)

    with ExitStack() as stack:
        reader = cache(lambda: _Reader(checkpoint))
        stack.enter_context(patch.object(gguf, "GGUFReader", lambda _path: reader()))
        stack.enter_context(patch.object(gguf, "dequantize", numbers))
        # It makes the same table of names anew for every module of a model.
        stack.enter_context(patch.object(gguf, "get_tensor_name_map", cache(name_map)))
        stack.enter_context(patch.object(loader, "tqdm", lambda things, **_: things))
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # other files beside a GGUF are no part of it
        try:
            yield folder, str(checkpoint.source.absolute())
        except (ValueError, KeyError, ImportError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UnsupportedError(_unknown(checkpoint, reason)) from None


def _unknown(checkpoint: Checkpoint, reason: str) -> str:
    return (
        f"{checkpoint.source}: architecture '{checkpoint.model_type}': transformers cannot load it from a GGUF "
        f"({reason}); find the direction on its original safetensors checkpoint (abliterate run), then: "
        f"abliterate edit {checkpoint.source.name} --direction FILE; eval runs it on llama.cpp"
    )


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, with its chat template if it has one.

    Raises:
        UnsupportedError: transformers cannot build it.
    """
    from transformers import AutoTokenizer

    with _read_by_us(open_checkpoint(path)) as (folder, file):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    tokenizer.name_or_path = str(path)
    return tokenizer


def gguf_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a GGUF file, of a split one the first part, its weights decoded to `dtype`.

    Raises:
        UnsupportedError: transformers does not load the architecture from a GGUF, or not all of it.
    """
    import transformers

    checkpoint = open_checkpoint(path)
    with _read_by_us(checkpoint) as (folder, file):
        whole: dict[str, Any] = {}
        if hasattr(transformers, "GgufConfig"):  # newer versions would keep weights as codes, which no hook can read
            whole["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=dtype, output_loading_info=True, **whole
        )
    model: PreTrainedModel = loaded[0]
    if lacking := sorted(map(str, {*loaded[1]["missing_keys"], *loaded[1]["mismatched_keys"]})):
        raise UnsupportedError(_unknown(checkpoint, f"finds no tensors for {', '.join(lacking[:4])}"))
    _divide_frequencies(model, checkpoint)
    return model


def _divide_frequencies(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Take the factors of a file for rotary frequencies into account, which transformers leaves unread."""
    import torch

    if FACTORS not in checkpoint.tensors:
        return
    factors = torch.from_numpy(decoded(checkpoint.path, checkpoint.tensors[FACTORS]))
    for module in model.modules():
        held = getattr(module, "inv_freq", None)
        if isinstance(held, torch.Tensor) and held.shape == factors.shape:
            held /= factors
