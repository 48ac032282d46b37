"""Open a GGUF file, whole or split into parts, as a checkpoint.

Owns what a file holds (a model, or something that belongs to one), its parts, and the configuration that its metadata
amounts to. Never knows which tensors write where.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NoReturn

from abliterate.checkpoint.folder import check_links
from abliterate.checkpoint.gguf_file import SCALARS, GgufFile, Listed, read_gguf, read_list
from abliterate.checkpoint.naming import PART, gguf_names, records_of
from abliterate.checkpoint.opened import Checkpoint, stamp, take_samples
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import CheckpointError, UnsupportedError

_CHUNK = 4 << 20
#: What is no model, by `general.type` or `general.architecture`, and what to give instead.
_NO_MODEL = {
    "adapter": "a LoRA adapter; merge it into its base first (llama-export-lora), or give the base",
    "controlvector": "a control vector, which llama.cpp adds at run time; give the model that it is for",
    "mmproj": "the part of a model that sees or hears; give the file of its language model",
    "clip": "the part of a model that sees or hears; give the file of its language model",
    "imatrix": "an importance matrix, by which models are quantised; give the model",
}
#: What metadata states, by the name that transformers has for it.
_STATED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count_kv": "num_key_value_heads",
    "leading_dense_block_count": "first_k_dense_replace",
    "nextn_predict_layers": "num_nextn_predict_layers",
    "swin_norm": "swin_norm",
    "use_parallel_residual": "use_parallel_residual",
}


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file, or in all parts of a split one of which `path` is the first.

    Its folder is the file's; of the other files there only the records of an edit, beside it, belong to it.

    Raises:
        CheckpointError: the file is damaged, holds no weights, or a part is missing.
        UnsupportedError: it holds no model, or a form that is not read.
    """
    first = read_gguf(path)
    parts = _parts(first)
    architecture = _architecture(first)
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part.path}: tensor '{name}' is in {tensors[name].file} already")
            tensors[name] = tensor
    _require_all(first, len(tensors))
    config = _config(first, architecture, len(tensors))
    names = tuple(part.path.name for part in parts)
    side = _records(path)
    stamps = {name: stamp(path.parent / name) for name in (*names, *side)}
    return Checkpoint(path.parent, "gguf", tensors, config, names, side, (), _fingerprint(parts), stamps)


def _records(path: Path) -> tuple[str, ...]:
    """The files of the records of an edit, by their names from the folder of the GGUF at `path` on."""
    files = (path.parent / records_of(path.name)).rglob("*")
    found = tuple(sorted(str(f.relative_to(path.parent)) for f in files if f.is_file()))
    check_links(path.parent, found)
    return found


def _architecture(first: GgufFile) -> str:
    """What llama.cpp calls the architecture of a model."""
    for key in ("general.type", "general.architecture"):
        what = first.metadata.get(key)
        if isinstance(what, str) and what in _NO_MODEL:
            raise UnsupportedError(f"{first.path}: {_NO_MODEL[what]}")
    architecture = first.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(
            f"{first.path}: general.architecture is {architecture!r:.40}; expected the name of one, as every model "
            "has: convert it again with a current llama.cpp"
        )
    return architecture


def _parts(first: GgufFile) -> list[GgufFile]:
    """The headers of all parts, in order."""
    count, number = _split(first)
    if count < 2:
        return [first]
    named = PART.fullmatch(first.path.name)
    if named is None or int(named[3]) != count or int(named[2]) != number + 1:
        raise CheckpointError(
            f"{first.path}: part {number + 1} of {count} by its header; expected a name that ends in "
            f"-{number + 1:05d}-of-{count:05d}.gguf: give the parts the names that they had"
        )
    paths = [first.path.with_name(name) for name in gguf_names(first.path.name, count)]
    if number:
        raise CheckpointError(f"{first.path}: part {number + 1} of {count}; give the first, {paths[0].name}")
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(
            f"{first.path}: {len(missing)} of {count} parts are not beside it: {', '.join(missing[:3])}; the download "
            "is incomplete: fetch it again"
        )
    parts = [first, *(read_gguf(path) for path in paths[1:])]
    for i, part in enumerate(parts):
        if _split(part) != (count, i):
            raise CheckpointError(
                f"{part.path}: part {_split(part)[1] + 1} of {_split(part)[0]} by its header; expected {i + 1} of "
                f"{count}: parts of different files are mixed"
            )
    return parts


def _split(part: GgufFile) -> tuple[int, int]:
    """How many parts there are, and which of them this is, from 0."""
    count, number = part.metadata.get("split.count", 1), part.metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int) or not 0 <= number < max(1, count) <= 99_999:
        raise CheckpointError(
            f"{part.path}: split.no is {number!r:.40} and split.count {count!r:.40}; expected a part and how many "
            "there are: split or download the model again"
        )
    return max(1, count), number


def _require_all(first: GgufFile, found: int) -> None:
    if not found:
        raise CheckpointError(f"{first.path}: holds a vocabulary and no weights; give the file of the whole model")
    stated = first.metadata.get("split.tensors.count", found)
    if stated != found:
        raise CheckpointError(
            f"{first.path}: has {found} tensors in all parts, by its header {stated!r:.40}; the parts are of different "
            "files: download them again"
        )


def _config(first: GgufFile, architecture: str, n_tensors: int) -> dict[str, Any]:
    """Sizes and choices that the metadata states, by the names of transformers."""
    config: dict[str, Any] = {"model_type": architecture}
    for key, name in _STATED.items():
        value = first.metadata.get(f"{architecture}.{key}")
        if isinstance(value, Listed) and value.kind in SCALARS and value.count <= n_tensors:
            config[name] = read_list(first.path, value)  # one for each layer
        elif isinstance(value, int):
            config[name] = value
    # llama.cpp counts the layers that predict further tokens among its blocks.
    blocks, further = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers", 0)
    if type(blocks) is not int or type(further) is not int or not 0 < blocks - further <= n_tensors:
        _no_layers(first, architecture, blocks, n_tensors)
    return config | {"num_hidden_layers": blocks - further}


def _no_layers(first: GgufFile, architecture: str, stated: object, n_tensors: int) -> NoReturn:
    if stated is None:
        raise UnsupportedError(
            f"{first.path}: has no {architecture}.block_count, so '{architecture}' is no language model; give one"
        )
    raise CheckpointError(
        f"{first.path}: {architecture}.block_count is {stated!r:.40}; expected a number of layers, no more than the "
        f"{n_tensors} tensors"
    )


def _fingerprint(parts: list[GgufFile]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        with part.path.open("rb") as file:
            for at in range(0, part.data, _CHUNK):
                digest.update(file.read(min(_CHUNK, part.data - at)))
            take_samples(digest, file, part.data, part.size)
    return digest.hexdigest()
