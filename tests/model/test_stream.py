"""What is recorded is the residual stream: batches equal single rows, values equal transformers', one BOS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate.activations.collect import collect
from abliterate.activations.stats import ActivationStats
from abliterate.errors import CheckpointError, UnsupportedError, UsageError
from abliterate.model import generate as generating
from abliterate.model.batches import Batch, batches, pad_left
from abliterate.model.chat import load_tokenizer
from abliterate.model.generate import generate
from abliterate.model.hooks import ablate, add_vectors, record_resid_post
from abliterate.model.load import ChatModel, load_model
from abliterate.model.run import first_token_log_probs, forward, log_probs
from abliterate.model.sites import WriterSite
from abliterate.prompts import PromptSet
from tests.tiny import FAMILIES, TEMPLATE

Tiny = Callable[..., Path]
PROMPTS = PromptSet("five", ("Hi", "How are you?", "Name a river.", "a", "Tell me more about it, please"), ("",) * 5)


def next_token_log_probs(model: ChatModel, batch: Batch) -> torch.Tensor:
    ((_, logits),) = forward(model, [batch], tokens=1)
    return log_probs(logits[:, -1])


def running(folder: Path) -> ChatModel:
    return load_model(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_single_rows_give(family: str, tiny: Tiny) -> None:
    model = running(tiny(family))
    one, five = (collect(model, PROMPTS, size) for size in (1, 5))
    assert np.allclose(one.mean, five.mean, atol=1e-4) and np.allclose(one.m2, five.m2, atol=1e-3)
    other = collect(model, PromptSet("other", PROMPTS.prompts[:4], ("",) * 4), 1)
    assert not np.allclose(one.mean, other.mean, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_opening_that_is_run_once_changes_no_figure(family: str, tiny: Tiny) -> None:
    model = load_model(tiny(family), device="cpu", dtype="float32", system_prompt="You are brief, and kind.")
    rows = model.chat.encode(PROMPTS.prompts)
    batch = next(batches(model, rows, 3))
    assert batch.shared == len("<s>s") - 2 + len("You are brief, and kind.") + 2
    assert batch.input_ids.shape[1] < min(map(len, rows))
    alone = torch.cat([next_token_log_probs(model, pad_left(model, [row])) for row in rows])
    assert torch.allclose(first_token_log_probs(model, rows, 3), alone, atol=1e-4)
    assert [c.ids for c in generate(model, rows, 6, 3)] == [generate(model, [row], 6, 1)[0].ids for row in rows]
    shared, single = collect(model, PROMPTS, 3), collect(model, PROMPTS, 1)
    first = pad_left(model, rows[:1])
    with torch.inference_mode():
        states = model.model(**first.inputs(), output_hidden_states=True).hidden_states
    one = collect(model, PromptSet("one", PROMPTS.prompts[:1], ("",)))
    assert np.allclose(shared.mean, single.mean, atol=1e-4)
    assert np.allclose(one.mean[0], states[1][0, -one.mean.shape[1] :].numpy(), atol=1e-4)


def test_a_window_shorter_than_the_rows_keeps_every_row_whole(tiny: Tiny) -> None:
    model = load_model(
        tiny("gemma2", sliding_window=16), device="cpu", dtype="float32", system_prompt="You are brief, and kind."
    )
    rows = model.chat.encode(PROMPTS.prompts)
    assert next(batches(model, rows, 3)).shared == 0
    alone = torch.cat([next_token_log_probs(model, pad_left(model, [row])) for row in rows])
    assert torch.allclose(first_token_log_probs(model, rows, 3), alone, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_equal_hidden_states_and_the_last_layer_comes_before_the_final_norm(family: str, tiny: Tiny) -> None:
    model = running(tiny(family))
    rows = model.chat.encode(PROMPTS.prompts[:1])
    stats = collect(model, PromptSet("one", PROMPTS.prompts[:1], ("",)))
    with torch.inference_mode():
        states = model.model(torch.tensor(rows), output_hidden_states=True).hidden_states
    tail = len(model.chat.tail())
    for layer in range(model.n_layers - 1):
        assert np.allclose(stats.mean[layer], states[layer + 1][0, -tail:].numpy(), atol=1e-5)
    last = torch.from_numpy(stats.mean[-1]).float()
    assert not torch.allclose(last, states[-1][0, -tail:], atol=1e-2)
    with torch.inference_mode():
        assert torch.allclose(model.model.base_model.norm(last), states[-1][0, -tail:], atol=1e-3)


def test_without_the_mask_padding_would_change_the_values(tiny: Tiny) -> None:
    model = running(tiny("llama"))
    rows = model.chat.encode(PROMPTS.prompts)
    batch = pad_left(model, rows)
    with torch.inference_mode():
        right = next_token_log_probs(model, batch)
        wrong = model.model(batch.input_ids, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
    shortest = batch.indices.index(min(batch.indices, key=lambda i: len(rows[i])))
    with torch.inference_mode():
        alone = next_token_log_probs(model, pad_left(model, [rows[batch.indices[shortest]]]))
    assert torch.allclose(right[shortest], alone[0], atol=1e-4)
    assert not torch.allclose(wrong[shortest], alone[0], atol=1e-2)


def test_every_chat_has_one_bos_and_the_tail_is_the_templates(tiny: Tiny) -> None:
    model = running(tiny("llama"))
    rows = model.chat.encode(PROMPTS.prompts)
    assert all(row.count(0) == 1 and row[0] == 0 for row in rows)
    assert model.chat.tokenizer.convert_ids_to_tokens(model.chat.tail()) == ["<|end|>", "<|assistant|>", ":"]
    assert all(row[-3:] == model.chat.tail() for row in rows)


def test_a_tokenizer_that_adds_bos_itself_does_not_double_the_templates(tiny: Tiny) -> None:
    from tokenizers.processors import TemplateProcessing

    model = running(tiny("llama"))
    model.chat.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    text = model.chat.render("Hi")
    assert model.chat.tokenizer(text)["input_ids"].count(0) == 2  # what goes wrong where nobody looks
    assert model.chat.encode(["Hi"])[0].count(0) == 1


def test_a_system_prompt_is_rendered_or_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = load_model(tiny("llama"), device="cpu", system_prompt="Be brief.")
    assert "<|system|>Be brief.<|end|>" in model.chat.render("Hi")
    deaf = tmp_path / "deaf.jinja"
    deaf.write_text("{{ bos_token }}{{ messages[-1]['content'] }}<|assistant|>")
    model = load_model(tiny("llama"), device="cpu", system_prompt="Be brief.", chat_template=deaf)
    with pytest.raises(UnsupportedError, match="--system-prompt"):
        model.chat.render("Hi")
    with pytest.raises(UsageError, match=r"missing\.jinja"):
        load_tokenizer(tiny("llama"), tmp_path / "missing.jinja")


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0])
def test_ablation_scales_the_component_and_hooks_end_with_the_block(strength: float, tiny: Tiny) -> None:
    model = running(tiny("llama"))
    rows = pad_left(model, model.chat.encode(PROMPTS.prompts))
    r = torch.nn.functional.normalize(torch.randn(32, generator=torch.manual_seed(3)), dim=0)
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        embedded = model.model.get_input_embeddings()(rows.input_ids) @ r
        with ablate(model, [WriterSite(None, "embed")], r, strength):
            seen.append(model.model.get_input_embeddings()(rows.input_ids) @ r)
        assert torch.allclose(seen[0], (1 - strength) * embedded, atol=1e-5)
        assert torch.equal(model.model.get_input_embeddings()(rows.input_ids) @ r, embedded)
        with pytest.raises(ZeroDivisionError), ablate(model, [WriterSite(None, "embed")], r):
            raise ZeroDivisionError
        assert torch.equal(model.model.get_input_embeddings()(rows.input_ids) @ r, embedded)


def test_rows_carry_directions_of_their_own(tiny: Tiny) -> None:
    model = running(tiny("gemma2"))
    sites = [WriterSite(None, "embed")] + [
        WriterSite(layer, module, norm, 1.0)
        for layer in range(3)
        for module, norm in (
            ("self_attn.o_proj", "post_attention_layernorm.weight"),
            ("mlp.down_proj", "post_feedforward_layernorm.weight"),
        )
    ]
    batch = pad_left(model, model.chat.encode(PROMPTS.prompts))
    many = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.manual_seed(4)), dim=-1)
    with ablate(model, sites, many):
        together = next_token_log_probs(model, batch)
    for row in range(5):
        with ablate(model, sites, many[row]):
            assert torch.allclose(next_token_log_probs(model, batch)[row], together[row], atol=1e-4)
    assert not torch.allclose(next_token_log_probs(model, batch), together, atol=1e-2)


def test_added_vectors_reach_their_layer_and_row_alone(tiny: Tiny) -> None:
    model = running(tiny("qwen3"))
    batch = pad_left(model, model.chat.encode(PROMPTS.prompts[:2]))

    def streams(**added: object) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        with torch.inference_mode(), record_resid_post(model, lambda _l, h: seen.append(h)):
            model.model.base_model(**batch.inputs())
        return torch.stack(seen)

    before = streams()
    vectors = torch.ones(2, 32)
    with add_vectors(model, [1, 2], vectors):
        after = streams()
    assert torch.equal(before[0], after[0])
    assert torch.allclose(after[1, 0], before[1, 0] + 1, atol=1e-5) and torch.equal(after[1, 1], before[1, 1])
    assert torch.allclose(after[2, 1], before[2, 1] + 1, atol=1e-5)


def greedy(model: ChatModel, row: list[int], budget: int) -> list[int]:
    """Greedy tokens behind one row, by whole forward passes without a cache."""
    ids = list(row)
    for _ in range(budget):
        with torch.inference_mode():
            token = int(model.model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in model.stop_ids:
            break
        ids.append(token)
    return ids[len(row) :]


@pytest.mark.parametrize("system_prompt", [None, "You are brief, and kind."])
def test_generation_is_greedy_whatever_the_checkpoint_ships_and_whoever_ends_early(
    system_prompt: str | None, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    plain = load_model(folder, device="cpu", dtype="float32", system_prompt=system_prompt)
    free = [greedy(plain, row, 8) for row in plain.chat.encode(PROMPTS.prompts)]
    # A stop token at which some rows end, at different times, and others do not.
    stop = next(t for t in sorted({t for ids in free for t in ids}) if 0 < sum(t in ids for ids in free) < len(free))
    settings = {"repetition_penalty": 5.0, "temperature": 0.1, "do_sample": True, "eos_token_id": [1, stop]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(folder, device="cpu", dtype="float32", system_prompt=system_prompt)
    assert model.stop_ids == sorted({1, stop})
    rows = model.chat.encode(PROMPTS.prompts)
    expected = [greedy(model, row, 8) for row in rows]
    assert len(set(map(len, expected))) > 1
    for first in (2, 3, 20):
        monkeypatch.setattr(generating, "_FIRST", first)
        made = generate(model, rows, 8, 5)
        assert [c.ids for c in made] == expected
        assert [c.ended for c in made] == [len(ids) < 8 for ids in expected]
    assert [c.ids for c in generate(model, rows, 8, 1)] == expected


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_merged_statistics_equal_those_of_all_rows(n: int, m: int, seed: int) -> None:
    rows = 1000 + np.random.default_rng(seed).normal(size=(n + m, 2, 3, 4))

    def stats(part: np.ndarray) -> ActivationStats:  # type: ignore[type-arg]
        return ActivationStats(
            "resid_post", (-3, -2, -1), len(part), part.mean(0), ((part - part.mean(0)) ** 2).sum(0), "p", "m"
        )

    merged = stats(rows[:n]).merge(stats(rows[n:]))
    assert np.allclose(merged.mean, rows.mean(0), rtol=1e-12)
    assert np.allclose(merged.variance, rows.var(0, ddof=1), rtol=1e-6)


def test_statistics_survive_their_file_and_other_files_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    stats = collect(running(tiny("llama")), PROMPTS)
    stats.save(tmp_path / "stats.safetensors")
    again = ActivationStats.load(tmp_path / "stats.safetensors")
    assert np.array_equal(again.mean, stats.mean) and again.positions == stats.positions and again.count == 5
    (tmp_path / "junk").write_bytes(b"junk")
    for path in (tmp_path / "junk", tmp_path / "missing", tiny("llama") / "model.safetensors"):
        with pytest.raises(CheckpointError, match="activation statistics"):
            ActivationStats.load(path)


def test_the_template_of_the_tests_writes_bos_itself() -> None:
    assert TEMPLATE.startswith("{{ bos_token }}")
