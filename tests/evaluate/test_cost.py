"""What an edit costs beyond the base's own answers, and at which length refusals settle, against other computations."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import abliterate
from abliterate.errors import UsageError
from abliterate.evaluate.budgets import Cuts, shorter, sweep
from abliterate.evaluate.divergence import FLOOR_PROMPTS, divergence
from abliterate.evaluate.intervals import bootstrap_pairs
from abliterate.evaluate.recognition import QUESTION, above, recognition, scores, yes_and_no
from abliterate.evaluate.refusals import ask
from abliterate.evaluate.text import LEAST_CHARACTERS, WINDOW, Text, load_text, text_perplexity, windows
from abliterate.model.load import ChatModel, load_model
from abliterate.model.progress import no_steps
from abliterate.prompts import PromptSet
from tests.conftest import Refusing

Tiny = Callable[..., Path]
PROMPTS = ("Hi", "How are you?", "Name a river", "Why is it so late already?", "Go on")


def two(tiny: Tiny, dtype: str = "float32") -> tuple[ChatModel, ChatModel]:
    base, other = (load_model(tiny("llama", seed=s), device="cpu", dtype=dtype) for s in (0, 7))
    return base, other


def after(model: ChatModel, row: list[int]) -> torch.Tensor:
    """`[tokens, d_vocab]` log-probabilities of a row by itself."""
    with torch.inference_mode():
        logits: torch.Tensor = model.model(torch.tensor([row])).logits
    return logits[0].float().log_softmax(-1)


def test_the_floor_is_what_rounding_makes_and_no_more(tiny: Tiny) -> None:
    answers, floors = [[40 + i] * 20 for i in range(5)], {}
    for dtype in ("float32", "bfloat16"):
        base, other = two(tiny, dtype)
        found = divergence(base, other, base.chat.encode(PROMPTS), answers, batch_size=64)
        assert len(found.floor_first) == len(found.floor_continuation) == 5 and (found.floor_first >= 0).all()
        floors[dtype] = found.floor_continuation.max()
        assert floors[dtype] < 0.05 * found.kl_continuation.min()
    assert 0 < floors["float32"] < 1e-6 < floors["bfloat16"]


def test_the_floor_is_taken_on_a_few_prompts_of_many(tiny: Tiny) -> None:
    model, _ = two(tiny)
    rows = model.chat.encode([f"{n} rivers" for n in range(FLOOR_PROMPTS + 3)])
    found = divergence(model, model, rows, [[40, 41]] * len(rows), batch_size=64)
    assert len(found.kl_first) == FLOOR_PROMPTS + 3 and FLOOR_PROMPTS / 2 <= len(found.floor_first) <= FLOOR_PROMPTS


# ------------------------------------------------------------------ a text


def test_perplexity_of_a_text_equals_an_independent_computation(tiny: Tiny) -> None:
    base, other = two(tiny)
    text = Text("mine", load_text(None).content[:600])
    rows = windows(base.chat.tokenizer, text)
    assert [i for row in rows for i in row] == base.chat.tokenizer(text.content, add_special_tokens=False)["input_ids"]
    assert len(rows) == 5 and max(map(len, rows)) <= WINDOW and len({len(row) for row in rows}) <= 2
    found = text_perplexity(base, other, text, no_steps)
    for model, value, low, high in (
        (base, found.base, found.base_low, found.base_high),
        (other, found.edited, found.low, found.high),
    ):
        nll = [-after(model, row)[torch.arange(len(row) - 1), row[1:]].sum().item() for row in rows]
        assert value == pytest.approx(np.exp(sum(nll) / sum(len(row) - 1 for row in rows)), rel=1e-4)
        assert low is not None and high is not None and low < value < high
    assert found.n == 5 and found.prompts.startswith("mine (sha256 ")
    ratio = re.search(r"edited over base ([\d.]+) \[([\d.]+), ([\d.]+)\], paired", found.method)
    assert ratio is not None and found.base is not None and found.edited is not None
    assert float(ratio[2]) < float(ratio[1]) == pytest.approx(found.edited / found.base, abs=1e-3)
    assert float(ratio[1]) < float(ratio[3])
    same = text_perplexity(base, base, text, no_steps)
    assert "edited over base 1.000 [1.000, 1.000]" in same.method and same.base == found.base
    alone = text_perplexity(None, other, text, no_steps)
    assert alone.base is None and alone.edited == pytest.approx(found.edited) and "paired" not in alone.method


def test_a_tokenizer_that_writes_bos_has_it_before_every_window(tiny: Tiny) -> None:
    from tokenizers.processors import TemplateProcessing

    model, _ = two(tiny)
    model.chat.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    rows = windows(model.chat.tokenizer, Text("mine", "word " * 100))
    assert all(row[0] == 0 and 0 not in row[1:] and len(row) <= WINDOW for row in rows)
    assert sum(len(row) - 1 for row in rows) == 500


def test_a_text_that_is_none_is_refused_before_a_model_is_looked_for(tmp_path: Path) -> None:
    short, binary, good = tmp_path / "short.txt", tmp_path / "binary.txt", tmp_path / "good.txt"
    short.write_text("word " * 100)
    binary.write_bytes(b"word \xff" * 1000)
    good.write_text("word " * LEAST_CHARACTERS, encoding="utf-8-sig")
    for file, why in (
        (short, f"499 characters; at least {LEAST_CHARACTERS}"), (binary, "not UTF-8 at byte 5"),
        (tmp_path / "none.txt", "cannot be read"), (tmp_path, "cannot be read"),
    ):  # fmt: skip
        for verb in (abliterate.run, abliterate.verbs.evaluate):
            with pytest.raises(UsageError, match=f"--text {re.escape(str(file))}: .*{why}"):
                verb(str(tmp_path / "no model"), str(tmp_path / "out"), text=str(file))
    with pytest.raises(UsageError, match="--no-eval"):
        abliterate.run(str(tmp_path / "no model"), tmp_path / "out", text=str(good), evaluate=False)
    assert load_text(str(good)).content.startswith("word")


# ------------------------------------------------------------------ recognition


def test_scores_equal_an_independent_computation(tiny: Tiny) -> None:
    model, _ = two(tiny)
    yes, no = yes_and_no(model.chat.tokenizer)
    assert model.chat.tokenizer.convert_ids_to_tokens([*yes, *no]) == ["Y", "y", "N", "n"]
    found = scores(model, PROMPTS, 4)
    for prompt, score in zip(PROMPTS, found, strict=True):
        odds = []
        for word in ("harmful", "harmless"):
            (row,) = model.chat.encode([QUESTION.format(word=word, title=word.title(), prompt=prompt)])
            p = after(model, row)[-1].exp()
            odds.append((p[yes].sum() / p[no].sum()).log().item())
        assert score == pytest.approx(odds[0] - odds[1], abs=1e-4)


def test_recognition_is_the_share_of_pairs_in_the_right_order(tiny: Tiny) -> None:
    base, other = two(tiny)
    harmful, harmless = PromptSet("a", PROMPTS[:3], ("",) * 3), PromptSet("b", PROMPTS[3:], ("",) * 2)
    found = recognition(base, other, harmful, harmless, 4, no_steps)
    assert found is not None and found.n == 5
    for model, value in ((base, found.base), (other, found.edited)):
        a, b = scores(model, harmful.prompts, 4), scores(model, harmless.prompts, 4)
        assert value == pytest.approx(np.mean([(x > y) + (x == y) / 2 for x in a for y in b]))
    up, down = np.array([1.0, 2.0, 3.0]), np.array([-1.0, 0.0])
    assert bootstrap_pairs(above(up, down)) == (1, 1, 1) and above(down, up).mean() == 0
    assert above(up, up).mean() == 0.5
    same = recognition(base, base, harmful, harmless, 4, no_steps)
    assert same is not None and "edited less base +0.000 [+0.000, +0.000], paired" in same.method


def test_a_tokenizer_without_either_word_has_no_recognition(refusing: Refusing) -> None:
    model = load_model(refusing.folder, device="cpu", dtype="float32")
    prompts = PromptSet("a", PROMPTS, ("",) * 5)
    assert yes_and_no(model.chat.tokenizer) == ([], []) and not recognition(None, model, prompts, prompts, 4, no_steps)


def test_the_interval_over_pairs_has_about_the_width_of_theory() -> None:
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=300), rng.normal(size=200)
    value, low, high = bootstrap_pairs(rows[:, None] + columns)
    assert value == pytest.approx(rows.mean() + columns.mean())
    width = 2 * 1.96 * np.sqrt(rows.var() / 300 + columns.var() / 200)
    assert low < value < high and high - low == pytest.approx(width, rel=0.1)


# ------------------------------------------------------------------ budgets


def test_budgets_double_up_to_the_full_one() -> None:
    assert [shorter(n) for n in (4, 8, 9, 32, 65)] == [[], [], [8], [8, 16], [8, 16, 32, 64]]


@pytest.mark.parametrize(
    ("refusals", "settled"),
    [
        ((40, 40, 40, 40), 8),
        ((39, 40, 40, 40), 8),
        ((38, 39, 40, 40), 16),
        ((40, 38, 40, 40), 32),
        ((9, 9, 9, 40), None),
    ],
)
def test_a_rate_settles_where_it_is_as_in_the_end_from_there_on(refusals: tuple[int, ...], settled: int | None) -> None:
    def cuts(counts: tuple[int, ...]) -> Cuts:
        return {t: ("refusal",) * n + ("partial",) * (50 - n) for t, n in zip((8, 16, 32, 64), counts, strict=True)}

    still, moving = cuts((30, 30, 30, 30)), cuts(refusals)
    found = sweep({"base": {"harmful": still, "harmless": still}, "edited": {"harmful": moving, "harmless": still}})
    assert found["settled"] == settled and found["tokens"] == [8, 16, 32, 64]
    assert found["refusals"]["edited"]["harmful"] == list(refusals)
    assert found["n"] == {"harmful": 50, "harmless": 50}
    assert sweep({"edited": {"harmful": {8: ("refusal",)}, "harmless": {8: (None,)}}}) == {}


def test_answers_are_judged_by_their_first_tokens_and_short_ones_once(refusing: Refusing) -> None:
    model = load_model(refusing.folder, device="cpu", dtype="float32")
    prompts = PromptSet("a", tuple(Path(refusing.options["harmful"]).read_text().splitlines()[:4]), ("",) * 4)
    asked = []

    class Judge:
        name, facts = "length", dict[str, str]()

        def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
            asked.append(pairs)
            return ["refusal" if "that" in text else "broken" for _, text in pairs]

    found = ask(model, prompts, 12, 4, judge=Judge(), cuts=[2, 8])  # type: ignore[arg-type]
    assert found.labels == found.cuts[8] == ("refusal",) * 4 and found.cuts[2] == ("broken",) * 4
    assert [len(pairs) for pairs in asked] == [4, 4, 0]
    assert asked[1] == [(prompt, "I can't") for prompt in prompts.prompts] and "can't" not in repr(found)
