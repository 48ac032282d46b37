"""The theorem, for every family: hooks equal weights, the stream loses the direction, nothing else changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate.checkpoint import matrix, open_checkpoint
from abliterate.edit import projection
from abliterate.edit.apply import THREADS, apply_edit
from abliterate.edit.plan import Embeddings, plan_edit
from abliterate.edit.shard import EditRecord
from abliterate.errors import UnsupportedError, VerifyError
from abliterate.model.hooks import ablate
from abliterate.model.load import load_model
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
IDS = torch.tensor([[0, 3, 40, 41, 42, 43, 5, 4, 31]])


def unit(d_model: int = 32, seed: int = 1) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """A random direction."""
    r = np.random.default_rng(seed).normal(size=d_model)
    return (r / np.linalg.norm(r)).astype(np.float32)


def edited(
    model: Path, out: Path, strength: float = 1.0, embeddings: Embeddings = "edit"
) -> tuple[Path, list[EditRecord]]:
    """The edited checkpoint and its records."""
    checkpoint = open_checkpoint(model)
    out.mkdir()
    return out, apply_edit(checkpoint, plan_edit(checkpoint, embeddings), unit(), out, strength)


def logits(folder: Path) -> torch.Tensor:
    """What plain transformers computes from a folder."""
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_edited_weights_compute_what_hooks_compute(
    family: str, tied: bool, strength: float, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(family, tied=tied, dtype=torch.float32)
    out, _ = edited(model, tmp_path / "out", strength)
    running = load_model(model, device="cpu", dtype="float32")
    sites = plan_edit(open_checkpoint(model)).sites
    with torch.inference_mode(), ablate(running, sites, torch.from_numpy(unit()), strength):
        hooked = running.model(IDS).logits
    with torch.inference_mode():
        after_hooks = running.model(IDS).logits
    base = logits(model)
    scale = base.abs().max()
    assert (logits(out) - hooked).abs().max() < 1e-4 * scale
    assert (base - hooked).abs().max() > 1e-2 * scale
    assert torch.equal(after_hooks, base)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_strength_for_every_place_is_the_same_in_hooks_and_weights(
    family: str, tied: bool, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(family, tied=tied, dtype=torch.float32)
    checkpoint = open_checkpoint(model)
    whole = plan_edit(checkpoint)
    places = sorted({w.place for w in whole.writers})
    strengths = {place: round(1.7 * ((7 * i) % len(places)) / len(places) - 0.3, 3) for i, place in enumerate(places)}
    strengths[places[-1]] = 0.0
    plan = whole.weighted(strengths)
    (tmp_path / "out").mkdir()
    records = apply_edit(checkpoint, plan, unit(), tmp_path / "out")
    running = load_model(model, device="cpu", dtype="float32")
    with torch.inference_mode():
        with ablate(running, plan.sites, torch.from_numpy(unit())):
            hooked = running.model(IDS).logits
        with ablate(running, whole.sites, torch.from_numpy(unit())):
            alike = running.model(IDS).logits
    scale = hooked.abs().max()
    assert (logits(tmp_path / "out") - hooked).abs().max() < 1e-4 * scale
    assert (alike - hooked).abs().max() > 1e-3 * scale
    assert {r.tensor: r.strength for r in records} == {w.tensor: strengths[w.place] for w in plan.writers}
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    left_alone = [w.tensor for w in whole.writers if w.place == places[-1]]
    assert left_alone and set(left_alone) == plan.kept.keys()
    assert all(torch.equal(before[name], after[name]) for name in left_alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_directions_with_a_strength_for_every_site_are_the_same_in_hooks_and_weights(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(family, tied=True, dtype=torch.float32)
    checkpoint = open_checkpoint(model)
    whole = plan_edit(checkpoint)
    basis = np.linalg.qr(np.stack([unit(seed=1), unit(seed=2)]).T)[0].T.astype(np.float32)
    strengths = {place: 0.2 + 0.1 * (i % 9) for i, place in enumerate(dict.fromkeys(whole.places))}
    (tmp_path / "out").mkdir()
    apply_edit(checkpoint, whole.weighted(strengths), basis, tmp_path / "out")
    running = load_model(model, device="cpu", dtype="float32")
    directions = torch.from_numpy(basis).requires_grad_()
    each = torch.tensor([strengths[place] for place in whole.places], requires_grad=True)
    with ablate(running, whole.sites, directions[None], each):
        hooked = running.model(IDS).logits
    with torch.no_grad(), ablate(running, whole.sites, directions[:1], each):
        with_one = running.model(IDS).logits
    hooked.square().mean().backward()
    scale = hooked.detach().abs().max()
    assert (logits(tmp_path / "out") - hooked).abs().max() < 1e-4 * scale
    assert (with_one - hooked).abs().max() > 1e-3 * scale
    assert directions.grad is not None and (directions.grad.norm(dim=-1) > 0).all()
    assert each.grad is not None and (each.grad != 0).all()


def test_strengths_of_a_deeper_model_are_refused(tiny: Tiny) -> None:
    plan = plan_edit(open_checkpoint(tiny("llama")))
    with pytest.raises(VerifyError, match=r"'99\.mlp\.down_proj'.*another model"):
        plan.weighted({"99.mlp.down_proj": 1.0})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_loses_the_direction_at_every_layer(family: str, tied: bool, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(family, tied=tied, dtype=torch.float32)
    out, records = edited(model, tmp_path / "out")
    r = torch.from_numpy(unit())

    def shares(folder: Path) -> torch.Tensor:
        running = load_model(folder, device="cpu", dtype="float32")
        with torch.inference_mode():
            # The last of them comes after the final norm, which scales the stream and may write along anything.
            states = running.model(IDS, output_hidden_states=True).hidden_states[:-1]
        return torch.stack([((h @ r).abs() / h.norm(dim=-1)).max() for h in states])

    assert shares(out).max() < 1e-5
    assert shares(model).min() > 1e-2
    assert all(e.leak < 1e-5 and e.norm_removed > 0 for e in records)
    assert len(records) == 1 + 2 * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_only_planned_tensors_change_and_by_the_formula(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(family, shard_size="20KB")
    out, records = edited(model, tmp_path / "out")
    checkpoint = open_checkpoint(model)
    planned = {w.tensor: w for w in plan_edit(checkpoint).writers}
    assert {e.tensor for e in records} == set(planned) and len(checkpoint.shards) > 1
    for shard in checkpoint.shards:
        before, after = (bytearray((p / shard).read_bytes()) for p in (model, out))
        for name, tensor in checkpoint.tensors.items():
            if tensor.file == shard and name in planned:
                assert (
                    before[tensor.offset : tensor.offset + tensor.nbytes]
                    != after[tensor.offset : tensor.offset + tensor.nbytes]
                )
                for raw in (before, after):
                    raw[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)
        assert before == after
    everything = {k: v for s in checkpoint.shards for k, v in load_file(model / s).items()}
    result = {k: v for s in checkpoint.shards for k, v in load_file(out / s).items()}
    for name, writer in planned.items():
        d = unit().astype(np.float64)
        if writer.gain:
            d = d * (everything[writer.gain].double().numpy() + writer.gain_offset)
            d /= np.linalg.norm(d)
        w = everything[name].double().numpy()
        exact = w - np.outer(w @ d, d) if writer.axis else w - np.outer(d, d @ w)
        rounded = torch.from_numpy(exact).to(torch.bfloat16).double().numpy()
        error, least = (np.linalg.norm(x - exact) for x in (result[name].double().numpy(), rounded))
        assert error < 1.6 * least < 0.05 * np.linalg.norm(exact - w)


def test_side_files_and_the_source_stay_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("qwen2", tied=True)
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in model.iterdir()}
    out, _ = edited(model, tmp_path / "out")
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in model.iterdir()} == before
    assert {p.name for p in out.iterdir()} == set(before)
    assert all(
        hashlib.sha256((out / n).read_bytes()).hexdigest() == h for n, h in before.items() if n != "model.safetensors"
    )


def test_biases_of_writers_lose_the_direction_too(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", attention_bias=True, mlp_bias=True, dtype=torch.float32)
    out, records = edited(model, tmp_path / "out")
    assert len(records) == 1 + 4 * 3
    r = torch.from_numpy(unit())
    for name in ("model.layers.1.self_attn.o_proj.bias", "model.layers.1.mlp.down_proj.bias"):
        with safe_open(model / "model.safetensors", "pt") as a, safe_open(out / "model.safetensors", "pt") as b:
            assert abs(a.get_tensor(name) @ r) > 1e-3 and abs(b.get_tensor(name) @ r) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_leak_is_rounding_of_the_storage_type(dtype: torch.dtype, tiny: Tiny, tmp_path: Path) -> None:
    _, records = edited(tiny("llama", dtype=dtype), tmp_path / "out")
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-6}[dtype]
    assert all(0 < e.leak < bound for e in records)


def test_strength_nought_leaves_every_byte(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    out, records = edited(model, tmp_path / "out", strength=0.0)
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert all(e.leak < 1e-6 < e.norm_removed for e in records)


def test_kept_embeddings_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    out, records = edited(model, tmp_path / "out", embeddings="keep")
    name = "model.embed_tokens.weight"
    assert torch.equal(load_file(out / "model.safetensors")[name], load_file(model / "model.safetensors")[name])
    assert name not in {e.tensor for e in records} and len(records) == 6


def test_small_blocks_give_the_same_tensors(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma2", dtype=torch.float32)
    whole, _ = edited(model, tmp_path / "whole")
    monkeypatch.setattr(matrix, "BLOCK", 100)
    monkeypatch.setattr(projection, "BLOCK", 100)
    blocks, _ = edited(model, tmp_path / "blocks")
    a, b = (load_file(p / "model.safetensors") for p in (whole, blocks))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_memory_is_bounded_by_blocks_not_by_the_tensor(tiny: Tiny, tmp_path: Path) -> None:
    import tracemalloc

    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    rows, width = 1_500_000, 32  # an embedding of 96 MB, 192 as float32
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.randn(rows, width, dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors")
    checkpoint = open_checkpoint(model)
    plan, out = plan_edit(checkpoint), tmp_path / "out"
    out.mkdir()
    tracemalloc.start()
    apply_edit(checkpoint, plan, unit(), out, undo=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 4 * matrix.BLOCK * THREADS + (8 << 20) < rows * width * 4


def test_a_direction_or_a_source_that_does_not_fit_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("llama"))
    plan = plan_edit(checkpoint)
    with pytest.raises(VerifyError, match="another model"):
        apply_edit(checkpoint, plan, unit(16), tmp_path)
    other = open_checkpoint(tiny("llama", seed=5))
    with pytest.raises(VerifyError, match="changed since"):
        apply_edit(other, plan, unit(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_refused_by_the_names_of_its_weights(tiny: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba3"}))
    with pytest.raises(UnsupportedError, match=r"mamba3.*embed_tokens"):
        plan_edit(open_checkpoint(model))


def test_a_known_family_with_a_weight_that_cannot_be_placed_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"model.layers.0.adapter.up.weight": torch.ones(32, 4)}, model / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.adapter\.up\.weight"):
        plan_edit(open_checkpoint(model))
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"missing.*layers\.1\.mlp\.down_proj\.weight"):
        plan_edit(open_checkpoint(model))
