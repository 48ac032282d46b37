"""A GGUF in motion, in transformers and in llama.cpp: both give what the checkpoint gives that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abliterate import verbs
from abliterate.activations.collect import collect
from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.gguf_decode import decoded
from abliterate.errors import CheckpointError, ResourceError, UnsupportedError, UsageError, VerifyError
from abliterate.evaluate.divergence import divergence
from abliterate.evaluate.text import nll
from abliterate.model.batches import batches
from abliterate.model.generate import generate
from abliterate.model.load import ChatModel, load_model
from abliterate.model.native import AnyModel, load_native
from abliterate.model.run import after_each, forward
from abliterate.options import Options
from abliterate.prompts import PromptSet
from abliterate.roles import prompt_splits
from abliterate.steps import check_runs
from tests.cli.test_main import run_here
from tests.gguf_files import QWEN2, Type, chat_gguf, gguf, of_all_types, tiny_gguf

Tiny = Callable[..., Path]
Made = Callable[..., Path]
PROMPTS = ["Hi", "How are you?", "the thin thing", "Why is it so late already? é😀", "Go  on\n"]
#: One more than the tokenizer has.
SIZE, FOLDER = 263, {"dtype": torch.float32, "vocab_size": 263}


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(family, seed, **options)`: a tiny checkpoint as a GGUF."""

    @cache
    def make(family: str = "llama", seed: int = 0, **options: Any) -> Path:
        folder = tiny(family, seed=seed, **FOLDER)
        return chat_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", folder, **options)

    return make


def whole(path: Path) -> ChatModel:
    return load_model(path, device="cpu", dtype="float32")


def firsts(model: AnyModel, rows: list[list[int]]) -> torch.Tensor:
    return torch.stack(after_each(model, rows, 64, lambda _i, p: p.clone()))


def apart(p: torch.Tensor, q: torch.Tensor) -> float:
    """The largest KL of any row."""
    return float((p.exp() * (p - q)).sum(-1).max())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_engines_give_what_the_checkpoint_gives(family: str, tiny: Tiny, made: Made) -> None:
    path, other = made(family), made(family, 7)
    loaded, native = whole(path), load_native(path)
    rows = native.chat.encode(PROMPTS)
    assert rows == loaded.chat.encode(PROMPTS) and loaded.chat.tail() == native.chat.tail()
    assert rows[2].count(SIZE - 1) == 3 and rows[0][:2] == [0, 3] and 0 not in rows[0][1:]
    wanted = firsts(whole(tiny(family, seed=0, **FOLDER)), rows)
    assert torch.allclose(firsts(loaded, rows), wanted, atol=1e-4)
    assert abs(apart(wanted, firsts(native, rows))) < 1e-4
    assert apart(wanted, firsts(load_native(other), rows)) > 0.1
    assert (native.d_model, native.n_layers) == (loaded.d_model, loaded.n_layers) == (32, 3)
    assert native.chat.tokenizer.get_vocab().items() <= loaded.chat.tokenizer.get_vocab().items()


def test_rotary_factors_are_heeded_by_both(made: Made) -> None:
    path = made(factors=4.0)
    rows = load_native(path).chat.encode(PROMPTS)
    with_them = firsts(load_native(path), rows)
    assert abs(apart(with_them, firsts(whole(path), rows))) < 1e-4
    assert apart(with_them, firsts(whole(made()), rows)) > 1e-2


def test_parts_and_block_types_are_read(made: Made) -> None:
    rows = [[0, 3, *range(40, 60)]]
    split, one = made(kind=Type.Q8_0, split=10), made(kind=Type.Q8_0)
    assert split.name.startswith("model-00001-of-") and one.name == "model.gguf"
    exact = firsts(whole(made()), rows)
    found = [firsts(m, rows) for path in (split, one) for m in (whole(path), load_native(path))]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert 1e-7 < apart(exact, found[0]) < 0.05 and abs(apart(found[0], found[1])) < 0.05
    checkpoint = open_checkpoint(one)
    for tensor, reference in zip(checkpoint.tensors.values(), gguf.GGUFReader(one).tensors, strict=True):
        assert np.array_equal(decoded(one.parent, tensor), gguf.dequantize(reference.data, reference.tensor_type))


def test_every_type_is_decoded_as_the_package_gguf_does(tmp_path: Path) -> None:
    path = of_all_types(tmp_path / "all.gguf")
    tensors, compared = open_checkpoint(path).tensors, 0
    for reference in gguf.GGUFReader(path).tensors:
        with np.errstate(all="ignore"):
            try:
                values = gguf.dequantize(reference.data, reference.tensor_type)
                found = decoded(tmp_path, tensors[reference.name])
            except (NotImplementedError, UnsupportedError):
                continue
            assert np.allclose(found, values, rtol=1e-6, equal_nan=True), reference.name
        compared += 1
    assert compared >= 20


def test_rows_get_the_same_logits_alone_and_together(made: Made) -> None:
    """More rows than are answered at once, of different lengths, one of them shorter than what is asked of it."""
    native = load_native(made())
    rows = [[0, 3, *range(40, 50 + n)] for n in range(20)] + [[0, 3]]
    found = {}
    for batch, logits in forward(native, batches(native, rows, 64, 6), tokens=6):
        assert logits.shape == (len(batch.indices), 6, SIZE)
        found |= dict(zip(batch.indices, logits, strict=True))
    for i, row in enumerate(rows):
        ((_, alone),) = forward(native, batches(native, [row], 1), tokens=6)
        n = min(6, len(row))
        assert torch.allclose(found[i][-n:], alone[0, -n:], atol=1e-2) and found[i][-1].std() > 0.1
    whole_nll, native_nll = nll(whole(made()), rows[:3]), nll(native, rows[:3])
    assert np.allclose(whole_nll, native_nll, rtol=1e-3)


def test_answers_are_greedy_and_end_where_the_model_ends_them(made: Made) -> None:
    """20 rows on 16 sequences: as one ends, another begins in its place."""
    native, loaded = load_native(made()), whole(made())
    rows = native.chat.encode([f"Tell {n} things" for n in range(20)])
    ours, theirs = (generate(m, rows, 12, 64) for m in (native, loaded))
    same = [a.ids == b.ids and a.text == b.text for a, b in zip(ours, theirs, strict=True)]
    assert sum(same) >= 18  # a tie of two tokens may fall either way
    assert len({a.text for a in ours}) > 3
    first = ours[0].ids[2]
    stopped = generate(type(native)(native.engine, native.chat, [first]), rows[:1], 12, 64)[0]
    assert stopped.stop == first and stopped.ids == ours[0].ids[: ours[0].ids.index(first)]


def test_itself_is_no_further_than_noise_and_an_edit_is(made: Made) -> None:
    base, other = load_native(made()), load_native(made(seed=7))
    rows, answers = base.chat.encode(PROMPTS), [[40 + i] * 8 for i in range(len(PROMPTS))]
    itself, edited = (divergence(base, m, rows, answers, 64) for m in (load_native(made()), other))
    assert itself.kl_continuation.max() < 1e-6 and edited.kl_continuation.min() > 0.1
    assert itself.floor_continuation.max() < 1e-3


# ------------------------------------------------------------------ verbs


def test_eval_runs_gguf_files_on_llama_cpp(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other, found = str(made()), str(made(seed=7)), {}
    (tmp_path / "text.txt").write_text("Some of this and some of that. " * 70)
    options = ["--limit", "8", "--max-new-tokens", "4", "--text", str(tmp_path / "text.txt"), "--json"]
    in_torch = [other, "--engine", "transformers", "--dtype", "float32"]
    for name, words in {"same": [base], "other": [other], "whole": in_torch}.items():
        assert run_here("eval", *words, "--base", base, *options) == 0
        printed = capsys.readouterr()
        assert "llama" not in printed.err
        found[name] = json.loads(printed.out)
    kl = {k: {m["name"]: m["edited"] for m in v["metrics"]}["kl_first_token"] for k, v in found.items()}
    assert kl["same"] < 1e-6 and kl["other"] > 0.1 and kl["whole"] == pytest.approx(kl["other"], rel=1e-2)
    assert [v["engine"] for v in found.values()] == ["llama.cpp", "llama.cpp", "transformers"]
    assert found["other"]["verdicts"] == found["whole"]["verdicts"]
    assert {m["name"] for m in found["other"]["metrics"]} == {m["name"] for m in found["whole"]["metrics"]}


def test_collect_takes_a_gguf(made: Made, tiny: Tiny, tmp_path: Path) -> None:
    found = verbs.collect(
        str(made()), tmp_path / "one", limit=8, device="cpu", dtype="float32", generate=False, force=True
    )
    assert found.harmful.count == 8 and found.harmful.model == open_checkpoint(made()).fingerprint
    prompts, loaded, other = PromptSet("ours", tuple(PROMPTS), ("",) * len(PROMPTS)), whole(made()), whole(made(seed=7))
    folder = replace(whole(tiny("llama", seed=0, **FOLDER)), chat=loaded.chat)  # it lacks the merge
    one, two, apart = (collect(model, prompts).mean for model in (loaded, folder, other))
    assert np.allclose(one, two, atol=1e-4) and not np.allclose(one, apart, atol=1)


def test_transformers_must_take_a_gguf_for_what_llama_cpp_takes_it_for(made: Made) -> None:
    loaded, prompts = whole(made()), prompt_splits(Options(limit=8))[0]
    check_runs(loaded, open_checkpoint(made()), prompts)
    with pytest.raises(VerifyError, match=r"model\.gguf: transformers takes it for another model.*safetensors"):
        check_runs(loaded, open_checkpoint(made(seed=7)), prompts)


def test_what_cannot_be_run_is_refused_with_the_way_out(made: Made, tiny: Tiny, tmp_path: Path) -> None:
    path, folder = str(made()), str(tiny("llama", seed=0, **FOLDER))
    with pytest.raises(UsageError, match=r"--engine llama\.cpp: runs GGUF files, and .* is none"):
        verbs.evaluate(folder, engine="llama.cpp")
    with pytest.raises(UsageError, match=r"--dtype float32: llama\.cpp computes.*--engine transformers"):
        verbs.evaluate(path, dtype="float32")
    with pytest.raises(UsageError, match=r"--engine ollama: expected"):
        verbs.evaluate(path, engine="ollama")
    with pytest.raises(ResourceError, match=r"llama\.cpp takes about 1\.\d GB"):
        verbs.evaluate(path, memory="100MB")
    with pytest.raises(ResourceError, match=r"a GGUF does not run block by block"):
        verbs.collect(path, tmp_path / "out", memory="100MB")
    unknown = tiny_gguf(tmp_path / "unknown.gguf", "plamo", [QWEN2])
    with pytest.raises(UnsupportedError, match=r"architecture 'plamo'.*abliterate edit unknown\.gguf --direction"):
        load_model(unknown)
    with pytest.raises(CheckpointError, match=r"unknown\.gguf: llama\.cpp cannot load it \(.+\)"):
        load_native(unknown)
    bare = chat_gguf(tmp_path / "bare.gguf", tiny("llama", seed=0, template=None, **FOLDER))
    for load in (load_model, load_native):
        with pytest.raises(UnsupportedError, match=r"bare\.gguf: .*--chat-template FILE"):
            load(bare)
    (tmp_path / "template").write_text("{{ messages[0]['content'] }}:")
    assert load_native(bare, chat_template=tmp_path / "template").chat.render("Hi") == "Hi:"
