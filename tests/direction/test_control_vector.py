"""Control vectors: llama.cpp adds what the direction file says, where it says, and an edit takes the same out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from abliterate.direction.control_vector import control_vector, read_control_vector
from abliterate.direction.direction import Direction
from abliterate.direction.given import load_given
from abliterate.errors import AbliterateError, CheckpointError, UnsupportedError, UsageError
from abliterate.export import export
from abliterate.verbs import edit
from tests import gguf_files as g
from tests.llama import Llama

Tiny = Callable[..., Path]
WIDTH = g.D_MODEL


def units(n: int, seed: int = 3) -> np.ndarray[Any, np.dtype[np.float32]]:
    found = np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def repeng(path: Path, vectors: dict[int, Any]) -> Path:
    """A file as repeng lays it out: from the last layer to the first, the first of all left out."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in sorted(vectors.items(), reverse=True):
        writer.add_tensor(f"direction.{layer}", vector)
    return g.finish(writer)


def rows(path: Path, n_layers: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What llama.cpp makes of a file: `[n_layers - 1, d_model]`, zeros where it has no direction."""
    reader, found = gguf.GGUFReader(path), np.zeros((n_layers - 1, WIDTH), np.float32)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.layer_count"].contents() == len(reader.tensors)
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        found[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
    return found


def test_llama_cpp_adds_the_gap_behind_the_layer_where_it_was_found(tmp_path: Path) -> None:
    """Held against transformers on the same file, to whose stream the same is added there by a hook."""
    n_layers, r = 3, units(1)[0]
    stated = {"llama__rope__dimension_count": 8, "tokenizer__ggml__model": "no_vocab"}
    model = g.tiny_gguf(tmp_path / "m.gguf", "llama", [g.LLAMA] * n_layers, **stated)
    Direction(r, 1, -1, 2.5).save(tmp_path / "d.safetensors")
    found = export(tmp_path / "d.safetensors", tmp_path / "v.gguf")
    assert found.vectors == [{"layer": 1, "length": pytest.approx(2.5)}] and found.model_type == "unknown"
    added = rows(tmp_path / "v.gguf", n_layers)
    assert not added[1].any() and np.allclose(added[0], 2.5 * r)
    llama, tokens = Llama(model), [3, 5, 7, 9]
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=model.name, dtype=torch.float32)
    base = llama.logits(tokens)
    for scale in (0.0, 1.0, -1.0):
        llama.add(added * np.float32(scale))
        logits = {layer: steered(reference, tokens, layer, 2.5 * scale * r) for layer in range(n_layers)}
        assert np.allclose(llama.logits(tokens), logits[1], atol=0.01)
        assert not scale or min(np.abs(logits[1] - other).max() for other in (base, logits[0], logits[2])) > 0.1
    llama.add(None)
    assert np.array_equal(llama.logits(tokens), base)


def steered(model: Any, tokens: list[int], layer: int, vector: Any) -> Any:
    """The logits behind the last token, with a vector added behind a block."""
    shift = torch.from_numpy(vector).float()
    hook = model.model.layers[layer].register_forward_hook(lambda _m, _i, out: out + shift)
    with torch.no_grad():
        found = model(torch.tensor([tokens])).logits[0, -1].numpy()
    hook.remove()
    return found


def test_every_kind_of_direction_becomes_what_is_added(tmp_path: Path) -> None:
    a, b = units(2)
    one = Direction(a, 2, -1, 3.0)
    assert {k: v.tolist() for k, v in control_vector(one).items()} == {2: (np.float32(3) * a).tolist()}
    assert [*control_vector(one, layer=5, length=0.5)] == [5]
    assert np.allclose(control_vector(one, 5, 0.5)[5], 0.5 * a)
    parts = [{"layer": 1, "scale": 2.0}, {"layer": 3, "scale": 4.0}]
    several = replace(one, vector=np.stack([a, b]), parts=parts)
    assert {k: float(np.linalg.norm(v)) for k, v in control_vector(several).items()} == pytest.approx({1: 2.0, 3: 4.0})
    assert np.allclose(control_vector(several, layer=2)[2], 2 * a + 4 * b)
    own = replace(one, vector=b, layers=np.stack([a, a, b, a]))
    assert np.allclose(control_vector(own)[2], 3 * b) and np.allclose(control_vector(own, 1)[1], 3 * a)
    basis = Direction(np.stack([a, b]), None, None, 1.0)
    assert np.allclose(control_vector(basis, 4, 2.0)[4], 2 * (a + b))
    for wrong, layer, words in ((own, 4, "0 to 3"), (basis, None, "--layer"), (replace(one, layer=0), None, "layer 0")):
        with pytest.raises(UsageError, match=words):
            control_vector(wrong, layer)


def test_a_run_is_exported_with_the_kind_of_its_model(finished: tuple[Any, Path], tmp_path: Path) -> None:
    folder = finished[1]
    known = Direction.load(folder / "abliteration" / "directions.safetensors")
    for i, path in enumerate((folder, folder / "abliteration", folder / "abliteration" / "run.json")):
        found = export(path, tmp_path / f"{i}.gguf")
        assert found.model_type == "llama" and found.vectors[0]["layer"] == known.layer
        assert found.vectors[0]["length"] == pytest.approx(known.scale)
    again = load_given(tmp_path / "0.gguf")
    assert np.allclose(again.vector, known.vector, atol=1e-6) and again.scale == pytest.approx(known.scale)


def test_an_edit_takes_out_what_a_file_of_repeng_holds_by_layer(tiny: Tiny, tmp_path: Path) -> None:
    vectors, base = units(2), tiny("llama", dtype=torch.float32)
    given = repeng(tmp_path / "repeng.gguf", {1: 3 * vectors[0], 2: vectors[1]})
    found = load_given(given)
    assert found.layers is not None and np.allclose(found.layers, vectors[[0, 0, 1]])
    assert np.allclose(found.vector, vectors[0]) and found.scale == pytest.approx(3.0)
    assert np.allclose(load_given(given, 2).vector, vectors[1]) and load_given(given, 2).layers is None
    for name, layer, gone in (("own", None, [0, 0, 1]), ("one", 2, [1, 1, 1])):
        edit(str(base), given, tmp_path / name, undo=False, layer=layer)
        tensors = load_file(tmp_path / name / "model.safetensors")
        for i, which in enumerate(gone):
            along = vectors @ tensors[f"model.layers.{i}.mlp.down_proj.weight"]
            left = np.abs(along).max(axis=1)
            assert left[which] < 1e-5 < 0.1 < left[1 - which]


def test_files_that_say_nothing_clear_are_refused(tmp_path: Path) -> None:
    a, b = units(2)
    gap = repeng(tmp_path / "gap.gguf", {1: a, 3: b})
    with pytest.raises(UsageError, match=r"no direction of layer 2.*--layer"):
        load_given(gap)
    with pytest.raises(UsageError, match="layers 1, 3"):
        load_given(gap, 2)
    assert np.allclose(load_given(gap, 3).vector, b)
    damaged: dict[str, tuple[Any, str]] = {
        "zero": ({1: 0 * a}, "holds no directions"),
        "first": ({0: a}, "from N = 1"),
        "wide": ({1: np.stack([a, b])}, "F32 .d_model"),
        "half": ({1: a.astype(np.float16)}, "F16"),
        "nan": ({1: a * np.nan}, "NaN"),
        "uneven": ({1: a, 2: b[:16]}, "several widths"),
    }
    for name, (vectors, words) in damaged.items():
        with pytest.raises(CheckpointError, match=words):
            read_control_vector(repeng(tmp_path / f"{name}.gguf", vectors))
    with pytest.raises(UnsupportedError, match="a GGUF of 'llama'"):
        load_given(g.tiny_gguf(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match=r"missing\.gguf"):
        load_given(tmp_path / "missing.gguf")


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    Direction(units(1)[0], 1, -1, 1.0).save(file)
    (tmp_path / "there.gguf").touch()
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("v.gguf", {"format": "lora"}, "control-vector"), ("v.gguf", {"scale": 0.0}, "adds nothing"),
        ("v.bin", {}, r"ends in \.gguf"), ("there.gguf", {}, "exists already"), ("v.gguf", {"layer": 0}, "layer 0"),
    ]  # fmt: skip
    for name, options, words in wrong:
        with pytest.raises(AbliterateError, match=words):
            export(file, tmp_path / name, **options)
    with pytest.raises(CheckpointError, match="no such file"):
        export(tmp_path / "nowhere", tmp_path / "v.gguf")
    assert {p.name for p in tmp_path.iterdir()} == {"d.safetensors", "there.gguf"}
