"""`compare` names what another tool changed, and finds the direction it was changed along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from abliterate import at_rest
from abliterate.checkpoint import open_checkpoint
from abliterate.compare import tensors as compared_tensors
from abliterate.compare.shared import _first_right_vectors, cosines
from abliterate.direction.direction import Direction
from abliterate.errors import CheckpointError, ResourceError, UsageError, VerifyError
from abliterate.report.comparison import print_comparison, sentence
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
#: Wide enough for an edit along one direction to be a small part of a matrix, as in real models.
WIDE = 128


def unit(k: int | None = None, d_model: int = WIDE, seed: int = 1) -> npt.NDArray[np.float32]:
    found = np.random.default_rng(seed).normal(size=(k or 1, d_model))
    basis = np.linalg.qr(found.T)[0].T.astype(np.float32)
    return basis if k else basis[0]


def changed_copy(model: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy of a checkpoint in which another tool's change was made to each tensor (None: left alone)."""
    shutil.copytree(model, out)
    tensors = load_file(model / "model.safetensors")
    made = {n: t if (new := change(n, t)) is None else new.contiguous() for n, t in tensors.items()}
    save_file(made, out / "model.safetensors", {"format": "pt"})
    return out


def plain_formula(name: str, w: torch.Tensor, r: torch.Tensor, strength: float = 1.0) -> torch.Tensor | None:
    """What most scripts do, in the weights' own type, rounding each number by itself."""
    r = r.to(w.dtype)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return w - strength * torch.outer(r, r @ w)
    return w - strength * torch.outer(w @ r, r) if name.endswith("embed_tokens.weight") else None


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_edit_is_recognised(family: str, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(family, d_model=WIDE)
    np.save(tmp_path / "r.npy", unit())
    record = at_rest.edit(str(model), tmp_path / "r.npy", tmp_path / "out", strength=0.7)
    found = at_rest.compare(str(model), str(tmp_path / "out"), direction=tmp_path / "r.npy")
    assert {t.tensor for t in found.changed} == {e["tensor"] for e in record.edits}
    assert len(found.directions) == 1 and found.cosines is not None and found.cosines[0] > 0.999
    assert all(t.rank == 1 and t.role is not None for t in found.changed)
    assert all(t.strength == pytest.approx(0.7, abs=0.01) for t in found.changed)
    assert found.explained is not None and found.explained > 0.98
    assert found.strength == pytest.approx(0.7, abs=0.01)
    assert not (found.added or found.missing or found.reshaped or found.rounded or found.unread or found.files)
    assert found.same == len(open_checkpoint(model).tensors) - len(found.changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_a_plain_formula_in_the_weights_own_type_is_recognised(
    dtype: torch.dtype, strength: float, tiny: Tiny, tmp_path: Path
) -> None:
    model, r = tiny("llama", d_model=WIDE, dtype=dtype), unit()
    other = changed_copy(model, tmp_path / "out", lambda n, w: plain_formula(n, w, torch.from_numpy(r), strength))
    found = at_rest.compare(str(model), str(other))
    names = {
        n
        for n in load_file(model / "model.safetensors")
        if plain_formula(n, torch.eye(WIDE), torch.ones(WIDE)) is not None
    }
    assert {t.tensor for t in found.changed} == names and len(names) == 7
    assert cosines(found.directions, r)[0] > 0.99
    assert all(t.rank == 1 for t in found.changed)
    assert found.strength == pytest.approx(strength, abs=0.02)


def test_several_directions_are_told(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("qwen2", d_model=WIDE)
    np.save(tmp_path / "r.npy", unit(3))
    at_rest.edit(str(model), tmp_path / "r.npy", tmp_path / "out")
    found = at_rest.compare(
        str(model), str(tmp_path / "out"), direction=tmp_path / "r.npy", save=tmp_path / "s.safetensors"
    )
    assert len(found.directions) == 3 and {t.rank for t in found.changed if len(t.shape) == 2} == {3}
    assert found.cosines is not None and min(found.cosines) > 0.99
    assert min(cosines(Direction.load(tmp_path / "s.safetensors").vector, unit(3))) > 0.99


def test_a_direction_that_was_found_removes_what_the_edit_removed(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("olmo2", d_model=WIDE)  # with a gain between writers and stream
    np.save(tmp_path / "r.npy", unit())
    at_rest.edit(str(model), tmp_path / "r.npy", tmp_path / "out")
    at_rest.compare(str(model), str(tmp_path / "out"), save=tmp_path / "s.safetensors")
    at_rest.edit(str(model), tmp_path / "s.safetensors", tmp_path / "again")
    tensors = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(
        torch.allclose(a.float(), b.float(), atol=0.02) for a, b in zip(*(t.values() for t in tensors), strict=True)
    )


def test_a_training_of_weights_is_not_taken_for_an_edit(tiny: Tiny, tmp_path: Path) -> None:
    model, noise = tiny("llama", d_model=WIDE), torch.Generator().manual_seed(1)

    def trained(name: str, w: torch.Tensor) -> torch.Tensor | None:
        return w + 0.05 * torch.randn(w.shape, generator=noise).to(w.dtype) if "_proj" in name else None

    found = at_rest.compare(str(model), str(changed_copy(model, tmp_path / "out", trained)))
    assert all(t.rank is None for t in found.changed) and {t.role for t in found.changed} >= {None}
    assert found.explained is not None and found.explained < 0.1
    assert "not an edit along a direction" in sentence(found.as_dict)


def test_what_only_rounds_is_no_change(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", d_model=WIDE, dtype=torch.float32)
    other = changed_copy(model, tmp_path / "out", lambda _n, w: w.bfloat16())
    found = at_rest.compare(str(model), str(other))
    assert not found.changed and len(found.rounded) == len(load_file(model / "model.safetensors"))
    assert found.explained is None and "differs by more than rounding" in sentence(found.as_dict)
    same = at_rest.compare(str(model), str(model))
    assert not same.rounded and same.same == len(found.rounded)


def test_tensors_settings_and_texts_that_differ_are_named(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", d_model=WIDE)
    other = Path(shutil.copytree(model, tmp_path / "out"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.extra"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"], torch.zeros(2, WIDE).bfloat16()])
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0, "transformers_version": "0"}))
    (other / "chat_template.jinja").write_text("{{ bos_token }}\nhello\n")
    (other / "blob.bin2").write_bytes(b"\xff\xfe")
    (other / "special_tokens_map.json").unlink(missing_ok=True)
    found = at_rest.compare(str(model), str(other))
    assert (found.added, found.missing, found.reshaped) == (
        ["model.norm.extra"],
        ["model.norm.weight"],
        ["lm_head.weight"],
    )
    assert not found.changed
    assert found.files["config.json"] == [f"rope_theta: {json.dumps(config.get('rope_theta'))} → 7.0"] or (
        "absent → 7.0" in found.files["config.json"][0]
    )
    assert "+hello" in found.files["chat_template.jinja"]
    assert found.files["blob.bin2"] == ["only in the other"]


def test_mistakes_are_told(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama", d_model=WIDE)
    r = torch.from_numpy(unit())
    other = changed_copy(model, tmp_path / "out", lambda n, w: plain_formula(n, w, r))
    np.save(tmp_path / "narrow.npy", unit(d_model=32))
    with pytest.raises(VerifyError, match="d_model 32"):
        at_rest.compare(str(model), str(other), direction=tmp_path / "narrow.npy")
    with pytest.raises(UsageError, match="exists already"):
        at_rest.compare(str(model), str(other), save=tmp_path / "narrow.npy")
    with pytest.raises(VerifyError, match="no direction to save"):
        at_rest.compare(str(model), str(model), save=tmp_path / "none.safetensors")
    foreign = changed_copy(model, tmp_path / "foreign", lambda _n, _w: None)
    tensors = load_file(foreign / "model.safetensors")
    save_file({f"x.{n}": t for n, t in tensors.items()}, foreign / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="of one architecture"):
        at_rest.compare(str(model), str(foreign))
    broken = changed_copy(model, tmp_path / "nan", lambda n, w: w * float("nan") if "o_proj" in n else None)
    with pytest.raises(VerifyError, match=r"o_proj.*NaN"):
        at_rest.compare(str(model), str(broken))


def test_an_architecture_that_is_not_known_is_looked_at_by_width(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.compare import compare
    from abliterate.errors import UnsupportedError

    def unknown(_checkpoint: Any) -> Any:
        raise UnsupportedError("no such architecture")

    model, r = tiny("llama", d_model=WIDE), unit()
    other = changed_copy(model, tmp_path / "out", lambda n, w: plain_formula(n, w, torch.from_numpy(r)))
    monkeypatch.setattr(compare, "residual_writers", unknown)
    found = at_rest.compare(str(model), str(other))
    assert found.writers_known == "no such architecture" and cosines(found.directions, r)[0] > 0.99
    assert found.explained is not None and found.explained > 0.98 and len(found.changed) == 7


def test_the_table_fits_80_columns(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    model, r = tiny("llama", d_model=WIDE), torch.from_numpy(unit())
    other = changed_copy(model, tmp_path / "out", lambda n, w: plain_formula(n, w, r))
    print_comparison(Console(width=80), at_rest.compare(str(model), str(other)).as_dict)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "down_proj" in line).split()
    assert row[:5] == ["mlp.down_proj", "3", "0–2", "1", "1.00"]
    json.dumps(at_rest.compare(str(model), str(other)).as_dict)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 3),
    st.sampled_from(["F32", "BF16", "F16"]),
    st.integers(0, 99),
)
def test_the_rank_of_a_change_is_told(rows: int, columns: int, rank: int, dtype: str, seed: int) -> None:
    import tempfile

    rng = np.random.default_rng(seed)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    w = torch.from_numpy(rng.normal(size=(rows, columns)).astype(np.float32)).to(kind)
    rank = min(rank, rows, columns)
    left, right = (np.linalg.qr(rng.normal(size=(n, rank)))[0] for n in (rows, columns))
    change = (left * rng.uniform(1, 3, rank)) @ right.T
    with tempfile.TemporaryDirectory() as folder:
        for name, tensor in (("one", w), ("two", (w.double() + torch.from_numpy(change)).to(kind))):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text("{}")
            save_file({"w": tensor}, Path(folder) / name / "model.safetensors")
        one, two = (open_checkpoint(Path(folder) / name) for name in ("one", "two"))
        with compared_tensors.Files.opened(one, two) as files:
            found = compared_tensors.changes(files, ["w"], lambda _n: None)["w"]
    assert found is not None and found[0].rank == rank
    exact = w.double().numpy() + change
    assert found[0].delta == pytest.approx(np.square(exact - w.double().numpy()).sum(), rel=0.1, abs=1e-2)


def test_many_rows_and_few_give_the_same_directions() -> None:
    rows = np.random.default_rng(0).normal(size=(2000, 40)).astype(np.float32) + 3 * unit(d_model=40)
    many = _first_right_vectors(rows, 1)
    few = np.linalg.svd(rows.astype(np.float64), full_matrices=False)[2][:1]
    assert cosines(many, few)[0] == pytest.approx(1) and cosines(many, unit(d_model=40))[0] > 0.9
    assert cosines(_first_right_vectors(rows[:30], 1), many)[0] > 0.9


def test_what_the_base_hardly_has_is_not_said_to_be_gone(tiny: Tiny, tmp_path: Path) -> None:
    model, r = tiny("llama", d_model=WIDE, dtype=torch.float32), torch.from_numpy(unit())
    edited = changed_copy(model, tmp_path / "edited", lambda n, w: plain_formula(n, w, r))
    back = at_rest.compare(str(edited), str(model))
    assert back.strength is None and "the wrong way round?" in sentence(back.as_dict)
    there = at_rest.compare(str(model), str(edited))
    assert there.strength == pytest.approx(1, abs=0.01) and "is gone" in sentence(there.as_dict)


def test_where_a_direction_cannot_be_saved_is_told_first(tiny: Tiny, tmp_path: Path) -> None:
    model = str(tiny("llama", d_model=WIDE))
    with pytest.raises(UsageError, match="safetensors"):
        at_rest.compare(model, model, save=tmp_path / "x.npy")
    with pytest.raises(ResourceError, match="cannot write there"):
        at_rest.compare(model, model, save=Path("/proc/none/x.safetensors"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="an adapter, not a model"):
        at_rest.compare(model, str(tmp_path))
