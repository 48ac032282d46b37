"""Copies of GGUF files: keys added, tensors in other types, and not a byte else changed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from abliterate.checkpoint.gguf_copy import head_from, lay_out_copy
from abliterate.checkpoint.gguf_file import GgufFile, read_gguf
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import UnsupportedError
from tests.gguf_files import LITTLE, add, finish, of_all_types, tiny_gguf


def copy_gguf(source: GgufFile, target: Path, *arguments: Any, **options: Any) -> dict[str, TensorInfo]:
    """Lay a copy out and write it; its table of tensors."""
    layout = lay_out_copy(source, target.name, *arguments, **options)
    layout.write(source.path, target)
    return layout.tensors


def data_of(path: Path, name: str) -> bytes:
    tensor = read_gguf(path).tensors[name]
    return path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def test_a_copy_has_keys_added_and_all_else_as_it_was(tmp_path: Path) -> None:
    path, copy, again = (tmp_path / f"{name}.gguf" for name in ("base", "copy", "again"))
    tiny_gguf(path, alignment=128)
    source = read_gguf(path)
    added = {"abliterate.note": "wörds", "abliterate.n": 3, "abliterate.strength": 0.5, "abliterate.tuned": True}
    written = copy_gguf(source, copy, added)
    found, reader = read_gguf(copy), gguf.GGUFReader(copy)
    assert found.tensors == written
    assert found.alignment == 128
    assert {k: reader.get_field(k).contents() for k in added} == added
    old, new = path.read_bytes(), copy.read_bytes()
    for key, (start, stop) in source.spans.items():
        assert new[slice(*found.spans[key])] == old[start:stop]
    assert all(data_of(copy, name) == data_of(path, name) for name in source.tensors)
    copy_gguf(found, again, {"abliterate.note": "other", "abliterate.n": 4})
    last = read_gguf(again).metadata
    assert (last["abliterate.note"], last["abliterate.n"], last["abliterate.tuned"]) == ("other", 4, True)
    assert len(last) == len(found.metadata)
    # Headers come out of those of copies, what was replaced and what was not.
    for base, made in ((source, found), (found, read_gguf(again))):
        pieces = head_from(base, made)
        whole = made.path.read_bytes()
        head = b"".join(p if isinstance(p, bytes) else whole[slice(*p)] for p in pieces)
        assert head == base.path.read_bytes()[: base.data]
        assert sum(len(p) for p in pieces if isinstance(p, bytes)) < base.data / 2


def test_a_copy_leaves_room_for_tensors_in_other_types(tmp_path: Path) -> None:
    path, copy = of_all_types(tmp_path / "base.gguf"), tmp_path / "copy.gguf"
    source = read_gguf(path)
    types = {"t.Q4_K": "Q8_0", "t.Q1_0": "BF16", "t.F16": "F32"}
    written = copy_gguf(source, copy, {"abliterate.x": 1}, types, left=["t.Q6_K", "t.F32"])
    assert {n for n in written if written[n].dtype != source.tensors[n].dtype} == types.keys()
    gguf.GGUFReader(copy)
    for name in written:
        data = data_of(copy, name)
        if name in (*types, "t.Q6_K", "t.F32"):
            assert data == bytes(len(data)) != b""
        else:
            assert data == data_of(path, name)
    with pytest.raises(UnsupportedError, match=r"'t\.Q4_0'.*cannot be stored as Q4_K"):
        copy_gguf(source, tmp_path / "no.gguf", {}, {"t.Q4_0": "Q4_K"})
    assert not (tmp_path / "no.gguf").exists()


def test_a_copy_takes_little_memory(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    for i in range(3):
        writer.add_tensor(f"t.{i}", np.full((1024, 2048), i, np.float32))
    add(writer, "tokenizer.chat_template", "x" * 1000)
    path = finish(writer)
    tracemalloc.start()
    try:
        copy_gguf(read_gguf(path), tmp_path / "copy.gguf", {"abliterate.x": "y"})
        assert tracemalloc.get_traced_memory()[1] < LITTLE < path.stat().st_size
    finally:
        tracemalloc.stop()
    assert data_of(tmp_path / "copy.gguf", "t.2") == data_of(path, "t.2")
