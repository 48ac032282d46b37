"""A model read block by block computes what it computes whole in memory."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from abliterate.activations.collect import collect, collect_sets
from abliterate.activations.unfinished import Unfinished
from abliterate.architecture.blockwise import why_not_blockwise
from abliterate.checkpoint.codecs import Raw
from abliterate.errors import CheckpointError, UnsupportedError
from abliterate.model import blockwise
from abliterate.model.batches import Batch, batches
from abliterate.model.generate import generate
from abliterate.model.hooks import ablate, add_vectors
from abliterate.model.load import ChatModel, load_model
from abliterate.model.run import first_token_log_probs, forward
from abliterate.model.sites import WriterSite
from abliterate.prompts import PromptSet
from tests.tiny import FAMILIES

Tiny = Callable[..., Path]
PROMPTS = PromptSet("five", ("Hi", "How are you?", "Name a river.", "a", "Tell me more about it, please"), ("",) * 5)


def both(folder: Path, system_prompt: str | None = "You are brief, and kind.") -> tuple[ChatModel, ChatModel]:
    whole, blocks = (
        load_model(folder, device="cpu", dtype="float32", system_prompt=system_prompt, memory=memory)
        for memory in (None, 1 << 30)
    )
    return whole, blocks


def meta(model: ChatModel) -> set[str]:
    return {name for name, p in model.model.named_parameters() if p.is_meta}


@pytest.mark.parametrize("system_prompt", [None, "You are brief, and kind."])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_whole(family: str, system_prompt: str | None, tiny: Tiny) -> None:
    whole, blocks = both(tiny(family), system_prompt)
    assert len(meta(blocks)) >= 4 * whole.n_layers
    first, second = (collect(m, PROMPTS, 2) for m in (whole, blocks))
    assert np.allclose(first.mean, second.mean, atol=1e-5) and np.allclose(first.m2, second.m2, atol=1e-4)
    rows = whole.chat.encode(PROMPTS.prompts)
    assert torch.allclose(*(first_token_log_probs(m, rows, 2) for m in (whole, blocks)), atol=1e-5)
    assert generate(whole, rows, 6, 3) == generate(blocks, rows, 6, 3)
    assert len(meta(blocks)) >= 4 * whole.n_layers
    fewer = collect(blocks, PROMPTS, 2, n_layers=1)
    assert np.allclose(fewer.mean, first.mean[:1], atol=1e-5) and len(fewer.mean) == 1
    assert np.array_equal(collect(whole, PROMPTS, 2, n_layers=1).mean, first.mean[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_to_the_model_reach_it_block_by_block(family: str, tiny: Tiny) -> None:
    whole, blocks = both(tiny(family))
    rows = whole.chat.encode(PROMPTS.prompts)
    many = torch.randn(5, whole.d_model, generator=torch.manual_seed(0))
    gain = {"gemma2": "post_feedforward_layernorm.weight", "olmo2": "post_feedforward_layernorm.weight"}.get(family)
    sites = [WriterSite(None, "embed"), *(WriterSite(layer, "mlp", gain) for layer in range(whole.n_layers))]

    def logits(model: ChatModel, change: Callable[[Batch], AbstractContextManager[None]]) -> torch.Tensor:
        found = torch.zeros(5, whole.model.config.get_text_config().vocab_size)
        for batch, values in forward(model, batches(model, rows, 2), tokens=1, change=change):
            found[batch.indices] = values[:, -1]
        return found

    changes: list[Callable[[ChatModel], Callable[[Batch], AbstractContextManager[None]]]] = [
        lambda m: lambda _: ablate(m, sites, many[0]),
        lambda m: lambda b: add_vectors(m, [1] * len(b.indices), many[b.indices]),
    ]
    plain = first_token_log_probs(whole, rows, 2)
    for change in changes:
        one, other = logits(whole, change(whole)), logits(blocks, change(blocks))
        assert torch.allclose(one, other, atol=1e-4)
        assert not torch.allclose(one.log_softmax(-1), plain, atol=1e-2)


def test_sets_that_share_a_pass_have_the_statistics_of_passes_of_their_own(tiny: Tiny) -> None:
    other = PromptSet("other", ("What now?", "Hi there", "Why?"), ("",) * 3)
    for model in both(tiny("llama")):
        for one, prompts in zip(collect_sets(model, [PROMPTS, other], 3), (PROMPTS, other), strict=True):
            alone = collect(model, prompts, 2)
            assert one.count == alone.count == len(prompts) and one.prompts == prompts.sha256
            assert np.allclose(one.mean, alone.mean, atol=1e-5) and np.allclose(one.m2, alone.m2, atol=1e-4)


class Stop(Exception):
    """A run that is interrupted."""


@pytest.mark.parametrize("after", [0, 1])
def test_statistics_go_on_from_the_last_finished_block(
    after: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, blocks = both(tiny("llama"))
    assert blocks.weights is not None
    whole, file = collect(blocks, PROMPTS, 2), tmp_path / "unfinished"
    keep, loaded = Unfinished.after, blocks.weights.loaded

    def stop(self: Unfinished, layer: int, streams: list[Raw]) -> None:
        keep(self, layer, streams)
        if layer == after:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Unfinished, "after", stop)
        collect(blocks, PROMPTS, 2, unfinished=file)
    ran = []
    monkeypatch.setattr(blocks.weights, "loaded", lambda layer, last=None: ran.append(layer) or loaded(layer, last))
    again = collect(blocks, PROMPTS, 2, unfinished=file)
    assert ran == list(range(after + 1, blocks.n_layers))
    assert np.array_equal(again.mean, whole.mean) and np.array_equal(again.m2, whole.m2)
    ran.clear()
    other = PromptSet("other", PROMPTS.prompts[:3], ("",) * 3)
    assert np.array_equal(collect(blocks, other, 2, unfinished=file).mean, collect(blocks, other, 2).mean)
    assert ran == 2 * list(range(blocks.n_layers))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_streams_that_do_not_fit_lie_in_a_file(family: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, blocks = both(tiny(family))
    rows = whole.chat.encode(PROMPTS.prompts)
    assert blocks.weights is not None
    blocks.weights.stream_memory = 1000
    written, write = [], blockwise.write_all
    monkeypatch.setattr(
        blockwise, "write_all", lambda fd, data, *rest: written.append(len(data)) or write(fd, data, *rest)
    )
    assert torch.allclose(*(first_token_log_probs(m, rows, 2) for m in (whole, blocks)), atol=1e-5)
    assert len(written) == (3 + 1) * (
        blocks.n_layers + 1
    )  # three batches and an opening, embedded and after each block
    assert np.allclose(collect(whole, PROMPTS, 2).mean, collect(blocks, PROMPTS, 2).mean, atol=1e-5)


def test_what_cannot_run_block_by_block_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(tiny("llama"))
    assert why_not_blockwise(config) is None
    config.quantization_config = {"quant_method": "fp8"}
    assert why_not_blockwise(config) == "quantised weights run whole only"
    del config.quantization_config
    keep = blockwise._Call.run

    def wrong(self: blockwise._Call, model: ChatModel, layer: int) -> torch.Tensor:
        self.hidden = keep(self, model, layer) * 1.001
        return self.hidden

    with monkeypatch.context() as patch:
        patch.setattr(blockwise._Call, "run", wrong)
        assert "does not give the same" in str(why_not_blockwise(config))
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    assert "has another loader" in str(why_not_blockwise(config))


def test_states_beside_keys_and_values_write_no_answers_block_by_block(tiny: Tiny) -> None:
    _, blocks = both(tiny("llama"))
    blocks.model._is_stateful = True
    with pytest.raises(UnsupportedError, match="--no-generate"):
        generate(blocks, blocks.chat.encode(PROMPTS.prompts), 3, 2)


def test_a_weight_that_the_checkpoint_lacks_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for lacking in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        save_file({n: t for n, t in tensors.items() if n != lacking}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=lacking):
            collect(load_model(folder, device="cpu", dtype="float32", memory=1 << 30), PROMPTS)


def test_the_head_is_given_its_input_in_one_piece(tiny: Tiny) -> None:
    for model in both(tiny("llama")):
        seen: list[bool] = []
        model.model.get_output_embeddings().register_forward_pre_hook(
            lambda _m, args, seen=seen: seen.append(args[0].is_contiguous())
        )
        rows = model.chat.encode(PROMPTS.prompts)
        for _ in forward(model, batches(model, rows, 2, keep=3), tokens=2):
            pass
        assert seen and all(seen)
        model.model.get_output_embeddings()._forward_pre_hooks.popitem(last=False)
        seen.clear()
        for _ in forward(model, batches(model, rows, 2, keep=3), tokens=2):
            pass
        assert all(seen) == (model.weights is not None)  # what it would be given: block by block no others were kept


def widths(model: ChatModel, rows: list[list[int]], keep: int) -> list[int]:
    """How many tokens each call of the last block's MLP has, openings first."""
    seen: list[int] = []
    mlp: Any = model.blocks[-1].mlp
    handle = mlp.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[-2]))
    for _ in forward(model, batches(model, rows, 5, keep=keep), on_block=lambda *_: None, keep=keep):
        pass
    handle.remove()
    return seen


@pytest.mark.parametrize("system_prompt", [None, "You are brief, and kind."])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_tokens_that_nobody_asked_for_the_last_block_keeps_only_keys(
    family: str, system_prompt: str | None, tiny: Tiny
) -> None:
    whole, blocks = both(tiny(family), system_prompt)
    rows = whole.chat.encode(PROMPTS.prompts)
    if hasattr(blocks.blocks[-1], "mlp"):
        assert widths(blocks, rows, 2)[-1] == 2 < min(widths(whole, rows, 2))
        assert widths(blocks, rows, 0) == widths(whole, rows, 0)


def test_beginnings_that_some_rows_share_run_once(tiny: Tiny) -> None:
    asked = ("Tell me why", "Tell me how", "Tell him", "Who is it?", "Who was it", "Tell me who", "Name a river")
    prompts = PromptSet("alike", asked, ("",) * len(asked))
    for model in both(tiny("llama")):
        rows = model.chat.encode(prompts.prompts)
        found = list(batches(model, rows, 3))
        first, *others = {id(b.opening): b.opening for b in found}.values()
        assert first is not None and first.opening is not None and not others
        assert first.input_ids.shape == (3, 4)  # "Tell", "Who ", "Name": longer ones would save fewer tokens
        for batch in found:
            for i, row, after in zip(batch.indices, batch.input_ids, batch.after, strict=True):
                whole = [*first.opening.input_ids[0], *first.input_ids[after], *row[-(len(rows[i]) - batch.shared) :]]
                assert [int(t) for t in whole] == rows[i]
        alone = [collect(model, PromptSet("one", (p,), ("",)), 1).mean for p in asked]
        assert np.allclose(collect(model, prompts, 3).mean, np.mean(alone, axis=0), atol=1e-5)
        one = [first_token_log_probs(model, [row], 1) for row in rows]
        assert torch.allclose(first_token_log_probs(model, rows, 3), torch.cat(one), atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "video_llama_3"])
def test_classes_that_give_their_output_the_shape_of_the_input_or_all_logits_run_block_by_block(kind: str) -> None:
    assert why_not_blockwise(AutoConfig.for_model(kind)) is None
