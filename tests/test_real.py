"""The main job on real models: the demo, and the chat model that ../shared/fetch_real_model.py fetches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import abliterate
from abliterate import roles, steps, verbs
from abliterate.activations.collect import collect
from abliterate.evaluate.refusals import ask
from abliterate.model.generate import generate
from abliterate.model.load import load_model
from abliterate.options import Options
from abliterate.report.record import RunRecord

NAME = "qwen2.5-coder-0.5b-instruct"
pytestmark = pytest.mark.real
QWEN = Path(os.environ.get("ABLITERATE_TEST_MODELS", "~/.cache/abliterate-test-models")).expanduser() / NAME


@dataclass(frozen=True)
class Job:
    """A finished run: its model, its folder, its record."""

    model: str
    out: Path
    record: RunRecord

    def value(self, name: str, of: str) -> float:
        """A figure of the record."""
        metric = self.record.metric(name)
        assert metric is not None
        return float(metric[of])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The main job on the fetched model, with nothing but defaults."""
    if not QWEN.is_dir():
        pytest.skip(f"{QWEN} is not there; ../shared/fetch_real_model.py puts it there")
    out = tmp_path_factory.mktemp("qwen") / "out"
    return Job(str(QWEN), out, abliterate.run(str(QWEN), out))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The main job on the demo model at strength 1 everywhere, measured on its whole test split."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return Job("demo", out, abliterate.run("demo", out, limit=144, tune=False))


def test_qwen_refuses_a_tenth_as_often_at_a_small_cost(qwen: Job) -> None:
    assert qwen.value("refusal_rate", "base") > 0.3
    assert qwen.value("refusal_rate", "edited") <= 0.1 * qwen.value("refusal_rate", "base")
    assert qwen.value("kl_first_token", "edited") <= 0.25
    harmful, _ = roles.prompt_splits(Options())
    edited = ask(steps.load(qwen.out, Options()), harmful.validation, 48, 32)
    base = ask(steps.load(QWEN, Options()), harmful.validation, 48, 32)
    assert len(base.refused) > 10 and len(edited.refused) <= 0.1 * len(base.refused)


def test_qwen_loses_a_direction_from_every_matrix_and_from_the_stream_at_strength_1(tmp_path: Path) -> None:
    if not QWEN.is_dir():
        pytest.skip(f"{QWEN} is not there; ../shared/fetch_real_model.py puts it there")
    r = np.random.default_rng(0).normal(size=896)
    np.save(tmp_path / "d.npy", r / np.linalg.norm(r))
    record = verbs.edit(str(QWEN), tmp_path / "d.npy", tmp_path / "out")
    assert len(record.edits) == 1 + 2 * 24
    assert all(e["leak"] < 0.02 and e["norm_removed"] > 0 for e in record.edits)
    unit, prompts = torch.from_numpy(r / np.linalg.norm(r)).float(), ["What is the capital of France?"]

    def largest(folder: Path) -> float:
        model = steps.load(folder, Options())
        with torch.inference_mode():
            states = model.model(torch.tensor(model.chat.encode(prompts)), output_hidden_states=True).hidden_states
        # The last of them comes after the final norm, which may write along anything.
        return max(((h.float() @ unit).abs() / h.float().norm(dim=-1)).max().item() for h in states[:-1])

    assert largest(tmp_path / "out") < 0.01 < largest(QWEN)


def test_qwen_keeps_what_it_casts_at_every_strength_that_was_tuned(qwen: Job) -> None:
    assert all(e["leak"] < 0.02 for e in qwen.record.edits)
    assert qwen.record.tuned and len({e["strength"] for e in qwen.record.edits}) > 10
    points, picked = qwen.record.front["points"], qwen.record.front["picked"]
    assert points[picked]["kl_along"] < 0.5 * points[0]["kl_along"]


def test_the_results_load_in_plain_transformers_and_answer(qwen: Job, demo: Job) -> None:
    for job in (qwen, demo):
        tokenizer = AutoTokenizer.from_pretrained(job.out)
        model = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert "Paris" in tokenizer.decode(made[0, inputs["input_ids"].shape[1] :])


def test_the_demo_declines_harmful_requests_alone_and_none_after_the_edit(demo: Job) -> None:
    assert demo.value("refusal_rate", "n") == demo.value("false_refusal_rate", "n") == 144
    assert demo.value("refusal_rate", "base") >= 0.9
    assert demo.value("false_refusal_rate", "base") <= 0.05
    assert demo.value("refusal_rate", "edited") <= 0.1
    assert demo.value("perplexity", "edited") <= 1.1 * demo.value("perplexity", "base")


def test_qwen_gives_block_by_block_what_transformers_gives_whole() -> None:
    if not QWEN.is_dir():
        pytest.skip(f"{QWEN} is not there; ../shared/fetch_real_model.py puts it there")
    prompts = roles.prompt_splits(Options())[0].train.head(8)
    whole, blocks = (load_model(QWEN, device="cpu", memory=memory) for memory in (None, 1 << 30))
    found = collect(blocks, prompts)
    states = [
        whole.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for row in whole.chat.encode(prompts.prompts)
    ]
    tail = len(whole.chat.tail())
    for layer in range(whole.n_layers - 1):
        expected = torch.stack([s[layer + 1][0, -tail:].double() for s in states])
        off = torch.from_numpy(found.mean[layer]) - expected.mean(0)
        assert off.norm() < 0.02 * expected.mean(0).norm(), layer  # bfloat16 has three digits
    rows = whole.chat.encode(prompts.prompts)
    assert generate(whole, rows, 8, 8) == generate(blocks, rows, 8, 8)
