"""Every storage type and every option of an edit: what it leaves of the direction, and the way back."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from abliterate.at_rest import edit as edit_verb
from abliterate.at_rest import undo as undo_verb
from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.codecs import Codec, Mxfp4, Plain, Scaled
from abliterate.checkpoint.matrix import Matrix
from abliterate.direction.direction import Direction
from abliterate.direction.given import load_given
from abliterate.edit.apply import apply_edit
from abliterate.edit.plan import Embeddings, plan_edit
from abliterate.edit.projection import Removal, orthonormal, project_columns, project_rows
from abliterate.errors import CheckpointError, UnsupportedError, UsageError, VerifyError
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
DOWN = "model.layers.1.mlp.down_proj.weight"


def directions(k: int, d_model: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(k, d_model)).astype(np.float32)


def projected(
    values: np.ndarray[Any, Any], codec: Codec, removal: Removal, folder: Path, by_rows: bool = False
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """A matrix as stored, as stored after its projection, and the leak that is reported."""
    rows, (before, after) = np.arange(len(values)), (folder / "a", folder / "b")
    before.write_bytes(codec.round(values.astype(codec.work), rows).tobytes())
    after.write_bytes(bytes(before.stat().st_size))
    matrix = Matrix("w", "a", 0, *values.shape, codec)
    with before.open("rb") as a, after.open("r+b") as b:
        project = project_rows if by_rows else project_columns
        removed = project(matrix, a.fileno(), b.fileno(), removal)
        stored, edited = matrix.values(a.fileno(), rows), matrix.values(b.fileno(), rows)
    return stored.astype(np.float64), edited.astype(np.float64), float(np.sqrt(removed.left / removed.removed))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    m=st.integers(1, 70),
    k=st.integers(1, 3),
    strength=st.floats(-2, 2),
    keep_norms=st.booleans(),
    by_rows=st.booleans(),
    dtype=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    seed=st.integers(0, 99),
)
def test_any_matrix_gets_the_component_asked_for_and_the_leak_is_what_is_measured(
    n: int, m: int, k: int, strength: float, keep_norms: bool, by_rows: bool, dtype: str, seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    k = min(k, n)
    values = np.random.default_rng(seed).normal(size=(m, n) if by_rows else (n, m))
    basis = orthonormal(directions(k, n, seed))
    removal = Removal(basis, strength, keep_norms)
    before, after, leak = projected(values, Plain(dtype), removal, tmp_path_factory.mktemp("w"), by_rows)
    if by_rows:
        before, after = before.T, after.T
    d = basis.astype(np.float64)
    exact = before - strength * d @ (d.T @ before)
    if keep_norms:
        norm, now = np.linalg.norm(before, axis=0), np.linalg.norm(exact, axis=0)
        exact = exact * np.divide(norm, now, out=np.ones_like(now), where=now > 1e-3 * norm)
    removed = np.linalg.norm(d.T @ before)
    left = min(np.linalg.norm(before - strength * d @ (d.T @ before), axis=0) / np.linalg.norm(before, axis=0))
    # What is scaled back up from a hundredth of its norm has a hundred times the rounding.
    if left > (0.1 if keep_norms else 1e-2):
        assert np.linalg.norm(d.T @ (after - exact)) / removed == pytest.approx(leak, rel=0.1, abs=1e-4)
        step = {"BF16": 2**-8, "F16": 2**-11}.get(dtype, 1e-5)
        assert np.linalg.norm(after - exact) <= 6 * step * np.linalg.norm(np.abs(exact) + np.abs(before))


@pytest.mark.parametrize(("dtype", "bound"), [("BF16", 1e-5), ("F16", 1e-6)])
@pytest.mark.parametrize("by_rows", [False, True])
def test_the_cast_carries_its_remainder_at_the_same_change_of_the_matrix(
    dtype: str, bound: float, by_rows: bool, tmp_path: Path
) -> None:
    values = np.random.default_rng(1).normal(size=(64, 896) if by_rows else (896, 64)) / 30
    d = orthonormal(directions(1, 896))
    before, after, leak = projected(values, Plain(dtype), Removal(d), tmp_path, by_rows)
    if by_rows:
        before, after = before.T, after.T
    exact = before - d @ (d.T @ before)
    plain = exact.astype(np.float32)
    Plain(dtype).round(plain, np.arange(len(plain)))
    at_once = np.linalg.norm(d.T @ plain) / np.linalg.norm(d.T @ before)
    assert leak < bound < 0.02 * at_once
    assert np.linalg.norm(after - exact) < 1.05 * np.linalg.norm(plain - exact)


def test_norms_of_columns_can_be_kept_without_a_leak_norms_of_rows_cannot(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(128, 96))
    d = orthonormal(directions(1, 128))
    before, after, leak = projected(values, Plain("F32"), Removal(d, keep_norms=True), tmp_path)
    assert leak < 1e-6
    assert np.allclose(np.linalg.norm(after, axis=0), np.linalg.norm(before, axis=0), rtol=1e-5)
    plain = before - d @ (d.T @ before)
    by_row = plain * (np.linalg.norm(before, axis=1) / np.linalg.norm(plain, axis=1))[:, None]
    assert np.linalg.norm(d.T @ by_row) > 0.01 * np.linalg.norm(d.T @ before)
    assert np.abs(np.linalg.norm(plain, axis=0) / np.linalg.norm(before, axis=0) - 1).max() > 1e-3


@pytest.mark.parametrize("strength", [-1.0, 0.5, 2.0])
def test_strengths_scale_what_is_left(strength: float, tmp_path: Path) -> None:
    d = orthonormal(directions(2, 64))
    before, after, _ = projected(
        np.random.default_rng(3).normal(size=(64, 50)), Plain("F32"), Removal(d, strength), tmp_path
    )
    assert np.allclose(d.T @ after, (1 - strength) * d.T @ before, atol=1e-4)


SCALES: dict[str, Callable[[np.random.Generator], tuple[Any, tuple[int, int]]]] = {
    "blocks": lambda rng: (rng.uniform(0.001, 0.01, (3, 2)).astype(np.float32), (128, 128)),
    "rows": lambda rng: (rng.uniform(0.001, 0.01, (300, 1)).astype(np.float32), (1, 200)),
    "one": lambda _rng: (np.full((1, 1), 0.004, np.float32), (300, 200)),
}


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "MXFP4"])
def test_codes_of_eight_and_four_bits_lose_the_direction(scales: str, dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    if dtype == "MXFP4":
        codec: Codec = Mxfp4(rng.integers(118, 122, (300, 7), dtype=np.uint8))
        values = rng.normal(size=(300, 224)) * 0.02
    else:
        codec, values = Scaled(dtype, *SCALES[scales](rng)), rng.normal(size=(300, 200)) * 0.2
    d = orthonormal(directions(1, 300))
    before, after, leak = projected(values, codec, Removal(d), tmp_path)
    exact = before - d @ (d.T @ before)
    naive = exact.astype(np.float32)
    codec.round(naive, np.arange(300))
    at_once = np.linalg.norm(d.T @ naive) / np.linalg.norm(d.T @ before)
    assert at_once > 0.05 and leak < 0.02 * at_once
    assert np.linalg.norm(after - exact) < (2 if dtype == "MXFP4" else 1.5) * np.linalg.norm(naive - exact)


def as_fp8(folder: Path, target: Path, scales: str) -> Path:
    """A checkpoint with its MLP output matrices in FP8, as two makers of such files store them."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    for name in [n for n in tensors if n.endswith("down_proj.weight")]:
        w = tensors.pop(name).float().numpy()
        if scales == "_scale_inv":
            scale = np.full((-(-w.shape[0] // 16), -(-w.shape[1] // 16)), np.abs(w).max() / 448, np.float32)
            across = np.kron(scale, np.ones((16, 16), np.float32))[: w.shape[0], : w.shape[1]]
        else:
            scale = np.abs(w).max(1, keepdims=True).astype(np.float32) / 448
            across = scale
        codes = (w / across).astype(ml_dtypes.float8_e4m3fn)
        tensors[name] = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
        tensors[name + scales] = torch.from_numpy(scale)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("scales", ["_scale_inv", "_scale"])
def test_an_fp8_checkpoint_is_edited_in_fp8_and_taken_back(scales: str, tiny: Tiny, tmp_path: Path) -> None:
    model = as_fp8(tiny("llama", d_model=96), tmp_path / "model", scales)
    np.save(tmp_path / "d.npy", directions(1, 96)[0])
    record = edit_verb(str(model), tmp_path / "d.npy", tmp_path / "out")
    before, after = (load_file(p / "model.safetensors") for p in (model, tmp_path / "out"))
    assert after[DOWN].dtype == torch.float8_e4m3fn and not torch.equal(
        after[DOWN].view(torch.uint8), before[DOWN].view(torch.uint8)
    )
    assert torch.equal(after[DOWN + scales], before[DOWN + scales])
    assert max(e["leak"] for e in record.edits if "down_proj" in e["tensor"]) < 0.01
    undo_verb(str(tmp_path / "out"), tmp_path / "back")
    assert same(model, tmp_path / "back")


def test_scales_that_do_not_fit_and_other_ways_to_quantise_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = as_fp8(tiny("llama"), tmp_path / "model", "_scale_inv")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [7, 16]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"down_proj.*scales of shape"):
        plan_edit(open_checkpoint(model))
    for method in ("awq", "gptq", "bitsandbytes"):
        config["quantization_config"] = {"quant_method": method}
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnsupportedError, match=f"'{method}'.*bf16"):
            open_checkpoint(model)


def test_mxfp4_experts_are_edited_on_the_right_axis_and_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    width = 64  # experts are square, so that only the layout tells the axis
    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=width, intermediate_size=width, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=99, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors, rng = load_file(path), np.random.default_rng(0)
    for name in [n for n in tensors if n.endswith(("experts.down_proj", "experts.gate_up_proj"))]:
        n_experts, n_in, n_out = tensors.pop(name).shape
        tensors[name + "_blocks"] = torch.from_numpy(rng.integers(0, 256, (n_experts, n_out, n_in // 32, 16), np.uint8))
        tensors[name + "_scales"] = torch.from_numpy(rng.integers(120, 124, (n_experts, n_out, n_in // 32), np.uint8))
    save_file(tensors, path, {"format": "pt"})
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(stored))
    np.save(tmp_path / "d.npy", directions(1, width)[0])
    record = edit_verb(str(tmp_path / "model"), tmp_path / "d.npy", tmp_path / "out")
    assert len([e for e in record.edits if e["tensor"].endswith("down_proj_blocks")]) == 2
    assert max(e["leak"] for e in record.edits) < 0.05
    r = orthonormal(directions(1, width))[:, 0]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16) for name in ("model", "out")]
    experts = [m.requires_grad_(False).model.layers[1].mlp.experts.down_proj.float().numpy() for m in models]
    before, after = (np.linalg.norm(w @ r) for w in experts)
    assert after < 0.05 * before
    undo_verb(str(tmp_path / "out"), tmp_path / "back")
    assert same(tmp_path / "model", tmp_path / "back")


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()}
    if names != {str(p.relative_to(other)) for p in other.rglob("*") if p.is_file()}:
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


@pytest.mark.parametrize("embeddings", ["edit", "untie"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_undo_gives_every_byte_of_the_base(
    family: str, dtype: torch.dtype, embeddings: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(family, tied=True, dtype=dtype)
    np.save(tmp_path / "d.npy", directions(2, 32))
    edit_verb(str(model), tmp_path / "d.npy", tmp_path / "out", embeddings=embeddings, keep_norms=True, strength=0.9)
    assert not same(model, tmp_path / "out")
    restored = undo_verb(str(tmp_path / "out"), tmp_path / "back")
    assert same(model, tmp_path / "back") and restored.tensors == 7
    edit_verb(str(tmp_path / "out"), tmp_path / "d.npy", tmp_path / "twice")
    undo_verb(str(tmp_path / "twice"), tmp_path / "once")
    assert same(tmp_path / "out", tmp_path / "once")


def test_undo_refuses_what_was_changed_since_and_what_kept_no_way_back(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    np.save(tmp_path / "d.npy", directions(1, 32)[0])
    edit_verb(str(model), tmp_path / "d.npy", tmp_path / "none", undo=False)
    with pytest.raises(CheckpointError, match="--no-undo"):
        undo_verb(str(tmp_path / "none"), tmp_path / "back")
    edit_verb(str(model), tmp_path / "d.npy", tmp_path / "out")
    tensor = open_checkpoint(tmp_path / "out").tensors[DOWN]
    with (tmp_path / "out" / tensor.file).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\x01\x02")
    with pytest.raises(VerifyError, match=r"down_proj.*changed since"):
        undo_verb(str(tmp_path / "out"), tmp_path / "back")
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_an_untied_head_reads_as_before_while_the_stream_loses_the_direction(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny(family, tied=True, dtype=torch.float32)
    np.save(tmp_path / "d.npy", directions(1, 32)[0])
    record = edit_verb(str(model), tmp_path / "d.npy", tmp_path / "out", embeddings="untie")
    assert "tensor of its own" in str(record.tied_head)
    base, edited = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (model, tmp_path / "out"))
    assert not edited.config.tie_word_embeddings
    assert torch.equal(edited.lm_head.weight, base.lm_head.weight)
    r = torch.from_numpy(orthonormal(directions(1, 32))[:, 0])
    assert (edited.model.embed_tokens.weight @ r).abs().max() < 1e-5 < (base.lm_head.weight @ r).abs().max()
    tied = edit_verb(str(model), tmp_path / "d.npy", tmp_path / "tied")
    assert "changes with it" in str(tied.tied_head)
    untied = edit_verb(str(tiny(family, tied=False)), tmp_path / "d.npy", tmp_path / "free", embeddings="untie")
    assert untied.tied_head is None


def test_directions_of_a_person_s_own_are_made_orthonormal(tmp_path: Path) -> None:
    given = directions(3, 16)
    np.save(tmp_path / "d.npy", given)
    found = load_given(tmp_path / "d.npy")
    assert np.allclose(found.vector @ found.vector.T, np.eye(3), atol=1e-5)
    inside = given @ found.vector.T @ found.vector
    assert np.allclose(inside, given, atol=1e-4)
    found.save(tmp_path / "d.safetensors")
    assert np.array_equal(Direction.load(tmp_path / "d.safetensors").vector, found.vector)
    for bad, words in (
        (np.zeros(4), "zeros"), (np.ones((2, 4)), "fewer directions"), (np.array(["a"]), "expected numbers"),
        (np.full(4, np.nan), "NaN"), (np.ones((2, 2, 2)), "expected numbers"), (np.ones((5, 4)), "fewer"),
    ):  # fmt: skip
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(CheckpointError, match=words):
            load_given(tmp_path / "bad.npy")


@pytest.mark.parametrize("family", FAMILIES)
def test_several_directions_leave_the_stream_together(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(family, dtype=torch.float32)
    checkpoint = open_checkpoint(model)
    (tmp_path / "out").mkdir()
    records = apply_edit(checkpoint, plan_edit(checkpoint), directions(3, 32), tmp_path / "out")
    assert max(e.leak for e in records) < 1e-5
    span = torch.from_numpy(orthonormal(directions(3, 32)))
    ids = torch.arange(2, 40)[None]
    for folder, low, high in ((model, 1e-2, 2), (tmp_path / "out", 0, 1e-5)):
        with torch.no_grad():
            running = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            states = running(ids, output_hidden_states=True).hidden_states[:-1]
        shares = [float(((h @ span).norm(dim=-1) / h.norm(dim=-1)).max()) for h in states]
        assert low <= min(shares) and max(shares) < high


class Stop(Exception):
    """Ends an edit where a process would be killed."""


@pytest.mark.parametrize("after", [0, 2])
def test_an_edit_goes_on_at_the_first_unfinished_file(
    after: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.edit import apply

    model = tiny("llama", shard_size="20KB")
    np.save(tmp_path / "d.npy", directions(1, 32)[0])
    edit_verb(str(model), tmp_path / "d.npy", tmp_path / "whole")
    written: list[str] = []
    keep = apply.ShardEdit

    def stop(source: Path, *rest: Any) -> Any:
        written.append(source.name)
        if len(written) > after:
            raise Stop
        return keep(source, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(apply, "ShardEdit", stop)
        with pytest.raises(Stop):
            edit_verb(str(model), tmp_path / "d.npy", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--resume"):
        edit_verb(str(model), tmp_path / "d.npy", tmp_path / "out")
    with monkeypatch.context() as patch:
        again: list[str] = []
        patch.setattr(apply, "ShardEdit", lambda source, *rest: again.append(source.name) or keep(source, *rest))
        edit_verb(str(model), tmp_path / "d.npy", tmp_path / "out", resume=True)
    # The file before the one it stopped at was not finished yet.
    assert len(again) == len(open_checkpoint(model).shards) - max(0, after - 1)
    run, card = "abliteration/run.json", "README.md"
    differing = filecmp.dircmp(tmp_path / "whole", tmp_path / "out", ignore=[card]).diff_files
    assert not differing and (tmp_path / "out" / run).is_file()


@pytest.mark.parametrize("embeddings", ["edit", "keep", "untie"])
def test_two_edits_on_one_output_do_not_mix(embeddings: Embeddings, tiny: Tiny, tmp_path: Path) -> None:
    from abliterate.workspace import Workspace

    np.save(tmp_path / "d.npy", directions(1, 32)[0])
    with Workspace(tmp_path / "out", None, {}, resume=False), pytest.raises(UsageError, match="another run"):
        edit_verb(str(tiny("llama", tied=True)), tmp_path / "d.npy", tmp_path / "out", embeddings=embeddings)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_merges_into_the_edited_weights(family: str, tied: bool, tiny: Tiny, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny(family, tied=tied, dtype=torch.float32)
    np.save(tmp_path / "d.npy", directions(2, 32))
    options: dict[str, Any] = {"strength": 0.8 if tied else -0.5}
    edit_verb(str(model), tmp_path / "d.npy", tmp_path / "out", **options)
    record = edit_verb(str(model), tmp_path / "d.npy", tmp_path / "adapter", format="adapter", **options)
    assert max(e["leak"] for e in record.edits) < 1e-6 and len(record.edits) == 7
    assert not list((tmp_path / "adapter").glob("model*"))
    base, edited = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (model, tmp_path / "out"))
    kept = {name: p.clone() for name, p in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    changed = [name for name, p in edited.state_dict().items() if not torch.equal(p, kept[name])]
    assert {e["tensor"] for e in record.edits} <= set(changed)
    assert all(torch.allclose(merged[name], p, atol=1e-5) for name, p in edited.state_dict().items())


def test_experts_go_into_an_adapter_through_peft_s_parameters_and_biases_not(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import CONFIG_MAPPING

    from abliterate.architecture.twin import build_twin

    for kind in ("mixtral", "qwen3_moe"):
        model = tmp_path / kind
        build_twin(CONFIG_MAPPING[kind]()).float().save_pretrained(model)
        writer = plan_edit(open_checkpoint(model)).writers[0]
        width = open_checkpoint(model).tensors[writer.tensor].shape[writer.axis]
        np.save(tmp_path / "d.npy", directions(1, width)[0])
        edit_verb(str(model), tmp_path / "d.npy", tmp_path / f"{kind}-out")
        edit_verb(str(model), tmp_path / "d.npy", tmp_path / f"{kind}-adapter", format="adapter")
        base, edited = (
            AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (model, tmp_path / f"{kind}-out")
        )
        merged = PeftModel.from_pretrained(base, str(tmp_path / f"{kind}-adapter")).merge_and_unload().state_dict()
        assert all(torch.allclose(merged[name], p, atol=1e-5) for name, p in edited.state_dict().items())
    build_twin(CONFIG_MAPPING["gpt2"]()).float().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedError, match="--format checkpoint"):
        edit_verb(str(tmp_path / "gpt2"), tmp_path / "d.npy", tmp_path / "out", format="adapter")
    with pytest.raises(UsageError, match="full rank"):
        edit_verb(str(tmp_path / "gpt2"), tmp_path / "d.npy", tmp_path / "out", format="adapter", keep_norms=True)
    assert not list(tmp_path.glob("out*"))
