"""Matrices of ggml's block types lose a direction by moves of their codes, and take it back bit for bit."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.checkpoint import Checkpoint, TensorInfo, storage
from abliterate.checkpoint.codecs import Float32Array, Plain, Raw
from abliterate.checkpoint.ggml_blocks import LAYOUTS, Blocks
from abliterate.checkpoint.matrix import Matrix
from abliterate.edit.projection import Removal, orthonormal
from abliterate.edit.requantise import encode, move_columns, move_rows
from abliterate.edit.sidecar import Sidecar, read_records, restore
from abliterate.errors import UnsupportedError, VerifyError

N = M = 256
#: The error beside that of requantising, which hardly moves codes as coarse as the first, and grows scales of the last.
ERROR = {"Q2_K": 2.3, "Q8_0": 1.8}


def basis(k: int, n: int = N, seed: int = 0) -> Float32Array:
    return orthonormal(np.random.default_rng(seed + 7).normal(size=(k, n)).astype(np.float32))


def stored(dtype: str, shape: tuple[int, int], seed: int = 0) -> Raw:
    """A matrix as llama.cpp stores it, with rows of different sizes."""
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=shape) * rng.uniform(0.5, 2, (shape[0], 1))).astype(np.float32)
    return Blocks(dtype).round(values, np.arange(shape[0]))


class Result(NamedTuple):
    """A matrix before and after as numbers with the residual axis down, both as stored, and the leak reported."""

    before: Float32Array
    after: Float32Array
    raw: Raw
    edited: Raw
    leak: float


def moved(raw: Raw, dtype: str, removal: Removal, folder: Path, by_rows: bool = False) -> Result:
    codec, rows = Blocks(dtype), np.arange(len(raw))
    columns = raw.shape[1] // codec.layout.nbytes * codec.layout.size
    (folder / "a").write_bytes(raw.tobytes())
    (folder / "b").write_bytes(bytes(raw.size))
    matrix = Matrix("w", "a", 0, len(raw), columns, codec)
    with (folder / "a").open("rb") as a, (folder / "b").open("r+b") as b:
        removed = (move_rows if by_rows else move_columns)(matrix, a.fileno(), b.fileno(), removal)
        edited = matrix.read(b.fileno(), rows)
    before, after = codec.decode(raw, rows), codec.decode(edited, rows)
    if by_rows:
        before, after = before.T, after.T
    return Result(before, after, raw, edited, float(np.sqrt(removed.left / max(removed.removed, 1e-30))))


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("dtype", LAYOUTS)
def test_every_type_loses_the_direction_that_plain_requantising_puts_back(
    dtype: str, by_rows: bool, tmp_path: Path
) -> None:
    d = basis(1)
    result = moved(stored(dtype, (N, M)), dtype, Removal(d), tmp_path, by_rows)
    exact = result.before - d @ (d.T @ result.before)
    naive = np.array(exact.T if by_rows else exact, order="C")
    Blocks(dtype).round(naive, np.arange(N))
    naive = naive.T if by_rows else naive
    was = np.linalg.norm(d.T @ result.before)
    leak, at_once = (float(np.linalg.norm(d.T @ (w - exact)) / was) for w in (result.after, naive))
    assert leak == pytest.approx(result.leak, abs=1e-4)
    assert leak < 0.002 and leak < 0.15 * at_once
    assert np.linalg.norm(result.after - exact) < ERROR.get(dtype, 1.5) * np.linalg.norm(naive - exact)
    # All that changed are codes.
    held = np.ones(LAYOUTS[dtype].nbytes, dtype=bool)
    for offset, nbytes, *_ in LAYOUTS[dtype].planes:
        held[offset : offset + nbytes] = False
    blocks, edited = (x.reshape(-1, len(held)) for x in (result.raw, result.edited))
    assert np.array_equal(blocks[:, held], edited[:, held]) and not np.array_equal(blocks, edited)


@settings(max_examples=15, deadline=None)
@given(
    dtype=st.sampled_from(list(LAYOUTS)),
    k=st.integers(1, 3),
    strength=st.floats(-1, 2),
    keep_norms=st.booleans(),
    by_rows=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_strength_of_several_directions_leaves_what_was_asked_for(
    dtype: str, k: int, strength: float, keep_norms: bool, by_rows: bool, seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    d, folder = basis(k, seed=seed), tmp_path_factory.mktemp("w")
    result = moved(stored(dtype, (N, M), seed), dtype, Removal(d, strength, keep_norms), folder, by_rows)
    exact = result.before - strength * d @ (d.T @ result.before)
    if keep_norms:
        exact *= np.linalg.norm(result.before, axis=0) / np.linalg.norm(exact, axis=0)
    leak = np.linalg.norm(d.T @ (result.after - exact)) / np.linalg.norm(d.T @ result.before)
    assert leak == pytest.approx(result.leak, abs=1e-4) and leak < 0.02


@settings(max_examples=20, deadline=None)
@given(dtype=st.sampled_from(list(LAYOUTS)), by_rows=st.booleans(), seed=st.integers(0, 999))
def test_nothing_moves_where_nothing_is_asked_whatever_the_bytes(
    dtype: str, by_rows: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    codec = Blocks(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, (32, codec.row_bytes(256)), dtype=np.uint8)
    values = codec.decode(raw, np.arange(32))
    raw[~(np.abs(values) < 1e9).all(axis=1)] = 0
    d = basis(1, 256 if by_rows else 32)
    folder = tmp_path_factory.mktemp("w")
    assert np.array_equal(moved(raw, dtype, Removal(d, 0.0), folder, by_rows).edited, raw)


@pytest.mark.parametrize("dtype", ["Q2_K", "Q4_K", "Q8_0", "IQ4_NL"])
def test_a_direction_that_lies_almost_on_one_coordinate_goes_too(dtype: str, tmp_path: Path) -> None:
    d = np.random.default_rng(0).normal(size=(1, N)).astype(np.float32) * 0.03
    d[0, 3] = 1
    d = orthonormal(d)
    result = moved(stored(dtype, (N, M)), dtype, Removal(d), tmp_path)
    # By rounding the exact result under the same scales half a step of that row would be left.
    codec = Blocks(dtype)
    exact = result.before - d @ (d.T @ result.before)
    plain = codec.decode(codec.words(exact.copy(), np.arange(N), result.raw), np.arange(N))
    was = np.linalg.norm(d.T @ result.before)
    assert result.leak < 0.005 and result.leak < 0.3 * np.linalg.norm(d.T @ plain) / was


def test_a_block_without_a_scale_cannot_move_and_others_make_up_for_it(tmp_path: Path) -> None:
    raw = stored("Q4_K", (N, M))
    raw.reshape(-1, 144)[::5, :2] = 0  # d = 0, so that only minima are left
    d = basis(1)
    result = moved(raw, "Q4_K", Removal(d), tmp_path)
    assert np.linalg.norm(d.T @ result.after) < 0.01 * np.linalg.norm(d.T @ result.before)
    assert not np.array_equal(result.before, result.after)
    still = (result.before == result.after).reshape(-1, 256)[::5]
    assert still.all()


def test_a_damaged_scale_is_told(tmp_path: Path) -> None:
    raw = stored("Q4_K", (N, M))
    raw[5, :2] = 0xFF
    with pytest.raises(VerifyError, match="'w' holds NaN or infinity, first in row 5"):
        moved(raw, "Q4_K", Removal(basis(1)), tmp_path)


def info(dtype: str, shape: tuple[int, ...], offset: int) -> TensorInfo:
    return TensorInfo("w", dtype, shape, "a", offset, int(np.prod(shape[:-1])) * Blocks(dtype).row_bytes(shape[-1]))


def pieces(tensor: TensorInfo, axis: int) -> list[Matrix]:
    opened = SimpleNamespace(source=Path("m.gguf"), format="gguf")
    return list(storage.matrices(cast(Checkpoint, opened), tensor, axis))


@pytest.mark.parametrize("dtype", ["Q4_K", "Q5_1", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4"])
@pytest.mark.parametrize(("shape", "axis", "keep_norms"), [
    ((3, 64, 512), 1, False), ((64, 512), 0, True), ((3, 16, 256), 2, False), ((50, 256), 1, True),
])  # fmt: skip
def test_pieces_of_a_tensor_are_edited_in_place_and_taken_back(
    dtype: str, shape: tuple[int, ...], axis: int, keep_norms: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PANEL", 64 * 256)
    tensor = info(dtype, shape, offset=64)
    matrices, along_rows = pieces(tensor, axis), storage.by_rows(tensor, axis)
    assert len(matrices) == (1 if along_rows else 2 * int(np.prod(shape[:-2])))
    content = stored(dtype, (int(np.prod(shape[:-1])), shape[-1]))
    base = b"x" * 64 + content.tobytes() + b"y" * 32
    matrix = storage.whole(tensor)
    assert matrix is not None and matrix.rows * matrix.row_bytes == tensor.nbytes
    removal = Removal(basis(2, shape[axis]), 0.9, keep_norms)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(base)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("r+b") as b:
        with closing(Sidecar(tmp_path / "way")) as sidecar:
            for i, matrix in enumerate(matrices):
                project = move_rows if along_rows else move_columns
                removed = project(matrix, a.fileno(), b.fileno(), removal, sidecar.piece(0, i, matrix))
                assert removed.left < 0.02**2 * removed.removed
            sidecar.finish()
        edited = (tmp_path / "b").read_bytes()
        assert edited != base and len(edited) == len(base) and edited[:64] + edited[-32:] == base[:64] + base[-32:]
        shared: dict[int, Any] = {}
        kept = 0
        for record in read_records(tmp_path / "way", [matrices]):
            matrix = matrices[record.piece]
            if not len(record.rows):
                shared[record.piece] = record.factor, record.scale
                continue
            kept += len(record.where)
            before = restore(matrix, record, *shared[record.piece], matrix.read(b.fileno(), record.rows))
            matrix.write(b.fileno(), record.rows, before)
    assert (tmp_path / "b").read_bytes() == base
    differ = np.count_nonzero(np.frombuffer(base, np.uint8) != np.frombuffer(edited, np.uint8))
    assert kept < 0.5 * differ  # the others are told by the factors


def test_types_whose_codes_stand_for_several_numbers_are_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match=r"'w' is stored as IQ2_XS.*--requantize"):
        pieces(TensorInfo("w", "IQ2_XS", (256, 256), "a", 0, 100), 0)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("dtype", ["Q4_K", "Q5_0", "MXFP4"])
def test_numbers_of_another_type_are_encoded_without_the_direction(dtype: str, by_rows: bool, tmp_path: Path) -> None:
    codec, d, rows = Blocks(dtype), basis(2), np.arange(N)
    base = np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)
    plain = base - (base @ d) @ d.T if by_rows else base - d @ (d.T @ base)
    exact = plain.copy()
    codec.round(plain, rows)
    (tmp_path / "a").write_bytes(base.tobytes())
    (tmp_path / "b").write_bytes(bytes(N * codec.row_bytes(M)))
    old, new = Matrix("w", "a", 0, N, M, Plain("F32")), Matrix("w", "b", 0, N, M, codec)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("r+b") as b:
        told = encode(old, new, a.fileno(), b.fileno(), Removal(d), by_rows)
        ours = new.values(b.fileno(), rows)
    left, at_once = (float(np.linalg.norm(w @ d if by_rows else d.T @ w)) for w in (ours, plain))
    assert left < 0.05 * at_once and np.linalg.norm(ours - exact) < 1.1 * np.linalg.norm(plain - exact)
    assert np.sqrt(told.left) == pytest.approx(left, rel=0.1)
