"""ggml's block types: every bit has its place, numbers are those that ggml and the `gguf` package read."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.checkpoint import ggml
from abliterate.checkpoint.codecs import Raw
from abliterate.checkpoint.ggml_blocks import LAYOUTS, Blocks
from abliterate.errors import UnsupportedError

TYPES = st.sampled_from(list(LAYOUTS))


def any_bytes(dtype: str, rows: int, seed: int) -> Raw:
    codec = Blocks(dtype)
    return np.random.default_rng(seed).integers(0, 256, (rows, codec.row_bytes(512)), dtype=np.uint8)


@settings(max_examples=60, deadline=None)
@given(dtype=TYPES, rows=st.integers(1, 5), seed=st.integers(0, 999))
def test_any_bytes_are_read_as_ggml_reads_them_and_written_back_as_they_were(dtype: str, rows: int, seed: int) -> None:
    codec, raw = Blocks(dtype), any_bytes(dtype, rows, seed)
    grid = codec.grid(raw)
    assert np.array_equal(codec.packed(grid.numbers, raw), raw)
    # What is written depends on the numbers alone where codes lie, and not at all where scales lie.
    other = any_bytes(dtype, rows, seed + 1)
    again = codec.grid(codec.packed(grid.numbers, other))
    assert np.array_equal(again.numbers, grid.numbers)
    with np.errstate(all="ignore"):
        assert np.array_equal(again.step, codec.grid(other).step, equal_nan=True)
        theirs = dequantize(raw, GGMLQuantizationType[dtype])
    assert np.array_equal(grid.values(), ggml.decode(raw, dtype, 512), equal_nan=True)
    assert np.array_equal(grid.values(), theirs, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(dtype=TYPES, seed=st.integers(0, 999), wide=st.floats(0.1, 300))
def test_numbers_go_to_the_nearest_level_and_to_those_beside_it(dtype: str, seed: int, wide: float) -> None:
    codec = Blocks(dtype)
    numbers = (np.random.default_rng(seed).normal(size=(9, 64)) * wide).astype(np.float32)
    distances = np.abs(numbers[..., None].astype(np.float64) - codec.levels)
    codec.nearest(numbers)
    assert np.array_equal(np.abs(distances).min(axis=-1), np.take_along_axis(
        distances, np.searchsorted(codec.levels, numbers)[..., None], axis=-1)[..., 0])  # fmt: skip
    place = np.searchsorted(codec.levels, numbers)
    for towards in (-2.0, 0.0, 0.5):
        beside = codec.beside(numbers, np.full_like(numbers, towards))
        expected = np.clip(place + int(np.sign(towards)), 0, len(codec.levels) - 1)
        assert np.array_equal(beside, codec.levels[expected])


@pytest.mark.parametrize("dtype", LAYOUTS)
def test_what_the_encoder_stores_reads_close_to_what_it_was_given(dtype: str) -> None:
    codec, rows = Blocks(dtype), np.arange(8)
    values = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    stored = values.copy()
    raw = codec.round(stored, rows)
    assert raw.shape == (8, codec.row_bytes(512)) and np.array_equal(stored, codec.decode(raw, rows))
    assert np.linalg.norm(stored - values) < {"Q2_K": 0.35, "Q3_K": 0.18}.get(dtype, 0.13) * np.linalg.norm(values)
    assert np.array_equal(codec.words(stored, rows, raw), raw)
    assert not np.array_equal(codec.words(stored * 0.5, rows, raw), raw)


def test_what_cannot_be_encoded_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    values: Any = np.zeros((2, 512), np.float32)
    for dtype in ggml.NEED_IMPORTANCE:
        with pytest.raises(UnsupportedError, match=rf"{dtype}.*importance matrix.*--requantize"):
            ggml.encode(values, dtype, 0)
    with pytest.raises(UnsupportedError, match=r"rows of 96 numbers.*blocks of 256"):
        ggml.encode(values[:, :96], "Q4_K", 0)
    ggml.library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UnsupportedError, match=r"xllamacpp.*abliterate\[gguf\]"):
        ggml.encode(values, "Q4_K", 0)
