"""What a run measures is of prompts it has not seen: for all ways to name sets, by hashes, by what the model reads."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import abliterate
from abliterate import pipeline, roles, steps, verbs
from abliterate.errors import PromptError
from abliterate.model.chat import ChatFormat
from abliterate.options import Options
from abliterate.prompts import PromptSet, Splits, builtin, check_unseen, split
from abliterate.prompts.promptset import words
from abliterate.report.record import RunRecord
from tests.conftest import Refusing
from tests.organism import HARMFUL_VERBS, HARMLESS_VERBS, requests


def shared(harmful: Splits, harmless: Splits, borderline: PromptSet) -> set[str]:
    """Requests, in lower-case words, that are both fitted or chosen on and tested on."""
    fitted = {words(p) for s in (harmful, harmless) for part in s[:2] for p in part.prompts}
    return fitted & {words(p) for part in (harmful.test, harmless.test, borderline) for p in part.prompts}


def noisy(given: list[str]) -> list[str]:
    """The same requests twice, the second time in other case and punctuation, far from the first."""
    return [*given, *(p.upper().replace(" ?", "!?") for p in given)]


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    """Sets of a person's own: few words in many prompts, each twice; the harmless one holds borderline ones of ours."""
    ours = list(builtin("borderline", "test").prompts)
    sets = {
        "harmful": noisy(requests(HARMFUL_VERBS)), "harmless": noisy([*requests(HARMLESS_VERBS), *ours[:60]]),
        "borderline": noisy([*ours[:70], *requests(HARMLESS_VERBS)[:10]]),
    }  # fmt: skip
    for kind, prompts in sets.items():
        (tmp_path / f"{kind}.txt").write_text("\n".join(prompts))
    return {kind: str(tmp_path / f"{kind}.txt") for kind in sets}


@pytest.mark.parametrize("limit", [None, 8, 500])
@pytest.mark.parametrize("part", [None, "1/3"])
@pytest.mark.parametrize("given", [(), ("harmful", "harmless"), ("borderline",), ("harmful", "harmless", "borderline")])
def test_no_prompt_is_in_two_parts(
    given: tuple[str, ...], part: str | None, limit: int | None, own: dict[str, str]
) -> None:
    for seed in (0, 1):
        options = Options(limit=limit, prompts=part, seed=seed, **{kind: own[kind] for kind in given})  # type: ignore[arg-type]
        harmful, harmless = roles.prompt_splits(options)
        borderline = roles.borderline_prompts(options, harmful, harmless)
        assert all(map(len, (*harmful, *harmless, borderline)))
        assert not shared(harmful, harmless, borderline)
        check_unseen((harmful, harmless), borderline)
        hashes = [part.sha256 for part in (*harmful, *harmless, borderline)]
        assert len(set(hashes)) == 7


def test_the_same_words_stay_together_however_far_apart_they_stand() -> None:
    many = [" ".join(four) for four in itertools.product("abcdef", "ghijkl", "mnopqr", "stuvwx")]
    found = split(PromptSet("many", (*many, *(p.upper() for p in many)), ("",) * 2 * len(many)), 0)
    parts = [{words(p) for p in part.prompts} for part in found]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def leaking() -> dict[str, tuple[Splits, Splits, PromptSet]]:
    """Sets of which one test prompt, in other case, is one that is fitted or chosen on."""
    harmful, harmless = roles.prompt_splits(Options(limit=8))
    borderline = builtin("borderline", "test").head(8)

    def more(part: PromptSet, prompt: str) -> PromptSet:
        return PromptSet(part.name, (*part.prompts, prompt.upper()), (*part.categories, ""))

    return {
        "within": (harmful._replace(test=more(harmful.test, harmful.train.prompts[3])), harmless, borderline),
        "across": (harmful, harmless._replace(test=more(harmless.test, harmful.validation.prompts[0])), borderline),
        "borderline": (harmful, harmless, more(borderline, harmless.train.prompts[7])),
    }


@pytest.mark.parametrize("where", ["within", "across", "borderline"])
def test_a_leak_stops_a_run_before_anything_is_loaded(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    harmful, harmless, borderline = leaking()[where]
    assert len(shared(harmful, harmless, borderline)) == 1
    monkeypatch.setattr(roles, "prompt_splits", lambda _o: (harmful, harmless))
    monkeypatch.setattr(roles, "borderline_prompts", lambda *_a: borderline)
    for go in (lambda: abliterate.run("no/such", tmp_path / "out"), lambda: verbs.evaluate("no/such")):
        with pytest.raises(PromptError, match="1 test prompts are among those the direction is found on"):
            go()


def read(monkeypatch: pytest.MonkeyPatch, refusing: Refusing, out: Path) -> tuple[RunRecord, set[str], set[str]]:
    """A run's record, and which requests of its two sets the model reads until the comparison, and in it."""
    texts: tuple[list[str], list[str]] = ([], [])
    encode, compare, at = ChatFormat.encode, steps.compare, [0]

    def spy(self: ChatFormat, prompts: Any, *args: Any, **options: Any) -> Any:
        texts[at[0]].extend(prompts)
        return encode(self, prompts, *args, **options)

    def compared(*args: Any, **options: Any) -> Any:
        at[0] = 1
        return compare(*args, **options)

    monkeypatch.setattr(ChatFormat, "encode", spy)
    monkeypatch.setattr(steps, "compare", compared)
    record = abliterate.run(str(refusing.folder), out, generate=False, **refusing.options)
    known = requests(HARMFUL_VERBS + HARMLESS_VERBS)
    before, after = ({p for p in known if any(p in text for text in of)} for of in texts)
    return record, before, after


def test_the_model_reads_test_prompts_in_the_comparison_alone_and_the_record_proves_it(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, before, after = read(monkeypatch, refusing, tmp_path / "out")
    options = Options(harmful=refusing.options["harmful"], harmless=refusing.options["harmless"])
    sets = dict(zip(("harmful", "harmless"), roles.prompt_splits(options), strict=True))
    assert not before & after
    assert before == {p for splits in sets.values() for part in splits[:2] for p in part.prompts}
    assert after == {p for splits in sets.values() for p in splits.test.prompts}
    for kind, splits in sets.items():
        for name, part in splits._asdict().items():
            proof = record.prompts[kind][name]
            assert proof["sha256"] == part.sha256 and proof["n"] == len(part)
    assert record.prompts["borderline"]["test"]["sha256"] == builtin("borderline", "test").head(64).sha256


def test_a_comparison_on_what_was_fitted_would_be_seen(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    honest = steps.compare

    def cheating(base: Any, edited: Any, sets: roles.Sets, *args: Any, **options: Any) -> Any:
        fitted = sets.harmful._replace(test=sets.harmful.train)
        return honest(base, edited, dataclasses.replace(sets, harmful=fitted), *args, **options)

    monkeypatch.setattr(steps, "compare", cheating)
    _, before, after = read(monkeypatch, refusing, tmp_path / "out")
    assert before & after


def test_a_resumed_run_names_the_borderline_set_that_was_measured(
    refusing: Refusing, own: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_a: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "finish", stop)
        abliterate.run(str(refusing.folder), tmp_path / "out", generate=False, **refusing.options)
    options = refusing.options | {"borderline": own["borderline"]}
    record = abliterate.run(str(refusing.folder), tmp_path / "out", generate=False, resume=True, **options)
    assert record.prompts["borderline"]["test"]["name"] == "built-in borderline"
    stored = json.loads((tmp_path / "out" / "abliteration" / "run.json").read_text())
    assert stored["prompts"] == dataclasses.asdict(record)["prompts"]
