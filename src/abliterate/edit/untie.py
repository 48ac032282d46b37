"""Give an LM head that shares the embedding's weights a copy of its own, so that only the embedding is edited.

Owns the new file, the index and the configuration that say so. Never changes a tensor's bytes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.folder import INDEX, SINGLE
from abliterate.checkpoint.naming import RECORDS
from abliterate.checkpoint.stream import copy_range, create, sync

#: Where the files stand that an edit writes anew, as the base has them.
BASE_FILES = f"{RECORDS}/base-files"


class Untied(NamedTuple):
    """The embedding whose bytes the head takes, and the head's own name."""

    embedding: str
    head: str


def untie(checkpoint: Checkpoint, untied: Untied, out: Path) -> None:
    """Write the head's tensor into a file of its own, and say so in index and configuration.

    A checkpoint in one file becomes one of two, as loaders read an index only where there is no such single file.

    Raises:
        ResourceError: the disk is full.
    """
    tensor = checkpoint.tensors[untied.embedding]
    renamed = moved(checkpoint)
    head_file = "model-00002-of-00002.safetensors" if renamed else "model-lm-head.safetensors"
    entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, untied.head: entry}).encode()
    header += b" " * (-len(header) % 8)
    create(out / head_file, 8 + len(header) + tensor.nbytes)
    source, target = os.open(checkpoint.path / tensor.file, os.O_RDONLY), os.open(out / head_file, os.O_RDWR)
    try:
        os.pwrite(target, len(header).to_bytes(8, "little") + header, 0)
        copy_range(source, target, tensor.offset, tensor.offset + tensor.nbytes, tensor.file, to=8 + len(header))
        os.fsync(target)
    finally:
        os.close(source)
        os.close(target)
    for old, new in renamed.items():
        if (out / old).exists():  # where it does not, an edit that was killed has done it
            (out / old).rename(out / new)
    index = _index(checkpoint, renamed)
    index["weight_map"][untied.head] = head_file
    index["metadata"] = {**index.get("metadata", {}), "total_size": checkpoint.nbytes + tensor.nbytes}
    _write(checkpoint, out, INDEX, index)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    _write(checkpoint, out, "config.json", _untied_config(config))


def moved(checkpoint: Checkpoint) -> dict[str, str]:
    """Files that get another name where the head becomes a tensor of its own."""
    return {SINGLE: "model-00001-of-00002.safetensors"} if checkpoint.shards == (SINGLE,) else {}


def _index(checkpoint: Checkpoint, renamed: dict[str, str]) -> dict[str, Any]:
    path = checkpoint.path / INDEX
    if path.is_file():
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return index
    return {"weight_map": {name: renamed.get(t.file, t.file) for name, t in checkpoint.tensors.items()}}


def _untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with every mark of a tied head set to false, the language part's included."""
    found = {k: _untied_config(v) if isinstance(v, dict) and "vocab_size" in v else v for k, v in config.items()}
    return found | {"tie_word_embeddings": False}


def _write(checkpoint: Checkpoint, out: Path, name: str, value: dict[str, Any]) -> None:
    """Write a JSON file anew; what the base has in its place is kept for the way back."""
    if name in checkpoint.side_files:
        (out / BASE_FILES).mkdir(parents=True, exist_ok=True)
        (out / name).replace(out / BASE_FILES / name)
    (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(out / name)
