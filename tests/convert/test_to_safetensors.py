"""A GGUF becomes a folder that transformers loads, with the numbers that llama.cpp has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.ggml import decode
from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.convert.to_gguf import to_gguf
from abliterate.convert.to_safetensors import to_safetensors
from abliterate.errors import UnsupportedError, UsageError
from tests import gguf_files as g
from tests.convert.test_to_gguf import trained
from tests.llama import Llama

Tiny = Callable[..., Path]
STRETCHED = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def worded(base: Path, root: Path) -> Path:
    """A folder whose tokenizer has merges, without which transformers reads none from a GGUF."""
    return trained(root / "base", pre_tokenizers.ByteLevel(add_prefix_space=False), base, size=300)


@pytest.mark.parametrize(("family", "config"), [("llama", {"rope_parameters": STRETCHED}), ("qwen2", {"tied": True})])
def test_a_folder_comes_back_as_what_it_was(family: str, config: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    base = worded(tiny(family, dtype=torch.float32, vocab_size=320, **config), tmp_path)
    file, folder = tmp_path / "x.gguf", tmp_path / "back"
    to_gguf(open_checkpoint(base), file, "f32")
    folder.mkdir()
    to_safetensors(open_checkpoint(file), folder, "f32")
    first, second = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (base, folder))
    assert {n: torch.equal(p, second.get_parameter(n)) for n, p in first.named_parameters()} == dict.fromkeys(
        dict(first.named_parameters()), True
    )
    assert not (folder / "config.json").read_text().count("quantization_config")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(first(ids).logits, second(ids).logits, atol=1e-5)
    chat = [{"role": "user", "content": "Where is 1234?"}]
    texts = [AutoTokenizer.from_pretrained(f).apply_chat_template(chat, return_dict=False) for f in (base, folder)]
    assert texts[0] == texts[1]


def test_blocks_become_the_numbers_that_llama_cpp_computes_with(tiny: Tiny, tmp_path: Path) -> None:
    file, folder = tmp_path / "x.gguf", tmp_path / "back"
    base = worded(tiny("mistral", dtype=torch.float32, vocab_size=320), tmp_path)
    to_gguf(open_checkpoint(base), file, "q8_0")
    folder.mkdir()
    to_safetensors(open_checkpoint(file), folder, "f32")
    ids = [3, 5, 7, 9, 11]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(Llama(file).logits(ids) - logits).max() / logits.std() < 0.3  # llama.cpp rounds activations too
    tensor = read_gguf(file).tensors["blk.1.ffn_up.weight"]
    raw = np.fromfile(file, np.uint8, tensor.nbytes, offset=tensor.offset).reshape(tensor.shape[0], -1)
    stored = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert np.array_equal(decode(raw, "Q8_0", tensor.shape[1]), stored)
    assert {t.dtype for t in open_checkpoint(folder).tensors.values()} == {"F32"}


def test_what_transformers_would_read_otherwise_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    file, folder = tmp_path / "x.gguf", tmp_path / "back"
    odd = tiny("llama", vocab_size=320, rope_parameters=STRETCHED | {"factor": 5.0})
    to_gguf(open_checkpoint(worded(odd, tmp_path)), file, "bf16")
    folder.mkdir()
    with pytest.raises(UnsupportedError, match="not Llama's"):
        to_safetensors(open_checkpoint(file), folder)
    with pytest.raises(UsageError, match="--type int8"):
        to_safetensors(open_checkpoint(file), folder, "int8")
    unknown = g.tiny_gguf(tmp_path / "u.gguf", "plamo", [g.LLAMA])
    with pytest.raises(UnsupportedError, match="'plamo': transformers cannot load it"):
        to_safetensors(open_checkpoint(unknown), folder)
    assert not list(folder.iterdir())
