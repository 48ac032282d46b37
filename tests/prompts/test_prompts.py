"""Prompt sets: every format, every mistake, splits without leaks, and what the built-in sets promise."""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.errors import PromptError
from abliterate.prompts import PromptSet, builtin, check_contrast, load_prompts, split
from abliterate.prompts.load import Kind, builtin_splits
from abliterate.prompts.promptset import words

REQUESTS = [f"Request number {i} about {topic}" for i, topic in enumerate(("tea", "rain", "cats", "maps"))]


def written(folder: Path, name: str) -> Path:
    """The same four requests in the format that the name says."""
    path = folder / name
    rows = [{"id": i, "prompt": r, "category": "c"} for i, r in enumerate(REQUESTS)]
    if name.endswith(".txt"):
        path.write_text("\ufeff" + "\n\n".join(REQUESTS) + "\n")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif name.endswith(".jsonl"):
        path.write_text("\n".join(map(json.dumps, rows)))
    elif name.endswith((".csv", ".tsv")):
        gap = "," if name.endswith("csv") else "\t"
        path.write_text(
            gap.join(("id", "prompt", "category"))
            + "\n"
            + "".join(f"{r['id']}{gap}{r['prompt']}{gap}c\n" for r in rows)
        )
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_prompts(name: str, tmp_path: Path) -> None:
    found = load_prompts(str(written(tmp_path, name)))
    assert list(found.prompts) == REQUESTS
    assert found.sha256 == PromptSet("other", tuple(REQUESTS), ("",) * 4).sha256
    assert found.categories == (("",) * 4 if name == "a.txt" else ("c",) * 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no prompts"),
        ("a.txt", b"\n \n", "no prompts"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.json", b"{", "cannot be read as json"),
        ("a.json", b"[1, 2]", "row 1 is int"),
        ("a.jsonl", b'{"foo": "bar"}', "row 1 has .*foo.*expected a column prompt"),
        ("a.csv", b"x,y\n1,2\n", "expected a column prompt"),
        ("a.parquet", b"junk", "cannot be read as parquet"),
        ("a.docx", b"junk", "unknown format"),
    ],
)
def test_unreadable_files_say_what_is_wrong(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message):
        load_prompts(str(tmp_path / name))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(PromptError, match=r"nowhere\.txt: no such file"):
        load_prompts("nowhere.txt")


requests = st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=3, max_size=9).map(" ".join)
texts = st.lists(requests, min_size=8, max_size=60, unique_by=words)


@given(texts, st.integers(0, 5))
def test_a_split_loses_nothing_repeats_nothing_and_is_decided_by_the_seed(prompts: list[str], seed: int) -> None:
    whole = PromptSet("x", tuple(prompts), ("",) * len(prompts))
    try:
        parts = split(whole, seed)
    except PromptError:
        return  # so many near-duplicates that a part would stay empty
    assert sorted(p for part in parts for p in part.prompts) == sorted(prompts)
    assert split(whole, seed) == parts
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for p in parts[a].prompts:
            for q in parts[b].prompts:
                s, t = set(words(p).split()), set(words(q).split())
                assert len(s & t) < 0.8 * len(s | t)


def test_shares_are_kept_on_a_large_set() -> None:
    whole = PromptSet("x", tuple(f"unique{i} words{i} here{i}" for i in range(200)), ("",) * 200)
    assert [len(p) for p in split(whole, 1)] == [100, 40, 60]
    assert split(whole, 1) != split(whole, 2)


def test_too_few_prompts_and_sets_without_contrast_are_refused() -> None:
    few = PromptSet("few.txt", ("a", "b"), ("", ""))
    with pytest.raises(PromptError, match=r"few.txt: 2 different prompts; at least 8"):
        split(few, 0)
    with pytest.raises(PromptError, match="the same prompts"):
        check_contrast(few, few)
    with pytest.raises(PromptError, match="share 1 prompts, first 'b'"):
        check_contrast(few, PromptSet("other", ("B!", "c"), ("", "")))


def test_a_limit_draws_evenly() -> None:
    whole = PromptSet("x", tuple(map(str, range(100))), tuple("ab"[i // 50] for i in range(100)))
    assert whole.head(10).categories == ("a",) * 5 + ("b",) * 5
    assert whole.head(None) is whole and whole.head(1000) is whole


def test_built_in_sets_keep_their_promise() -> None:
    harmful, harmless = builtin_splits("harmful"), builtin_splits("harmless")
    check_contrast(harmful.whole, harmless.whole)
    for splits in (harmful, harmless):
        whole = splits.whole
        assert len(whole) >= 256 and len(set(map(words, whole.prompts))) == len(whole)
        assert len(set(whole.categories)) >= 8
        assert all(p == p.strip() and "\n" not in p and 3 <= len(p.split()) <= 40 for p in whole.prompts)
        for part in splits:
            assert set(part.categories) == set(whole.categories)
    lengths = [mean(len(p.split()) for p in s.whole.prompts) for s in (harmful, harmless)]
    assert abs(lengths[0] / lengths[1] - 1) < 0.15
    assert [len(builtin("harmful", part)) for part in ("train", "validation", "test")] == [1258, 72, 144]


def test_the_borderline_set_is_balanced_varied_and_its_own() -> None:
    splits = builtin_splits("borderline")
    whole = splits.whole
    assert len(set(map(words, whole.prompts))) == 240
    assert all(p == p.strip() and "\n" not in p and 3 <= len(p.split()) <= 40 for p in whole.prompts)
    for part, each in zip(splits, (8, 4, 8), strict=True):
        assert Counter(part.categories) == dict.fromkeys(set(whole.categories), each)
    assert len(set(whole.categories)) == 12
    for n, share in ((1, 0.25), (2, 0.06)):
        openings = Counter(" ".join(words(p).split()[:n]) for p in whole.prompts)
        assert openings.most_common(1)[0][1] < share * 240
    lengths = [len(p.split()) for p in whole.prompts]
    assert min(lengths) < 6 and max(lengths) > 20
    rows = (importlib.resources.files("abliterate.prompts") / "data" / "borderline.jsonl").read_text(encoding="utf-8")
    families = [(row["family"], row["split"]) for row in map(json.loads, rows.splitlines())]
    assert len(set(families)) == len({family for family, _ in families})


@pytest.mark.parametrize("kind", ["harmful", "harmless"])
def test_no_borderline_prompt_is_nearly_one_of_the_other_sets(kind: Kind) -> None:
    mine = [set(words(p).split()) for p in builtin_splits("borderline").whole.prompts]
    for p in builtin_splits(kind).whole.prompts:
        s = set(words(p).split())
        assert not [t for t in mine if len(s & t) >= 0.5 * len(s | t)]


def test_no_near_duplicate_crosses_a_built_in_split() -> None:
    for kind in ("harmful", "harmless", "borderline"):
        parts = builtin_splits(kind)  # type: ignore[arg-type]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            for p in parts[a].prompts:
                s = set(words(p).split())
                assert not [q for q in parts[b].prompts if len(s & (t := set(words(q).split()))) >= 0.7 * len(s | t)]
