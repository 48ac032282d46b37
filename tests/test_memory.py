"""A bound on memory changes how a model runs, not what comes out; parts of the prompts merge to the whole."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import abliterate
from abliterate import steps, verbs
from abliterate.direction.direction import Direction
from abliterate.errors import CheckpointError, NoRefusalError, ResourceError, UsageError
from abliterate.model import memory
from abliterate.options import Options, parse_bytes, parse_part
from abliterate.report.record import RunRecord
from tests.conftest import Refusing
from tests.schemas import problems


@pytest.mark.parametrize(
    ("text", "expected"), [("4GiB", 4 << 30), ("4G", 4 * 10**9), ("3.5 gb", 3_500_000_000), ("1000", 1000)]
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "four", "4XB", "-1", "0", "1e9", "9" * 400 + "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        Options(memory=text).check()


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "1/0"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--prompts"):
        Options(prompts=text).check()
    assert parse_part("3/4") == (3, 4)


def _direction(folder: Path) -> Any:
    return Direction.load(folder / "abliteration" / "directions.safetensors").vector


@pytest.mark.parametrize("generate", [True, False])
def test_a_run_within_a_bound_gives_what_a_run_without_one_gives(
    generate: bool,
    refusing: Refusing,
    finished: tuple[RunRecord, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "_ANSWERS", 1000)
    monkeypatch.setattr(memory, "_FLOOR", 1000)  # or a tiny model would fit whole wherever it fits at all
    options = refusing.options | {"generate": generate}
    free, out = finished
    if not generate:
        out = tmp_path / "free"
        free = abliterate.run(str(refusing.folder), out, **options)
    with caplog.at_level(logging.INFO, "abliterate"):
        tight = abliterate.run(str(refusing.folder), tmp_path / "tight", memory="150MB", **options)
    assert "block by block: about" in caplog.text and ("--no-generate" in caplog.text) == generate
    assert free.verdicts == tight.verdicts and free.observed == tight.observed
    assert not generate or free.verdicts["base"]["harmful"]["refusal"] > 0
    for one, other in zip(free.metrics, tight.metrics, strict=True):
        assert one["name"] == other["name"] and one["edited"] == pytest.approx(other["edited"], abs=1e-3)
    assert abs(_direction(out) @ _direction(tmp_path / "tight")) > 1 - 1e-6


def test_a_bound_that_nothing_fits_in_is_refused_before_the_work(refusing: Refusing, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="raise --memory"):
        abliterate.run(str(refusing.folder), tmp_path / "out", memory="10MB", **refusing.options)
    assert not (tmp_path / "out.partial").exists()


def test_without_generation_first_tokens_tell(refusing: Refusing, tmp_path: Path) -> None:
    record = abliterate.run(str(refusing.folder), tmp_path / "out", generate=False, **refusing.options)
    assert not problems(record.as_dict, "run")
    metrics = {m["name"]: m for m in record.metrics}
    scores = ["refusal_score", "refusal_score_harmless", "refusal_score_borderline"]
    assert list(metrics) == [*scores, "kl_first_token", "perplexity_text", "leak"]
    assert 0 <= metrics["kl_first_token"]["base"] < 1e-6
    assert metrics["refusal_score"]["base"] > 0 > metrics["refusal_score"]["edited"]
    assert metrics["refusal_score_harmless"]["base"] < 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "No answers were written" in card and "Broken answers" not in card
    assert record.verdicts == {} and record.observed["refusal_tokens"]
    with pytest.raises(UsageError, match="--base"):
        verbs.evaluate(str(tmp_path / "out"), generate=False, **refusing.options)


def test_without_generation_a_model_that_opens_all_alike_has_no_refusal(
    tiny: Callable[..., Path], refusing: Refusing, tmp_path: Path
) -> None:
    random = str(tiny("llama"))
    with pytest.raises(NoRefusalError, match="--force"):
        abliterate.run(random, tmp_path / "out", generate=False, **refusing.options)
    forced = abliterate.run(random, tmp_path / "out", generate=False, force=True, **refusing.options)
    names = ["kl_first_token", "perplexity_text", "recognition", "leak"]
    assert forced.observed["refusal_tokens"] == [] and [m["name"] for m in forced.metrics] == names


@pytest.mark.parametrize("n", [2, 3])
def test_parts_of_the_prompts_merge_to_the_whole(n: int, refusing: Refusing, tmp_path: Path) -> None:
    whole = verbs.collect(str(refusing.folder), tmp_path / "whole", **refusing.options)
    parts = [tmp_path / f"part-{i}" for i in range(n)]
    for i, part in enumerate(parts):
        verbs.collect(str(refusing.folder), part, prompts=f"{i}/{n}", **refusing.options)
    merged = verbs.merge(list(parts), tmp_path / "merged")
    for name in ("harmful_train", "harmful_validation", "harmless_train", "harmless_validation", "tokens", "refused"):
        assert getattr(merged.observed, name) == getattr(whole.observed, name), name
    for kind in ("harmful", "harmless"):
        one, other = getattr(whole, kind), getattr(merged, kind)
        assert one.count == other.count > 0
        assert np.allclose(one.mean, other.mean, atol=1e-4) and np.allclose(one.m2, other.m2, rtol=1e-3, atol=1e-2)
    r = [
        verbs.select(str(refusing.folder), tmp_path / f, tmp_path / f"{f}.r", **_choice(refusing))
        for f in ("whole", "merged")
    ]
    assert abs(r[0].vector @ r[1].vector) > 1 - 1e-5
    with pytest.raises(UsageError, match="share prompts"):
        verbs.merge([parts[0], parts[0]], tmp_path / "twice")
    other = verbs.collect(str(refusing.folder), tmp_path / "limited", **(refusing.options | {"limit": 8}))
    assert other.harmful.count > 0
    with pytest.raises(UsageError, match="other options"):
        verbs.merge([parts[0], tmp_path / "limited"], tmp_path / "mixed")


def _choice(refusing: Refusing) -> dict[str, Any]:
    return {k: v for k, v in refusing.options.items() if k in ("layer", "position", "device", "dtype")}


def test_a_collection_that_was_interrupted_goes_on(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any, **__: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(steps, "collect_both", stop)
        verbs.collect(str(refusing.folder), tmp_path / "out", **refusing.options)
    with pytest.raises(UsageError, match="--resume"):
        verbs.collect(str(refusing.folder), tmp_path / "out", **refusing.options)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "observe", stop)
        verbs.collect(str(refusing.folder), tmp_path / "out", resume=True, **refusing.options)
    assert verbs.Collected.load(tmp_path / "out").harmful.count > 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "harmful.safetensors", "harmless.safetensors", "observed.json",
    ]  # fmt: skip


def own_prompts(refusing: Refusing, folder: Path) -> dict[str, Any]:
    """The options of a refusing model, with prompt files of our own to change."""
    found = dict(refusing.options)
    for kind in ("harmful", "harmless"):
        found[kind] = str(Path(shutil.copy(found[kind], folder / f"{kind}.txt")))
    return found


def test_other_prompts_under_the_same_name_are_not_gone_on_with(
    refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = own_prompts(refusing, tmp_path)
    parts = [tmp_path / str(i) for i in range(2)]
    options = {k: v for k, v in options.items() if k not in ("layer", "position")}
    verbs.collect(str(refusing.folder), parts[0], prompts="0/2", **options)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steps, "collect_both", stop)
        verbs.collect(str(refusing.folder), parts[1], prompts="1/2", **options)
    harmful = Path(options["harmful"])
    harmful.write_text("\n".join(reversed(harmful.read_text().splitlines()[1:])) + "\n")
    with pytest.raises(UsageError, match="other settings"):
        verbs.collect(str(refusing.folder), parts[1], prompts="1/2", resume=True, **options)
    shutil.rmtree(tmp_path / "1.partial")
    verbs.collect(str(refusing.folder), parts[1], prompts="1/2", **options)
    with pytest.raises(UsageError, match="harmful prompts are not those in"):
        verbs.merge(list(parts), tmp_path / "merged")
    with pytest.raises(UsageError, match="harmful prompts are not those now"):
        verbs.select(str(refusing.folder), parts[0], tmp_path / "d.safetensors", device="cpu", dtype="float32")
    record = parts[0] / "observed.json"
    value = json.loads(record.read_text())
    value["observed"]["harmful_train"].pop()
    record.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="do not belong together"):
        verbs.Collected.load(parts[0])


def test_a_template_that_cannot_be_read_leaves_nothing(refusing: Refusing, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing"):
        verbs.collect(str(refusing.folder), tmp_path / "out", chat_template=str(tmp_path / "missing.jinja"))
    assert not list(tmp_path.iterdir())


def test_a_part_with_too_few_prompts_is_told_as_such(refusing: Refusing, tmp_path: Path) -> None:
    with pytest.raises(NoRefusalError, match="larger parts"):
        verbs.collect(str(refusing.folder), tmp_path / "part", prompts="0/1000", **refusing.options)
