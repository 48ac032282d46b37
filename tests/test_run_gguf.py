"""`run` from a GGUF to a GGUF: found by transformers, taken out where it lies, measured in llama.cpp, taken back."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import abliterate
from abliterate import verbs
from abliterate.checkpoint import open_checkpoint
from abliterate.errors import UsageError
from tests.cli.test_main import run_here
from tests.gguf_files import chat_gguf

Tiny = Callable[..., Path]
#: A random model declines nothing, so what is found of it is what tells both sets apart.
ANY = {"force": True, "layer": 1, "position": -1, "limit": 8, "max_new_tokens": 4, "tune": False}


def test_a_gguf_is_run_from_start_to_end(tiny: Tiny, tmp_path: Path) -> None:
    base = chat_gguf(tmp_path / "base.gguf", tiny("llama", seed=0, dtype=torch.float32, vocab_size=263))
    (tmp_path / "text.txt").write_text("Some of this and some of that. " * 70)
    out, given = tmp_path / "out.gguf", ANY | {"text": str(tmp_path / "text.txt"), "dtype": "float32", "device": "cpu"}
    record = abliterate.run(str(base), out, engine="llama.cpp", **given)
    figures = {m["name"]: m for m in record.metrics}
    assert record.resolved["engine"] == "llama.cpp" and "leak" not in figures
    assert figures["kl_first_token"]["edited"] > 10 * abs(figures["kl_first_token"]["base"])
    assert {p.name for p in tmp_path.iterdir()} == {"base.gguf", "text.txt", "out.gguf", "out.abliteration"}
    assert run_here("report", str(out), "-o", str(tmp_path / "page.html")) == 0
    verbs.undo(str(out), tmp_path / "back.gguf")
    bytes_of = [sha256(path.read_bytes()).digest() for path in (base, tmp_path / "back.gguf", out)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
    shown = abliterate.run(str(base), tmp_path / "shown.gguf", undo=False, **given)
    leak = next(m for m in shown.metrics if m["name"] == "leak")
    assert leak["edited"] < 1e-4 < 1e-2 < leak["base"] and shown.resolved["engine"] == "transformers"
    assert open_checkpoint(tmp_path / "shown.gguf").tensors.keys() == open_checkpoint(base).tensors.keys()


def test_a_gguf_becomes_a_gguf_and_a_folder_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama", seed=0, dtype=torch.float32, vocab_size=263)
    base = chat_gguf(tmp_path / "base.gguf", folder)
    with pytest.raises(UsageError, match=r"of a GGUF comes a GGUF; choose a name that ends in \.gguf"):
        abliterate.run(str(base), tmp_path / "out", **ANY)
    with pytest.raises(UsageError, match=r"comes a folder; leave out '\.gguf'"):
        abliterate.run(str(folder), tmp_path / "out.gguf", **ANY)
