"""OUT in the other format: the base is converted, then edited, and `undo` gives what it was converted to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

import abliterate
from abliterate import at_rest, formats, verbs
from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.ggml import llama_cpp
from abliterate.convert.to_gguf import to_gguf
from abliterate.convert.to_safetensors import to_safetensors
from abliterate.edit import apply
from abliterate.edit.plan import plan_edit
from abliterate.errors import AbliterateError, ResourceError, UnsupportedError, UsageError, VerifyError
from tests.convert.test_across import along
from tests.convert.test_to_safetensors import worded
from tests.llama import Llama

Tiny = Callable[..., Path]
R = np.random.default_rng(4).normal(size=32).astype(np.float32)
R /= np.linalg.norm(R)
IDS = [3, 5, 7, 9, 11, 13]


class Stop(BaseException):
    """A process that is killed."""


@pytest.fixture(scope="module")
def root(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `base`, the same as `base.gguf` in Q8_0, and a direction; no test writes to them."""
    path = tmp_path_factory.mktemp("formats")
    base = worded(tiny("llama", seed=0, dtype=torch.float32, vocab_size=320), path)
    to_gguf(open_checkpoint(base), path / "base.gguf", "q8_0")
    np.save(path / "r.npy", R)
    return path


def leak(file: Path) -> float:
    """The largest share along the direction of a tensor that writes to the stream."""
    shares = []
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name.startswith("token_embd") or "_output.w" in tensor.name or "_down" in tensor.name:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            found = values @ R if "embd" in tensor.name else R @ values
            shares.append(float(np.linalg.norm(found) / np.linalg.norm(values)))
    assert len(shares) == 7
    return max(shares)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def edit(root: Path, model: str, out: Path, **options: Any) -> Any:
    return verbs.edit(str(root / model), root / "r.npy", out, **options)


def test_a_folder_becomes_an_edited_gguf(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    record = edit(root, "base", out, format="gguf", type="q8_0")
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf", "out.abliteration"}
    assert record.model_fingerprint == open_checkpoint(root / "base").fingerprint and record.converted == "q8_0"
    assert "converted to q8_0 first" in (tmp_path / "out.abliteration" / "README.md").read_text()
    verbs.undo(str(out), tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == (root / "base.gguf").read_bytes()
    before, after = (Llama(file).logits(IDS) for file in (root / "base.gguf", out))
    assert np.isfinite(after).all() and np.abs(after - before).max() > 0.1
    # The control: quantised after the edit, much of the direction is back.
    edit(root, "base", tmp_path / "folder", undo=False)
    to_gguf(open_checkpoint(tmp_path / "folder"), tmp_path / "late.gguf", "q8_0")
    assert leak(root / "base.gguf") > 0.1 and leak(out) < leak(tmp_path / "late.gguf") / 10 < 1e-3


def test_a_gguf_becomes_an_edited_folder(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = edit(root, "base.gguf", out, format="safetensors", type="f32")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not list(out.rglob("steps"))
    assert record.model_fingerprint == open_checkpoint(root / "base.gguf").fingerprint
    (tmp_path / "decoded").mkdir()
    to_safetensors(open_checkpoint(root / "base.gguf"), tmp_path / "decoded", "f32")
    assert along(tmp_path / "decoded", R) > 0.1 and along(out, R) < 1e-5
    verbs.undo(str(out), tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "decoded")
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "tokenizer_config.json").read_text()


def test_what_is_killed_goes_on_and_never_edits_half_a_base(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options, converted = tmp_path / "out.gguf", {"format": "gguf", "type": "q8_0"}, list[str]()

    def half(checkpoint: Any, file: Path, *_: Any) -> None:
        file.write_bytes((root / "base.gguf").read_bytes()[:-999])
        raise Stop

    def counted(checkpoint: Any, file: Path, *rest: Any) -> None:
        converted.append(file.name)
        to_gguf(checkpoint, file, *rest)

    def stop(*_: Any) -> None:
        raise Stop

    for where, name, to in ((formats, "to_gguf", half), (apply, "ShardEdit", stop)):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(formats, "to_gguf", counted)
            patch.setattr(where, name, to)
            edit(root, "base", out, resume=True, **options)
        assert [p.name for p in tmp_path.iterdir()] == ["out.gguf.partial"]
    monkeypatch.setattr(formats, "to_gguf", counted)
    edit(root, "base", out, resume=True, **options)
    assert converted == ["unfinished.gguf"] and {p.name for p in tmp_path.iterdir()} == {out.name, "out.abliteration"}
    verbs.undo(str(out), tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == (root / "base.gguf").read_bytes() != out.read_bytes()


def test_room_and_change_of_the_base_are_checked(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    with monkeypatch.context() as patch, pytest.raises(ResourceError):

        def full(_folder: Path, nbytes: int) -> None:
            asked.append(nbytes)
            raise ResourceError("full")

        patch.setattr(formats, "require_disk", full)
        edit(root, "base", tmp_path / "out.gguf", format="gguf", type="q8_0")
    assert asked[0] > 1.8 * open_checkpoint(root / "base.gguf").nbytes and not list(tmp_path.iterdir())

    def changed(*_: Any) -> None:
        raise VerifyError("changed while the model was read")

    monkeypatch.setattr("abliterate.checkpoint.opened.Checkpoint.require_unchanged", changed)
    with pytest.raises(VerifyError, match="changed while"):
        edit(root, "base", tmp_path / "out.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_strengths_found_in_a_folder_have_their_places_in_its_gguf(root: Path) -> None:
    plans = [plan_edit(open_checkpoint(root / name)) for name in ("base", "base.gguf")]
    assert len(plans[0].places) == 7 and plans[0].places == plans[1].places and plans[0].sites == plans[1].sites


def test_a_gguf_that_cannot_be_measured_is_named_before_the_work(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not load a GGUF of architecture 'olmo2'; leave it out"):
        given = {"format": "gguf", "engine": "transformers", "limit": 8, "tune": False}
        abliterate.run(str(tiny("olmo2")), tmp_path / "out.gguf", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("model", "out", "options", "words"), [
    ("base", "o", {"format": "gguf"}, "--output .*: with --format gguf comes a GGUF"),
    ("base", "o.gguf", {}, "or add --format gguf"),
    ("base.gguf", "o", {}, "or add --format safetensors"),
    ("base.gguf", "o.gguf", {"format": "safetensors"}, "--format safetensors comes a folder"),
    ("nowhere", "o.gguf", {"format": "gguf", "type": "q9"}, "--type q9: --format gguf takes f32, f16, bf16, q8_0"),
    ("nowhere", "o", {"format": "safetensors", "type": "q8_0"}, "--format safetensors takes bf16, f16, f32"),
    ("base", "o", {"type": "bf16"}, "--type bf16: .*add --format"),
    ("base", "o", {"format": "onnx"}, "--format onnx: expected checkpoint, adapter, gguf, safetensors"),
    ("base.gguf", "o.gguf", {"format": "gguf", "type": "q4_k_m"}, "is stored as q8_0, .* safetensors checkpoint"),
    ("base", "o", {"format": "safetensors", "type": "bf16"}, "is stored as f32, .*leave it out"),
    ("base", "o.gguf", {"format": "gguf", "requantize": "Q4_K"}, "--requantize Q4_K: .*leave it out"),
    ("base", "o.gguf", {"format": "gguf", "embeddings": "untie"}, "--embeddings untie: a GGUF"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(
    model: str, out: str, options: dict[str, Any], words: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(AbliterateError, match=words) as refused:
        edit(root, model, tmp_path / out, **options)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_the_format_that_a_model_has_is_the_default(root: Path, tmp_path: Path) -> None:
    record = edit(root, "base.gguf", tmp_path / "o.gguf", format="gguf", type="q8_0")
    assert record.converted is None
    edit(root, "base.gguf", tmp_path / "same.gguf")
    assert (tmp_path / "o.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()
    edit(root, "base", tmp_path / "o", format="safetensors", type="f32", undo=False)
    assert (tmp_path / "o" / "model.safetensors").is_file()


def test_a_run_measures_what_was_edited(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some of this and some of that. " * 70)
    given = {
        "force": True, "layer": 1, "position": -1, "limit": 8, "max_new_tokens": 4, "tune": False,
        "text": str(tmp_path / "text.txt"), "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"--engine llama\.cpp: runs GGUF files, and OUT is a folder"):
        abliterate.run(str(root / "base"), tmp_path / "o", engine="llama.cpp", **given)
    record = abliterate.run(str(root / "base"), tmp_path / "o.gguf", format="gguf", type="q8_0", **given)
    figures = {m["name"]: m for m in record.metrics}
    assert record.resolved["engine"] == "llama.cpp" and record.converted == "q8_0"
    assert figures["kl_first_token"]["edited"] > 10 * abs(figures["kl_first_token"]["base"])
    assert record.model_fingerprint == open_checkpoint(root / "base").fingerprint
    assert not record.direction_from_elsewhere
    record = abliterate.run(str(root / "base.gguf"), tmp_path / "o", format="safetensors", type="f32", **given)
    found = next(m for m in record.metrics if m["name"] == "leak")
    assert found["edited"] < 1e-4 < 1e-2 < found["base"] and record.resolved["engine"] == "transformers"


@pytest.mark.parametrize(("lacking", "to"), [("gguf", "gguf"), ("gguf", "safetensors"), ("xllamacpp", "gguf")])
def test_without_the_extra_nothing_is_begun(
    root: Path, lacking: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, lacking, None)
    llama_cpp.cache_clear()
    source, out = (root / "base", "out.gguf") if to == "gguf" else (root / "base.gguf", "out")
    with pytest.raises(UnsupportedError, match=rf"{lacking}.*: pip install 'abliterate\[gguf\]'"):
        at_rest.edit(str(source), root / "r.npy", tmp_path / out, format=to)
    assert not list(tmp_path.iterdir())
