"""`--method`: what each way to make a direction of two means takes out of the stream, and what it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import abliterate
from abliterate import verbs
from abliterate.activations.collect import collect
from abliterate.activations.stats import ActivationStats
from abliterate.checkpoint import open_checkpoint
from abliterate.contrast import spanned
from abliterate.direction.choose import preference
from abliterate.direction.controls import random_like
from abliterate.direction.direction import Direction
from abliterate.edit.plan import plan_edit
from abliterate.errors import CheckpointError, UnsupportedError, UsageError, VerifyError
from abliterate.model.hooks import ablate
from abliterate.model.load import ChatModel, load_model
from abliterate.model.run import starts_as_embedding
from abliterate.options import Options
from abliterate.prompts import PromptSet
from abliterate.report.record import RunRecord
from tests.conftest import Refusing
from tests.organism import HARMFUL_VERBS, HARMLESS_VERBS, requests
from tests.test_run import contents

Tiny = Callable[..., Path]
Result = tuple[RunRecord, Path]


@pytest.fixture(scope="module")
def runs(refusing: Refusing, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """A run by each of the methods that leave something else in the stream."""
    root, found = tmp_path_factory.mktemp("methods"), dict[str, Result]()
    for method in ("per-layer", "affine"):
        given = {**refusing.options, "method": method, "evaluate": method == "affine"}
        found[method] = abliterate.run(str(refusing.folder), root / method, **given), root / method
    return found


@pytest.fixture(scope="module")
def base(refusing: Refusing) -> ChatModel:
    return load_model(refusing.folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def stats(base: ChatModel) -> tuple[ActivationStats, ActivationStats]:
    first, second = (
        collect(base, PromptSet(name, tuple(given[:12]), ("",) * 12))
        for name, given in (("harmful", requests(HARMFUL_VERBS)), ("harmless", requests(HARMLESS_VERBS)))
    )
    return first, second


def direction(result: Result) -> Direction:
    return Direction.load(result[1] / "abliteration" / "directions.safetensors")


def stream(model: ChatModel) -> torch.Tensor:
    """`resid_post` of all layers but the last, which comes after the final norm, `[n_layers - 1, tokens, d_model]`."""
    rows = torch.tensor(model.chat.encode(requests(HARMLESS_VERBS)[:1]))
    with torch.inference_mode():
        states = model.model(rows, output_hidden_states=True).hidden_states
    return torch.cat(states[1:-1])


def logits(model: ChatModel) -> torch.Tensor:
    rows = torch.tensor(model.chat.encode(requests(HARMFUL_VERBS)[:1]))
    with torch.inference_mode():
        return torch.log_softmax(model.model(rows).logits, -1)


def test_only_the_usual_method_takes_the_harmless_mean_out(stats: tuple[ActivationStats, ActivationStats]) -> None:
    for method, most in (("projected", 1e-5), ("difference", 1.0)):
        found = spanned(stats, 3, Options(method=method))  # type: ignore[arg-type]
        along = [abs(d.vector @ stats[1].mean[d.layer, stats[1].positions.index(d.position)]) for d in found]
        assert max(along) <= most * 10 and (method == "projected" or max(along) > 0.01), method


def test_an_affine_edit_leaves_the_stream_at_the_harmless_mean(
    runs: dict[str, Result], base: ChatModel, stats: tuple[ActivationStats, ActivationStats]
) -> None:
    d = direction(runs["affine"])
    unit, edited = torch.from_numpy(d.vector), load_model(runs["affine"][1], device="cpu", dtype="float32")
    assert abs(d.offset) > 0.01
    assert (stream(edited) @ unit - d.offset).abs().max() < 1e-3 < (stream(base) @ unit - d.offset).abs().max()
    leak = runs["affine"][0].metric("leak")
    assert leak is not None and leak["edited"] < 1e-3 < leak["base"]
    mean = stats[1].mean[d.layer, stats[1].positions.index(d.position)]
    for found in spanned(stats, 3, Options(method="affine")):
        if (found.layer, found.position) == (d.layer, d.position):
            assert found.offset == pytest.approx(mean @ found.vector, rel=1e-5)


@pytest.mark.parametrize("method", ["per-layer", "affine"])
def test_hooks_do_what_the_weights_do(
    runs: dict[str, Result], base: ChatModel, refusing: Refusing, method: str
) -> None:
    d, edited = direction(runs[method]), load_model(runs[method][1], device="cpu", dtype="float32")
    sites = plan_edit(open_checkpoint(refusing.folder)).sites
    removed = torch.from_numpy(d.removed)
    removed = removed[:, None] if removed.ndim == 3 else removed[None, None]
    with ablate(base, sites, removed, 1.0, torch.tensor([[d.offset]])):
        hooked = logits(base)
    with ablate(base, sites, torch.from_numpy(d.vector)):
        plain = logits(base)
    off, control = ((given - logits(edited)).abs().max() for given in (hooked, plain))
    assert off < 0.05 < 0.2 < control  # weights are stored in 16 bits


def test_each_layer_loses_its_own_direction_and_no_other(runs: dict[str, Result], refusing: Refusing) -> None:
    d, out = direction(runs["per-layer"]), runs["per-layer"][1]
    assert d.layers is not None and d.layer is not None and np.array_equal(d.layers[d.layer], d.vector)
    edited = load_model(out, device="cpu", dtype="float32")
    for writer in plan_edit(open_checkpoint(refusing.folder)).writers:
        w = edited.model.get_parameter(writer.tensor).detach().double().numpy()
        w = w.T if writer.axis == 1 else w
        left = np.linalg.norm(d.layers.astype(np.float64) @ w, axis=1) / np.linalg.norm(w)
        own = writer.layer or 0
        assert left[own] < 1e-4, writer.tensor
        assert max(np.delete(left, own)) > 1e-2, writer.tensor


@pytest.mark.parametrize("method", ["per-layer", "affine"])
def test_undo_restores_every_byte_and_an_adapter_does_the_same(
    runs: dict[str, Result], refusing: Refusing, tmp_path: Path, method: str
) -> None:
    from peft import PeftModel

    out = runs[method][1]
    verbs.undo(str(out), tmp_path / "base")
    assert contents(tmp_path / "base") == contents(refusing.folder) != contents(out)
    found = out / "abliteration" / "directions.safetensors"
    verbs.edit(str(refusing.folder), found, tmp_path / "adapter", format="adapter")
    verbs.edit(str(refusing.folder), found, tmp_path / "again")
    assert contents(tmp_path / "again").items() >= {
        (k, v) for k, v in contents(out).items() if k.endswith("model.safetensors")
    }
    adapted = load_model(refusing.folder, device="cpu", dtype="float32")
    whole = load_model(out, device="cpu", dtype="float32")
    merged = PeftModel.from_pretrained(adapted.model, str(tmp_path / "adapter")).merge_and_unload()
    before = load_model(refusing.folder, device="cpu", dtype="float32").model
    for w in plan_edit(open_checkpoint(refusing.folder)).writers:
        now, edited, was = (m.get_parameter(w.tensor).detach() for m in (merged, whole.model, before))
        assert (now - edited).norm() < 3e-3 * edited.norm() < 1e-2 * edited.norm() < (was - edited).norm(), w.tensor


@pytest.mark.parametrize("given", [{"embeddings": "keep"}, {"keep_norms": True}], ids=str)
def test_an_affine_direction_needs_the_embedding(
    runs: dict[str, Result], refusing: Refusing, tmp_path: Path, given: dict[str, object]
) -> None:
    found = runs["affine"][1] / "abliteration" / "directions.safetensors"
    with pytest.raises(UsageError, match=r"an affine edit.*leave out --"):
        verbs.edit(str(refusing.folder), found, tmp_path / "out", **given)


def test_an_embedding_that_is_scaled_or_normed_cannot_take_the_harmless_mean(tiny: Tiny) -> None:
    for family, plain in (("llama", True), ("olmo2", True), ("gemma2", False), ("gemma3_text", False)):
        assert starts_as_embedding(load_model(tiny(family), device="cpu")) is plain, family


def test_a_run_says_why_it_cannot_be_affine(tiny: Tiny, refusing: Refusing, tmp_path: Path) -> None:
    from abliterate.find import _require_slot

    folder = tiny("gemma3_text")
    with pytest.raises(UnsupportedError, match=r"--method affine: .*gemma3.* scales its rows"):
        _require_slot(load_model(folder, device="cpu"), plan_edit(open_checkpoint(folder)))


def test_directions_of_layers_are_kept_in_their_file(runs: dict[str, Result], tmp_path: Path) -> None:
    d = direction(runs["per-layer"])
    assert d.layers is not None and d.removed.shape == (len(d.layers), 1, len(d.vector))
    dataclasses.replace(d, layers=2 * d.layers).save(tmp_path / "long.safetensors")
    with pytest.raises(CheckpointError, match=r"directions of single layers have shape"):
        Direction.load(tmp_path / "long.safetensors")
    (control,) = random_like(d, 1, 0)
    assert control.layers is not None and control.layers.shape == d.layers.shape


def test_directions_of_another_number_of_layers_do_not_fit(
    runs: dict[str, Result], refusing: Refusing, tmp_path: Path
) -> None:
    d = direction(runs["per-layer"])
    assert d.layers is not None
    dataclasses.replace(d, layers=d.layers[:-1]).save(tmp_path / "few.safetensors")
    for how in ("checkpoint", "adapter"):
        with pytest.raises(VerifyError, match="there are directions of"):
            verbs.edit(str(refusing.folder), tmp_path / "few.safetensors", tmp_path / "out", format=how)


@pytest.mark.parametrize(
    "given",
    [
        {"method": "mean"}, {"method": "affine", "directions": 2}, {"method": "per-layer", "tune": True},
        {"method": "affine", "embeddings": "keep"}, {"method": "affine", "keep_norms": True},
        {"method": "difference", "keep": "harmful"},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"--method|--tune"):
        Options(**given).check()  # type: ignore[arg-type]
    Options(method="difference", directions=2).check()


def test_what_lies_beyond_harmless_prompts_is_no_gain() -> None:
    def tested(ablated: float, kl: float) -> Direction:
        scores = {"ablated": ablated, "kl": kl, "base_harmful": 7.0, "base_harmless": -5.0}
        return Direction(np.ones(1, np.float32), 0, -1, 1.0, scores=scores)

    far, near, weak = tested(-15.0, 0.14), tested(-5.5, 0.03), tested(-4.0, 0.001)
    assert min([far, near, weak], key=preference) is near
    assert min([far, weak], key=preference) is far
