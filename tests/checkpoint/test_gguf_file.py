"""GGUF files as they are and as they should not be: headers, kinds, parts."""

from __future__ import annotations

import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.checkpoint import Checkpoint, open_checkpoint, resolve_model
from abliterate.checkpoint.gguf_file import STRING, TYPES, Listed, read_gguf, read_list
from abliterate.errors import AbliterateError, CheckpointError, UnsupportedError
from tests.gguf_files import LITTLE, LLAMA, finish, of_all_types, tiny_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", general__name="näme", llama__rope__freq_base=1e4)


# ------------------------------------------------------------------ headers


def test_the_sizes_of_types_are_those_of_ggml() -> None:
    assert {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == TYPES


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_says_what_the_reader_of_llamacpp_says(version: int, tiny: Path, tmp_path: Path) -> None:
    for made in (tiny, of_all_types(tmp_path / "types.gguf")):
        raw = bytearray(made.read_bytes())
        raw[4:8] = struct.pack("<I", version)
        path = tmp_path / f"{version}.gguf"
        path.write_bytes(raw)
        found, reader = read_gguf(path), gguf.GGUFReader(path)
        assert [*found.tensors] == [t.name for t in reader.tensors]
        for theirs in reader.tensors:
            ours = found.tensors[theirs.name]
            assert ours.dtype == theirs.tensor_type.name
            assert ours.shape == tuple(theirs.shape.tolist()[::-1])
            assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        for key, value in found.metadata.items():
            values = read_list(path, value) if isinstance(value, Listed) else value
            assert values == reader.get_field(key).contents(), key
        assert found.metadata.keys() == {k for k in reader.fields if not k.startswith("GGUF.")}


def vocabulary(n: int) -> bytes:
    """A file of a vocabulary alone, of `n` texts."""
    texts = b"".join(struct.pack("<Q", 16) + b"%016d" % i for i in range(n))
    key = b"tokenizer.ggml.tokens"
    return (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key
        + struct.pack("<IIQ", 9, STRING, n) + texts
    )  # fmt: skip


def test_a_vocabulary_is_passed_over(tmp_path: Path) -> None:
    path, n = tmp_path / "vocabulary.gguf", 400_000
    path.write_bytes(vocabulary(n))
    tracemalloc.start()
    try:
        listed = read_gguf(path).metadata["tokenizer.ggml.tokens"]
        assert tracemalloc.get_traced_memory()[1] < LITTLE < path.stat().st_size
    finally:
        tracemalloc.stop()
    assert isinstance(listed, Listed)
    texts = read_list(path, listed)
    assert len(texts) == n
    assert (texts[0], texts[-1]) == ("0" * 16, f"{n - 1:016d}")


def patched(at: int, code: str, *values: int) -> Callable[[bytes], bytes]:
    """The same bytes with other numbers at a place."""

    def change(raw: bytes) -> bytes:
        return raw[:at] + struct.pack(code, *values) + raw[at + struct.calcsize(code) :]

    return change


def after(name: bytes, shift: int, code: str, *values: int) -> Callable[[bytes], bytes]:
    """The same bytes with other numbers `shift` bytes behind the first place where a name stands."""
    return lambda raw: patched(raw.index(name) + len(name) + shift, code, *values)(raw)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda raw: raw[:0], CheckpointError, "does not begin with 'GGUF'"),
        (patched(0, "<4s", b"GGML"), CheckpointError, "does not begin with 'GGUF'"),
        (patched(4, "<I", 1), UnsupportedError, "version 1; expected 2 or 3"),
        (patched(4, "<I", 7), UnsupportedError, "version 7"),
        (patched(4, ">I", 3), UnsupportedError, "big-endian.*gguf_convert_endian"),
        (patched(8, "<Q", 1 << 60), CheckpointError, "1,152,921,504,606,846,976 tensors"),
        (patched(16, "<Q", 1 << 60), CheckpointError, "1,152,921,504,606,846,976 keys"),
        (patched(16, "<Q", 60_000), CheckpointError, "damaged or no GGUF"),
        (patched(24, "<Q", 1 << 50), CheckpointError, "a key has .* bytes; expected at most"),
        (patched(24, "<Q", 1 << 23), CheckpointError, "truncated: a key takes"),
        (after(b"general.architecture", 0, "<I", 77), CheckpointError, "is of kind 77"),
        (after(b"tokenizer.ggml.tokens", 4, "<I", 9), CheckpointError, "array of kind 9"),
        (after(b"tokenizer.ggml.tokens", 8, "<Q", 1 << 59), CheckpointError, "truncated.*tokens"),
        (after(b"tokenizer.ggml.scores", 8, "<Q", 1 << 61), CheckpointError, "truncated.*scores"),
        (after(b"tokenizer.ggml.tokens", 16, "<Q", 1 << 63), CheckpointError, "truncated.*tokens"),
        (after(b"token_embd.weight", 0, "<I", 5), CheckpointError, "has 5 axes"),
        (after(b"token_embd.weight", 4, "<QQ", 1 << 40, 1 << 40), CheckpointError, "larger than 64 bits"),
        (after(b"token_embd.weight", 4, "<QQ", 1 << 30, 1 << 30), CheckpointError, "truncated: tensor 'token_embd"),
        (after(b"token_embd.weight", 20, "<I", 12), CheckpointError, "no whole number of blocks of Q4_K"),
        (after(b"token_embd.weight", 20, "<I", 4), CheckpointError, "type 4, which is not known"),
        (after(b"output_norm.weight", 16, "<Q", 6145), CheckpointError, "is not aligned to 32"),
        (after(b"output_norm.weight", 16, "<Q", 0), CheckpointError, "overlaps"),
        (after(b"output_norm.weight", 16, "<Q", 6208), CheckpointError, "leaves a hole"),
        (lambda raw: raw.replace(b"output_norm.weight", b"blk.0.ffn_u\xff.weight"[:18]), CheckpointError, "not UTF-8"),
        (lambda raw: raw.replace(b"blk.1.", b"blk.0."), CheckpointError, "two tensors 'blk.0"),
        (lambda raw: raw.replace(b"llama.context_length", b"general.architecture"), CheckpointError, "occurs twice"),
        (lambda raw: raw[:-5000], CheckpointError, "truncated: tensor 'blk.1"),
        (lambda raw: raw[:100], CheckpointError, "truncated"),
        (lambda raw: raw.replace(b"general.architecture", b"general.architectuge"), CheckpointError, "is None"),
        (after(b"llama.block_count", 4, "<I", 0), CheckpointError, "block_count is 0"),
        (after(b"llama.block_count", 4, "<I", 1 << 31), CheckpointError, "block_count is 2147483648"),
        (lambda raw: raw.replace(b"llama.block_count", b"llama.block_counm"), UnsupportedError, "no language model"),
    ],
)
def test_what_is_wrong_is_said(
    change: Callable[[bytes], bytes], kind: type[Exception], words: str, tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(change(tiny.read_bytes()))
    with pytest.raises(kind, match=rf"wrong\.gguf.*{words}"):
        open_checkpoint(path)


@pytest.mark.parametrize("alignment", [0, 24, 1 << 31])
def test_an_alignment_is_a_power_of_two(alignment: int, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", alignment=64)
    assert all(t.offset % 64 == 0 for t in open_checkpoint(path).tensors.values())
    path.write_bytes(after(b"general.alignment", 4, "<I", alignment)(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"alignment is {alignment}; expected a power of two"):
        open_checkpoint(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_is_said_or_does_not_matter(data: st.DataObject, tiny: Path) -> None:
    raw = bytearray(tiny.read_bytes())
    header = read_gguf(tiny).data
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        piece = data.draw(st.one_of(st.binary(min_size=1, max_size=9), st.just(b"\xff" * 8), st.just(bytes(8))))
        raw[at : at + data.draw(st.sampled_from([0, len(piece)]))] = piece
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    path = tiny.with_name("damaged.gguf")
    path.write_bytes(raw[:cut])
    tracemalloc.start()
    try:
        assert isinstance(open_checkpoint(path), Checkpoint)
    except AbliterateError as error:
        assert "damaged.gguf" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < LITTLE


# ------------------------------------------------------------------ what a file holds


def test_a_file_is_a_checkpoint(tiny: Path) -> None:
    found = open_checkpoint(resolve_model(str(tiny)))
    assert (found.format, found.source, found.path, found.shards) == ("gguf", tiny, tiny.parent, (tiny.name,))
    assert (found.n_layers, found.model_type, found.config["hidden_size"]) == (2, "llama", 32)
    other = shutil.copy(tiny, tiny.with_name("other.gguf"))
    assert open_checkpoint(other).fingerprint == found.fingerprint
    other.write_bytes(tiny.read_bytes()[:-4] + b"\1\2\3\4")
    assert open_checkpoint(other).fingerprint != found.fingerprint
    found.require_unchanged()
    with pytest.raises(CheckpointError, match="no such GGUF file"):
        resolve_model(str(tiny.with_name("nowhere.gguf")))


@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [
        ("llama", "adapter", "LoRA adapter; merge it"),
        ("controlvector", None, "control vector"),
        ("clip", "mmproj", "sees or hears"),
        ("clip", None, "sees or hears"),
        ("imatrix", "imatrix", "importance matrix"),
    ],
)
def test_what_is_no_model_is_named(architecture: str, kind: str | None, words: str, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", architecture, **({"general__type": kind} if kind else {}))
    with pytest.raises(UnsupportedError, match=rf"x\.gguf.*{words}"):
        open_checkpoint(path)


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_token_list(["a", "b"])
    with pytest.raises(CheckpointError, match="vocabulary and no weights"):
        open_checkpoint(finish(writer))


def test_layers_that_predict_further_tokens_are_none_of_the_models(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", "glm4moe", [LLAMA] * 3, glm4moe__nextn_predict_layers=1)
    found = open_checkpoint(path)
    assert (found.n_layers, found.n_further_layers) == (2, 1)


def test_a_split_file_is_one_checkpoint(tiny: Path, tmp_path: Path) -> None:
    first = tiny_gguf(tmp_path / "m.gguf", split=8)
    found = open_checkpoint(first)
    assert len(found.shards) == 3
    whole = open_checkpoint(tiny_gguf(tmp_path / "whole.gguf"))
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in found.tensors.items()} == {
        n: (t.dtype, t.shape, t.nbytes) for n, t in whole.tensors.items()
    }
    for name, tensor in found.tensors.items():
        read = [
            np.fromfile(c.path / c.tensors[name].file, np.uint8, tensor.nbytes, offset=c.tensors[name].offset)
            for c in (found, whole)
        ]
        assert np.array_equal(*read)
    third = tmp_path / found.shards[2]
    with pytest.raises(CheckpointError, match=f"part 3 of 3; give the first, {first.name}"):
        open_checkpoint(third)
    with pytest.raises(CheckpointError, match=r"part 1 of 3.*-00001-of-00003"):
        open_checkpoint(Path(shutil.copy(first, tmp_path / "renamed.gguf")))
    aside = third.rename(tmp_path / "aside.gguf")
    with pytest.raises(CheckpointError, match=f"1 of 3 parts are not beside it: {third.name}"):
        open_checkpoint(first)
    shutil.copy(tmp_path / found.shards[1], third)
    with pytest.raises(CheckpointError, match="part 2 of 3 by its header; expected 3 of 3"):
        open_checkpoint(first)
    aside.rename(third)
    first.write_bytes(after(b"split.tensors.count", 4, "<I", 7)(first.read_bytes()))
    with pytest.raises(CheckpointError, match="by its header 7"):
        open_checkpoint(first)
