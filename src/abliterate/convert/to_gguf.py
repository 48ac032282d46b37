"""A folder of safetensors as a GGUF that llama.cpp runs, in one of its mixes of types.

Owns the order of writing: header, then tensors, a block of rows at a time. Never edits a weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.checkpoint import Checkpoint, TensorInfo
from abliterate.checkpoint.codecs import PLAIN, Array, Float32Array, Plain
from abliterate.checkpoint.ggml import encode
from abliterate.checkpoint.gguf_file import NUMBERS, read_gguf, stored_bytes
from abliterate.checkpoint.gguf_names import name_map, new_writer
from abliterate.checkpoint.matrix import write_all
from abliterate.checkpoint.storage import logical_name, matrices
from abliterate.checkpoint.stream import require_disk, sync
from abliterate.convert.families import ELSEWHERE, Family, add_keys, family_of, head_dim
from abliterate.convert.mixes import MIXES, Model, types_of
from abliterate.convert.vocabulary import Vocabulary, vocabulary_of
from abliterate.errors import UnsupportedError, UsageError, VerifyError
from abliterate.model.progress import Progress, silent

#: What conversion leaves out: it follows from the configuration.
_LEFT_OUT = ("rotary_emb.inv_freq",)
_ENDINGS = (".weight", ".bias")


def to_gguf(checkpoint: Checkpoint, out: Path, mix: str = "bf16", progress: Progress = silent) -> None:
    """Write a folder's model, its tokenizer and its chat template into the new file `out`.

    `mix` is one of `MIXES`; the types of its tensors are those of llama.cpp's own quantiser without an importance
    matrix, and so is the encoder. A tensor at most is held in memory.

    Raises:
        UsageError: there is no such mix.
        UnsupportedError: a class, a tokenizer or a tensor that is not converted; says which.
        ResourceError: the disk is full.
        VerifyError: a number does not fit the type.
    """
    config, family, sources = _sources(checkpoint, mix)
    vocabulary = vocabulary_of(checkpoint.path, sources["token_embd.weight"].shape[0])
    writer = new_writer(out, family.architecture)
    number, most = MIXES[mix]
    writer.add_type("model")
    writer.add_name(_name(checkpoint, family, vocabulary))
    extra = add_keys(writer, config, family, checkpoint.path)
    writer.add_file_type(number)
    if most not in PLAIN:
        writer.add_quantization_version(2)
    vocabulary.write(writer, checkpoint.path)
    shapes = {name: t.shape for name, t in sources.items()} | {name: v.shape for name, v in extra.items()}
    types = types_of(shapes, mix, _model(config, family, sources))
    _create(writer, out, shapes, types)
    placed = read_gguf(out).tensors
    fd = os.open(out, os.O_RDWR)
    try:
        for name, values in extra.items():
            write_all(fd, memoryview(values.tobytes()), placed[name].offset, out.name)
        for name, source in sources.items():
            blocks = _values(checkpoint, source, _heads(name, family, config))
            _write(fd, placed[name], blocks, _added(name, family))
            progress(1)
    finally:
        os.close(fd)
    sync(out)


def size_of(checkpoint: Checkpoint, mix: str) -> int:
    """Bytes that the tensors of a folder's model take in a mix.

    Raises:
        UsageError, UnsupportedError: as `to_gguf` says.
    """
    config, family, sources = _sources(checkpoint, mix)
    shapes = {name: tensor.shape for name, tensor in sources.items()}
    types = types_of(shapes, mix, _model(config, family, sources))
    return sum(stored_bytes(types[name], shape) or 0 for name, shape in shapes.items())


def _sources(checkpoint: Checkpoint, mix: str) -> tuple[Any, Family, dict[str, TensorInfo]]:
    """A folder's configuration, its family, and the stored tensors by their names in a GGUF."""
    if mix not in MIXES:
        raise UsageError(f"--type {mix}: expected {', '.join(MIXES)}")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.path)
    family = family_of(checkpoint.path, config)
    return config, family, _named(checkpoint, family, config)


def _name(checkpoint: Checkpoint, family: Family, vocabulary: Vocabulary) -> str:
    name = checkpoint.path.resolve().name
    # llama.cpp knows by the name alone that Phi 3's control tokens take the spaces behind them, and wants these then.
    if family.architecture == "phi3" and set(vocabulary.tokens) >= {"<unk>", "<s>", "</s>", "<|endoftext|>"}:
        return f"Phi-3 {name}"
    return name


def _named(checkpoint: Checkpoint, family: Family, config: Any) -> dict[str, TensorInfo]:
    """The stored tensors by their names in a GGUF.

    Raises:
        UnsupportedError: llama.cpp has no name for one.
    """
    from gguf.constants import MODEL_ARCH_NAMES

    number = next(n for n, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
    names, found = name_map(number, config.num_hidden_layers), dict[str, TensorInfo]()
    for tensor in checkpoint.tensors.values():
        name = logical_name(checkpoint, tensor.name)
        if name is None or name.endswith(_LEFT_OUT) or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        called = names.get_name(name, try_suffixes=_ENDINGS)
        if called is None:
            raise UnsupportedError(
                f"{checkpoint.path}: llama.cpp has no name for tensor '{name}' in '{family.architecture}'; {ELSEWHERE}"
            )
        found[called] = tensor
    return found


def _model(config: Any, family: Family, sources: dict[str, TensorInfo]) -> Model:
    shared = config.num_attention_heads // config.num_key_value_heads
    large = family.architecture in ("llama", "qwen2") and config.num_hidden_layers == 80 and shared > 1
    return Model(config.num_hidden_layers, shared, "output.weight" not in sources, large)


def _heads(name: str, family: Family, config: Any) -> int | None:
    """Rows of a head of a tensor whose rows llama.cpp has in another order."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    return head_dim(config) if family.paired and part in ("attn_q", "attn_k") else None


def _added(name: str, family: Family) -> float:
    """What a class adds to a tensor as it runs, and llama.cpp does not."""
    return family.gains_add if name.endswith("norm.weight") else 0.0


def _create(writer: Any, out: Path, shapes: dict[str, tuple[int, ...]], types: dict[str, str]) -> None:
    """Write the header, and the file to its full length."""
    from gguf import GGMLQuantizationType

    total = 0
    for name, shape in shapes.items():
        nbytes = stored_bytes(types[name], shape)
        assert nbytes is not None
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, GGMLQuantizationType(NUMBERS[types[name]]))
        total += -(-nbytes // writer.data_alignment) * writer.data_alignment
    require_disk(out.parent, total)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = out.stat().st_size
    os.truncate(out, -(-start // writer.data_alignment) * writer.data_alignment + total)


def _values(checkpoint: Checkpoint, tensor: TensorInfo, head: int | None) -> Iterator[Array]:
    """A tensor's numbers as rows, in blocks; of one whose heads are `head` rows all at once, each interleaved."""
    axis = len(tensor.shape) - 1 if tensor.dtype in PLAIN else len(tensor.shape) - 2
    with (checkpoint.path / tensor.file).open("rb") as file:
        blocks = (m.values(file.fileno(), rows) for m in matrices(checkpoint, tensor, axis) for rows in m.blocks())
        if head is None:
            yield from blocks
            return
        whole = np.concatenate([b.reshape(-1, 1) if len(tensor.shape) == 1 else b for b in blocks])
        paired = whole.reshape(-1, 2, head // 2, whole.shape[1]).swapaxes(1, 2).reshape(whole.shape)
        yield paired.reshape(1, -1) if len(tensor.shape) == 1 else paired


def _write(fd: int, tensor: TensorInfo, blocks: Iterator[Array], add: float) -> None:
    """Store a tensor's rows, with `add` to each number, at its place, in its type."""
    at = tensor.offset
    for block in blocks:
        values = np.ascontiguousarray(block, dtype=np.float32) + np.float32(add)
        raw = _encoded(values, tensor)
        write_all(fd, memoryview(raw).cast("B"), at, tensor.file)
        at += raw.nbytes
    assert at == tensor.offset + tensor.nbytes, tensor.name


def _encoded(values: Float32Array, tensor: TensorInfo) -> Any:
    if not np.isfinite(values).all():
        raise VerifyError(f"{tensor.file}: tensor '{tensor.name}' holds NaN or infinity; the checkpoint is damaged")
    if tensor.dtype not in PLAIN:
        row = stored_bytes(tensor.dtype, (values.shape[-1],))
        assert row is not None
        return encode(values, tensor.dtype, row)
    raw = Plain(tensor.dtype).round(values, np.arange(len(values)))
    if not np.isfinite(values).all():
        raise VerifyError(f"tensor '{tensor.name}' has numbers larger than {tensor.dtype} holds; choose --type bf16")
    return raw
