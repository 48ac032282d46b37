"""What is found of a GGUF is right: projected, and loaded by transformers, its stream has none of the direction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate import at_rest
from abliterate.checkpoint import open_checkpoint
from abliterate.edit.writers import ResidualWriter, residual_writers
from tests import gguf_files as g

R = np.random.default_rng(5).normal(size=g.D_MODEL)
R /= np.linalg.norm(R)
FILES: dict[str, tuple[list[dict[str, tuple[int, ...]]], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "llama": ([g.LLAMA] * 2, {}, {"llama__rope__dimension_count": 8}),
    "qwen2": ([g.QWEN2] * 2, {}, {}),
    "gemma2": ([g.GEMMA2] * 2, {}, {"gemma2__attention__key_length": 8}),
    # Which of its layers are of which kind its sizes say, so it is learned by experiment.
    "lfm2": (
        [g.CONVOLUTION, g.ATTENTION],
        {},
        {"heads": [0, 4], "lfm2__shortconv__l_cache": 3, "lfm2__rope__freq_base": 1e4},
    ),
    "gpt2": ([g.GPT2] * 2, {"position_embd.weight": (1024, g.D_MODEL)}, {}),
    "bloom": ([g.GPT2] * 2, {"token_embd_norm.weight": (g.D_MODEL,), "token_embd_norm.bias": (g.D_MODEL,)}, {}),
}


def project(path: Path, writers: list[ResidualWriter]) -> None:
    """Take the direction out of a file's writers, all of which are float32."""
    tensors = open_checkpoint(path).tensors

    def stored(name: str) -> Any:
        t = tensors[name]
        return np.memmap(path, np.float32, "r+", offset=t.offset, shape=t.shape)

    gains = {w.gain: np.array(stored(w.gain), np.float64) for w in writers if w.gain is not None}
    for w in writers:
        d = R * (1 if w.gain is None else gains[w.gain] + w.gain_offset)
        d -= d.mean() if w.centred else 0
        d /= np.linalg.norm(d)
        values = np.moveaxis(stored(w.tensor), w.axis, -1)
        values -= ((values @ d)[..., None] * d).astype(np.float32)


def share(path: Path) -> float:
    """The largest share of the direction in the stream of the model that transformers loads from a file."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        stream = model(torch.arange(20).reshape(2, 10), output_hidden_states=True).hidden_states[:-1]
    r = torch.from_numpy(R).float()
    return max(float((h @ r).abs().max() / h.norm(dim=-1).max()) for h in stream)


@pytest.mark.parametrize("architecture", FILES)
def test_the_direction_is_gone_where_transformers_loads_the_file(architecture: str, tmp_path: Path) -> None:
    blocks, outside, stated = FILES[architecture]
    path = g.tiny_gguf(tmp_path / "x.gguf", architecture, blocks, outside, **stated)
    raw, writers = path.read_bytes(), residual_writers(open_checkpoint(path))
    assert share(path) > 0.1
    np.save(tmp_path / "r.npy", R)
    at_rest.edit(str(path), tmp_path / "r.npy", tmp_path / "edited.gguf")
    assert share(tmp_path / "edited.gguf") < 1e-5
    project(path, [w for w in writers if w.tensor != "blk.0.ffn_down.weight"])
    assert share(path) > 1e-3
    if architecture == "gemma2":  # a gain to which 1 was added twice
        path.write_bytes(raw)
        project(path, [replace(w, gain_offset=w.gain_offset + w.gain_included) for w in writers])
        assert share(path) > 1e-3
