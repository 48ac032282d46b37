"""Intervals, divergence and the list of metrics, against independent computations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from abliterate.errors import PromptError, VerifyError
from abliterate.evaluate.divergence import divergence
from abliterate.evaluate.evaluation import Questions, evaluate_alone, evaluate_pair
from abliterate.evaluate.intervals import bootstrap, mean, wilson
from abliterate.model.load import load_model
from abliterate.model.progress import no_steps
from abliterate.options import Options
from abliterate.prompts import PromptSet
from abliterate.report.card import model_card
from abliterate.report.figures import COLUMNS
from abliterate.report.record import RunRecord
from abliterate.report.table import print_metrics
from abliterate.roles import borderline_prompts, prompt_splits
from tests.conftest import Refusing

Tiny = Callable[..., Path]


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_within_nought_and_one(hits: tuple[int, int]) -> None:
    value, low, high = wilson(*hits)
    assert 0 <= low <= value <= high <= 1 and value == hits[0] / hits[1]
    assert high - low > wilson(hits[0] * 10, hits[1] * 10).high - wilson(hits[0] * 10, hits[1] * 10).low


def test_wilson_gives_the_published_values() -> None:
    assert wilson(0, 20).high == pytest.approx(0.1611, abs=1e-4)
    assert wilson(5, 10)[1:] == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_the_bootstrap_interval_has_about_the_width_of_theory() -> None:
    rows = np.random.default_rng(0).normal(size=400)
    value, low, high = bootstrap(rows, mean)
    assert low < value < high and (high - low) == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap(rows, mean) == (value, low, high)


def test_divergence_equals_an_independent_computation(tiny: Tiny) -> None:
    base, other = (load_model(tiny("llama", seed=s), device="cpu", dtype="float32") for s in (0, 7))
    prompts = base.chat.encode(["Hi", "How are you?", "Name a river"])
    answers = [[40, 41, 42], [50], [60, 61]]
    found = divergence(base, other, prompts, answers, batch_size=8)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.inference_mode():
            p, q = (m.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1) for m in (base, other))
        at = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        kl = [torch.nn.functional.kl_div(q[t], p[t], log_target=True, reduction="sum").item() for t in at]
        assert found.kl_first[i] == pytest.approx(kl[0], rel=1e-3)
        assert found.kl_continuation[i] == pytest.approx(np.mean(kl), rel=1e-3)
        for nll, x in ((found.base_nll, p), (found.other_nll, q)):
            assert nll[i] == pytest.approx(-sum(x[t, a].item() for t, a in zip(at, answer, strict=True)), rel=1e-4)
    assert found.base_perplexity.value == pytest.approx(np.exp(found.base_nll.sum() / 6))
    alone = divergence(base, other, prompts, answers, batch_size=1)
    assert np.allclose(alone.kl_continuation, found.kl_continuation, rtol=1e-3)
    same = divergence(base, base, prompts, answers, batch_size=8)
    assert np.abs(same.kl_first).max() < 1e-6 < found.kl_first.min()


@pytest.fixture
def questions(refusing: Refusing) -> Questions:
    sets = []
    for kind in ("harmful", "harmless"):
        lines = tuple(Path(refusing.options[kind]).read_text().splitlines()[:10])
        sets.append(PromptSet(kind, lines, ("",) * 10))
    mixed = PromptSet("borderline", sets[0].prompts[:3] + lines[:7], ("",) * 10)
    return Questions(*sets, mixed, max_new_tokens=12, batch_size=4)


def test_a_model_against_itself_has_not_moved(refusing: Refusing, questions: Questions) -> None:
    model = load_model(refusing.folder, device="cpu", dtype="float32")
    found = evaluate_pair(model, model, questions, no_steps)
    values = {m.name: m for m in found.metrics}
    assert values["refusal_rate"].base == values["refusal_rate"].edited == 1.0
    assert values["false_refusal_rate"].edited == 0.0
    assert values["borderline_refusal_rate"].base == values["borderline_refusal_rate"].edited == 0.3
    assert values["kl_first_token"].edited == pytest.approx(0, abs=1e-6)
    assert values["perplexity"].base == values["perplexity"].edited
    assert all(m.n == 10 for m in found.metrics if m.name != "perplexity_text")
    text = values["perplexity_text"]
    assert text.base == text.edited and text.n > 10
    alone = evaluate_alone(model, questions, no_steps)
    assert [m.name for m in alone.metrics] == [
        "refusal_rate",
        "false_refusal_rate",
        "borderline_refusal_rate",
        "perplexity_text",
    ]
    assert alone.metrics[0].base is None and alone.metrics[0].edited == 1.0
    assert found.charts["budgets"]["tokens"] == [8, 12] and found.charts["budgets"]["settled"] == 8
    assert alone.charts["budgets"]["refusals"] == {
        "edited": {"harmful": [10, 10], "harmless": [0, 0], "borderline": [3, 3]}
    }
    assert "help with that" not in json.dumps(asdict(found))


def test_models_of_different_vocabularies_are_not_compared(
    refusing: Refusing, questions: Questions, tiny: Tiny
) -> None:
    a, b = (load_model(f, device="cpu", dtype="float32") for f in (refusing.folder, tiny("llama")))
    with pytest.raises(VerifyError, match="vocabularies"):
        evaluate_pair(a, b, questions, no_steps)


def metric(name: str, base: float | None, edited: float, low: float | None = None) -> dict[str, Any]:
    b = {"base": base, "base_low": low or base, "base_high": base}
    return {
        "name": name,
        "prompts": "p",
        **b,
        "edited": edited,
        "low": low or edited,
        "high": edited,
        "n": 144,
        "method": "m",
    }


def test_the_table_fits_80_columns_and_says_what_is_retained(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        metric("refusal_rate", 1.0, 0.999, 0.9), metric("false_refusal_rate", 0.125, 0.0),
        metric("kl_first_token", None, 12.345), metric("kl_continuation", 1.2e-8, 0.0001),
        metric("perplexity", 12.5, 25.0), metric("leak", 0.5, 0.0001),
        metric("perplexity_text", 212.5, 200.0), metric("recognition", 0.91, 0.88),
    ]  # fmt: skip
    charts = {"budgets": {"tokens": [8, 16, 32], "settled": 16}}
    print_metrics(Console(width=80), rows, {"base": {"harmful": {"broken": 1, "refusal": 3}}}, charts)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    table = [line for line in lines if line.strip() and "─" not in line]
    assert table[0].split() == list(COLUMNS)
    assert all(line.rstrip().endswith("144") for line in table[1:9])
    assert "50.0%" in table[5] and "12.5 [12.5, 12.5]" in table[5]
    assert "0.01% [0.01, 0.01]" in table[6]
    assert table[4].split()[3:5] == ["noise", "1e-08"] and table[4].split()[-2] == "–"
    assert "106.2%" in table[7] and table[8].split()[-2] == "–"
    assert "the refusal rate settles at 16 of 32 tokens" in lines
    charts["budgets"]["settled"] = None
    print_metrics(Console(width=80), rows, {}, charts)
    assert "has not settled by 32 tokens" in capsys.readouterr().out


def test_the_record_survives_its_file(finished: tuple[RunRecord, Path], tmp_path: Path) -> None:
    finished[0].save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path / "run.json") == finished[0]


def test_the_card_carries_provenance_and_the_table(finished: tuple[RunRecord, Path], refusing: Refusing) -> None:
    card = (finished[1] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ") and f"`{refusing.folder}` with its refusal direction" in card
    assert "layer 2, position -1" in card and "| refusals |" in card and "abliteration/run.json" in card


def test_the_card_links_a_hub_id_and_no_folder(finished: tuple[RunRecord, Path], tmp_path: Path) -> None:
    record = dataclasses.replace(finished[0], model="org/chat-1B@main", hub_id="org/chat-1B")
    card = model_card(record, "edited")
    assert card.startswith("---\nbase_model: org/chat-1B\n")
    assert "[org/chat-1B@main](https://huggingface.co/org/chat-1B) with its" in card


def test_borderline_requests_are_all_asked_but_for_those_that_the_direction_is_found_on(tmp_path: Path) -> None:
    options = Options(limit=8)
    harmful, harmless = prompt_splits(options)
    asked = [f"How do I kill process number {i} ?" for i in range(11)]
    file = tmp_path / "borderline.txt"
    file.write_text("\n".join([*asked, harmless.train.prompts[0], harmless.test.prompts[0]]))
    found = borderline_prompts(replace(options, borderline=str(file), limit=None), harmful, harmless)
    assert found.prompts == (*asked, harmless.test.prompts[0])
    assert len(borderline_prompts(options)) == 8 and len(borderline_prompts(Options())) == 64
    file.write_text("\n".join(harmless.train.prompts))
    with pytest.raises(PromptError, match="found on every prompt"):
        borderline_prompts(replace(options, borderline=str(file)), harmful, harmless)
