"""Files as they are and as they should not be: headers, folders, codecs."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from abliterate.checkpoint import open_checkpoint, stream
from abliterate.checkpoint.codecs import Plain
from abliterate.checkpoint.safetensors_file import read_header
from abliterate.checkpoint.storage import matrices
from abliterate.errors import CheckpointError, ResourceError, UnsupportedError, VerifyError

Tiny = Callable[..., Path]
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50),
    st.sampled_from(sorted(TORCH)),
)
def test_codecs_round_as_torch_does(values: list[float], dtype: str) -> None:
    array, rows = np.array([values], dtype=np.float32), np.arange(1)
    expected = torch.from_numpy(array).to(TORCH[dtype])
    read = array.astype(Plain(dtype).work)
    raw = Plain(dtype).round(read, rows)
    assert np.array_equal(Plain(dtype).decode(raw, rows), read)
    if dtype == "BF16":  # ties go away from zero, not to even: as near as torch comes, not always the same
        with np.errstate(over="ignore", invalid="ignore"):
            ours, theirs = (np.abs(x.astype(np.float64) - array) for x in (read, expected.float().numpy()))
        assert np.array_equal(ours, theirs, equal_nan=True)
    else:
        assert raw.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from(sorted(TORCH)),
)
def test_headers_of_real_files_are_read(
    shapes: list[list[int]], dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("h") / "x.safetensors"
    tensors = {f"t{i}": torch.randn(shape).to(TORCH[dtype]) for i, shape in enumerate(shapes)}
    save_file(tensors, path)
    found = read_header(path)
    raw = path.read_bytes()
    assert set(found) == set(tensors)
    for name, t in found.items():
        assert t.shape == tuple(tensors[name].shape)
        assert (
            raw[t.offset : t.offset + t.nbytes]
            == tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )


def write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape if shape is not None else [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 8)}, b"1234", "truncated"),
        ({"a": entry(0, 8)}, b"123456789", "stray bytes"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b'.*overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "'b'.*hole"),
        ({"a": entry(0, 8, [3])}, bytes(8), "'a' spans 8"),
        ({"a": entry(0, 8, [-2])}, bytes(8), "'a' has shape"),
        ({"a": entry(0, 8, dtype="Q9")}, bytes(8), "'a' has unknown dtype 'Q9'"),
        ({"a": {"dtype": "F32"}}, b"", "'a' lacks"),
        ({"a": 3}, b"", "'a' lacks"),
        ([], b"", "not a JSON object"),
        (b"{nonsense", b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "twice"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_what_is_wrong(header: Any, data: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=f"x.safetensors.*{words}"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({f"t{i}": entry(0, 16, [2, 2]) for i in range(1000)}, bytes(16), "overlaps"),
        ({"a": entry(0, 8), "b": entry(4, 4)}, bytes(8), "'b' at byte .* overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 8)}, bytes(8), "'b' at byte .* hole"),
        ({"a": entry(0, 1 << 63, [1 << 61])}, bytes(8), "truncated"),
        ({"a": entry(8, 0, [2])}, bytes(8), "'a' spans -8"),
        ({"a": entry(1 << 70, (1 << 70) + 8)}, bytes(8), "'a' at byte .* hole"),
        ({"a": entry(0, 0, [1 << 32, 1 << 32])}, b"", "more elements than 64 bits"),
        ({"a": entry(0, 0, [1 << 62, 1 << 62, 0])}, b"", "more elements than 64 bits"),
        ({"a": entry(0, 0, [0, 1 << 64])}, b"", "more elements than 64 bits"),
        ({"a": entry(0, 8, [9] * 100_000)}, bytes(8), "100000 axes with more elements"),
        ({"a": entry(0, 8, [True, 2])}, bytes(8), r"'a' has shape \[True"),
        ({"a": entry(0, 8) | {"shape": [2.0]}}, bytes(8), r"'a' has shape \[2.0"),
        ({"a": entry(0, 8) | {"data_offsets": [0, 8.0]}}, bytes(8), "'a' has data_offsets"),
        ({"a": entry(0, 8) | {"data_offsets": [0, 8, 8]}}, bytes(8), "'a' has data_offsets"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8), r"'a' has shape \[nan"),
        (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', bytes(8), r"'a' has shape \[inf"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1' + b"0" * 9999 + b"]}}", bytes(8), "not valid"),
        (b'{"a": {"dtype": "F32", "dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}', bytes(8), "twice"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8), "surrogates"),
        (b'{"a\xff": {}}', b"", "not valid JSON"),
        (b"[" * 1_000_000, b"", "not valid JSON"),
        (b'{"a":' * 100_000, b"", "not valid JSON"),
        (b"null", b"", "not a JSON object"),
        (b"", b"", "not valid JSON"),
        ({"a" * 1001: entry(0, 8)}, bytes(8), "a name of 1,001 characters"),
        ({"a": entry(0, 8) | {"dtype": "F" * 10_000}}, bytes(8), "F…; the file"),
    ],
    ids=range(26),
)  # fmt: skip
def test_hostile_headers_are_refused_in_little_memory(header: Any, data: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"x.safetensors.*{words}") as error:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6 + 40 * path.stat().st_size
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "/etc/passwd", "a\0b", "a\nb", "\x1b[31m", "𝔞", "__metadata"])
def test_names_are_names_not_paths(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {name: entry(0, 8), "empty": entry(8, 8, [0, 5])}, bytes(8))
    assert set(read_header(path)) == {name, "empty"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [[1 << 40], "many", ["x", 1], [0, 0], None, [1, 2, 3], [True, 2]])
@pytest.mark.parametrize("scales", [[3, 1, 1], [2, 3], [], [1]])
def test_scales_that_do_not_fit_their_codes_are_refused(scales: list[int], size: Any, tmp_path: Path) -> None:
    n = int(np.prod(scales))
    header = {
        "w": entry(0, 2 * 4 * 6, [2, 4, 6], "F8_E4M3"),
        "w_scale_inv": entry(2 * 4 * 6, 2 * 4 * 6 + 4 * n, scales),
    }
    write(tmp_path / "model.safetensors", header, bytes(2 * 4 * 6) + np.ones(n, "<f4").tobytes())
    stated = {"quant_method": "fp8", "weight_block_size": size}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated}))
    checkpoint = open_checkpoint(tmp_path)
    if n == 1:
        assert len(list(matrices(checkpoint, checkpoint.tensors["w"], 1))) == 2
        return
    with pytest.raises(UnsupportedError, match=r"'w' of shape .* has scales of shape"):
        list(matrices(checkpoint, checkpoint.tensors["w"], 1))


@pytest.mark.parametrize("scales", [[4, 1], [4, 3], [2, 2], [8], [1, 4, 2, 1]])
def test_scales_of_four_bit_codes_come_one_for_each_block(scales: list[int], tmp_path: Path) -> None:
    n = int(np.prod(scales))
    header = {"w_blocks": entry(0, 4 * 32, [4, 2, 16], "U8"), "w_scales": entry(4 * 32, 4 * 32 + n, scales, "U8")}
    write(tmp_path / "model.safetensors", header, bytes(4 * 32 + n))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match=r"'w_blocks'"):
        list(matrices(checkpoint, checkpoint.tensors["w_blocks"], 0))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(raw)
        try:
            read_header(path)
        except CheckpointError as error:
            assert "x.safetensors" in str(error)


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="exceeds"):
        read_header(path)


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint that a test may damage."""
    import shutil

    return Path(shutil.copytree(tiny("llama", shard_size="20KB"), tmp_path / "model"))


def test_a_whole_folder_opens_with_all_its_tensors(copy: Path) -> None:
    checkpoint = open_checkpoint(copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert set(checkpoint.tensors) == set(index["weight_map"]) and len(checkpoint.shards) > 2
    assert checkpoint.nbytes == index["metadata"]["total_size"]
    assert "config.json" in checkpoint.side_files and not set(checkpoint.shards) & set(checkpoint.side_files)


def test_the_fingerprint_follows_content(copy: Path) -> None:
    before = open_checkpoint(copy)
    tensor = next(iter(before.tensors.values()))
    with (copy / tensor.file).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\x01\x02")
    assert open_checkpoint(copy).fingerprint != before.fingerprint


def test_missing_and_foreign_files_are_named(copy: Path) -> None:
    shard = open_checkpoint(copy).shards[1]
    (copy / shard).rename(copy / "elsewhere")
    with pytest.raises(CheckpointError, match=f"not there: {shard}.*incomplete"):
        open_checkpoint(copy)
    (copy / "elsewhere").rename(copy / shard)
    (copy / "config.json").rename(copy / "c")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(copy)
    (copy / "c").rename(copy / "config.json")
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    assert open_checkpoint(copy).left_out == ("pytorch_model.bin",)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(copy / "nowhere")


def test_an_index_of_another_save_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = next(s for s in open_checkpoint(copy).shards if s != index["weight_map"][name])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"'{name}'.*different saves"):
        open_checkpoint(copy)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("file", "kind", "words"),
    [
        ("pytorch_model.bin", UnsupportedError, "pickled.*save_pretrained"),
        ("model.gguf", UnsupportedError, "GGUF"),
        ("notes.txt", CheckpointError, "weights are missing"),
    ],
)
def test_folders_without_safetensors_say_what_to_do(
    file: str, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(kind, match=words):
        open_checkpoint(tmp_path)


def test_quantised_checkpoints_are_refused_by_method(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedError, match="gptq"):
        open_checkpoint(tmp_path)


# ------------------------------------------------------------------ copying

SOURCE = np.random.default_rng(0).bytes(9 << 20)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "source"
    path.write_bytes(SOURCE)
    return path


def refused(code: int) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def copied(large: Path, target: Path, start: int, stop: int) -> bytes:
    """What a file of ones holds when a range of `large` was copied into it."""
    target.write_bytes(b"\x01" * len(SOURCE))
    with large.open("rb") as old, target.open("r+b") as new:
        stream.copy_range(old.fileno(), new.fileno(), start, stop, large.name)
    return target.read_bytes()


@pytest.mark.parametrize("start", [0, 8 + 2**21, 2**21 - 1])
@pytest.mark.parametrize("stop", [2**21, 2**22 + 3, len(SOURCE), 2**23])
@pytest.mark.parametrize("missing", [(), ("direct",), ("direct", "kernel")], ids=str)
def test_a_range_is_copied_whatever_the_file_system_can(
    start: int, stop: int, missing: tuple[str, ...], large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    past, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: past.append(a[2]) or preadv(*a))
    if "direct" in missing:
        monkeypatch.setattr(os, "pwritev", refused(errno.EINVAL))
    if "kernel" in missing:
        monkeypatch.setattr(os, "copy_file_range", refused(errno.ENOSYS), raising=False)
    found = copied(large, tmp_path / "target", start, stop)
    stop = max(start, stop)
    assert found[start:stop] == SOURCE[start:stop]
    assert found[:start] == b"\x01" * start and found[stop:] == b"\x01" * (len(SOURCE) - stop)
    assert all(at % (2 << 20) == 0 for at in past)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no way past the cache")
@pytest.mark.parametrize(
    ("call", "does", "error", "words"),
    [
        ("pwritev", refused(errno.ENOSPC), ResourceError, "free some disk"),
        ("pwritev", refused(errno.EIO), ResourceError, "cannot write"),
        ("preadv", lambda *_: 100, VerifyError, "ended at byte 2,097,152"),
    ],
)
def test_what_stops_a_copy_past_the_cache_is_named(
    call: str,
    does: Callable[..., Any],
    error: type[Exception],
    words: str,
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not goes_past_the_cache(tmp_path):
        pytest.skip("this file system has no way past the cache")
    monkeypatch.setattr(os, call, does)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(error, match=words):
        copied(large, tmp_path / "target", 5, len(SOURCE))
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def goes_past_the_cache(folder: Path) -> bool:
    (folder / "probe").write_bytes(b"")
    try:
        os.close(os.open(folder / "probe", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="other systems share blocks in other ways, if at all")
def test_blocks_are_shared_where_the_file_system_can(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    asked = []

    def share(target: int, number: int, argument: bytes) -> int:
        source, at, nbytes, to = struct.unpack("=qQQQ", argument)
        asked.append((number, at, nbytes, to))
        os.pwrite(target, os.pread(source, nbytes, at), to)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", share)
    monkeypatch.setattr(os, "pwritev", refused(errno.EIO))
    assert copied(large, tmp_path / "target", 5, len(SOURCE))[5:] == SOURCE[5:]
    assert asked == [(0x4020940D, 2 << 20, 6 << 20, 2 << 20)]
