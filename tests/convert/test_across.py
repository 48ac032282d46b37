"""A direction is of the stream, which is the same in every format: one found on a folder edits its GGUF, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from abliterate.checkpoint import open_checkpoint
from abliterate.convert.to_gguf import to_gguf
from abliterate.convert.to_safetensors import to_safetensors
from abliterate.direction.direction import Direction
from abliterate.verbs import edit
from tests.convert.test_to_safetensors import worded
from tests.llama import Llama

Tiny = Callable[..., Path]
WIDTH, IDS = 32, [3, 5, 7, 9, 11, 13]


def along(folder: Path, r: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """The largest component of the stream along a direction, in any layer, as a share of the stream."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        stream = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states[:-1]
    return max(float((h @ torch.from_numpy(r)).abs().max() / h.norm(dim=-1).max()) for h in stream)


def test_one_direction_edits_a_folder_and_its_gguf_alike(tiny: Tiny, tmp_path: Path) -> None:
    """Whichever comes first, the conversion or the edit, and whichever format the direction's file was used on."""
    base = worded(tiny("mistral", dtype=torch.float32, vocab_size=320), tmp_path)
    r = np.random.default_rng(4).normal(size=WIDTH).astype(np.float32)
    r /= np.linalg.norm(r)
    Direction(r, 1, -1, 1.0).save(tmp_path / "d.safetensors")
    to_gguf(open_checkpoint(base), tmp_path / "base.gguf", "f32")
    edit(str(base), tmp_path / "d.safetensors", tmp_path / "folder", undo=False)
    kept = tmp_path / "folder" / "abliteration" / "directions.safetensors"
    edit(str(tmp_path / "base.gguf"), kept, tmp_path / "edited.gguf")
    to_gguf(open_checkpoint(tmp_path / "folder"), tmp_path / "converted.gguf", "f32")
    back = tmp_path / "back"
    back.mkdir()
    to_safetensors(open_checkpoint(tmp_path / "edited.gguf"), back, "f32")
    assert along(base, r) > 0.1
    assert along(tmp_path / "folder", r) < 1e-5 and along(back, r) < 1e-5
    before, edited, converted = (
        Llama(tmp_path / f"{name}.gguf").logits(IDS) for name in ("base", "edited", "converted")
    )
    assert np.allclose(edited, converted, atol=1e-2) and np.abs(edited - before).max() > 0.3
