"""What is typed as a prompt set: rows chosen by a column, files inside folders, names that hold ':' and '='."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abliterate.errors import PromptError
from abliterate.prompts import load_prompts

SAFE = ["How do I kill the engine?", "What is a bomb calorimeter?"]
UNSAFE = ["Say how one hurts a person", "Say how one robs a person"]


def xstest(path: Path) -> Path:
    """A file with XSTest's columns as published: two rows of each label."""
    kinds = ("homonyms", "definitions")
    rows = [(p, k, "safe") for p, k in zip(SAFE, kinds, strict=True)]
    rows += [(p, f"contrast_{k}", "unsafe") for p, k in zip(UNSAFE, kinds, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f'{i},"{p}",{k},{label},,' for i, (p, k, label) in enumerate(rows)]
    path.write_text("id,prompt,type,label,focus,note\n" + "\n".join(lines) + "\n")
    return path


def test_rows_are_chosen_by_a_column_and_type_stands_for_category(tmp_path: Path) -> None:
    file = xstest(tmp_path / "xstest.csv")
    assert list(load_prompts(str(file)).prompts) == SAFE + UNSAFE
    safe = load_prompts(f"{file}:label=safe")
    assert list(safe.prompts) == SAFE and safe.categories == ("homonyms", "definitions")
    assert safe.name == f"{file}:label=safe"
    assert list(load_prompts(f"{file}:label=unsafe").prompts) == UNSAFE
    assert list(load_prompts(f"{tmp_path}:type=definitions").prompts) == SAFE[1:]


def test_category_comes_before_type(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x", "category": "c", "type": "t"}))
    assert load_prompts(str(tmp_path / "a.jsonl")).categories == ("c",)


@pytest.mark.parametrize("name", ["a:b=c.csv", "C:\\data\\x.csv", "x=1.csv", "x:y.csv", "dir=1/a:label=safe/x.csv"])
def test_names_with_colons_and_equals_signs_are_names_first(name: str, tmp_path: Path) -> None:
    file = xstest(tmp_path / name)
    assert list(load_prompts(str(file)).prompts) == SAFE + UNSAFE
    assert list(load_prompts(f"{file}:label=safe").prompts) == SAFE


def test_a_file_of_exactly_that_name_wins(tmp_path: Path) -> None:
    file = xstest(tmp_path / "x.csv")
    other = tmp_path / "x.csv:label=safe.txt"
    other.write_text("another request\n")
    assert load_prompts(str(other)).prompts == ("another request",)
    assert list(load_prompts(f"{file}:label=safe").prompts) == SAFE


def test_values_may_hold_colons_equals_signs_and_types_other_than_text(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "v": "a:b=c"}, {"prompt": "two", "v": True}, {"prompt": "three", "v": 3}, {"prompt": "4"}]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for value, prompt in (("a:b=c", "one"), ("true", "two"), ("3", "three"), ("", "4")):
        assert load_prompts(f"{file}:v={value}").prompts == (prompt,)


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (":lable=safe", "no column 'lable' .* it has id, prompt, type, label, focus, note"),
        (":label=save", "no row with label=save; the values there are safe, unsafe"),
        (":label=", "no row with label=; the values there are safe, unsafe"),
    ],
)
def test_a_choice_of_nothing_names_what_is_there(behind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=message):
        load_prompts(f"{xstest(tmp_path / 'x.csv')}{behind}")


def test_eight_values_are_named_at_most_and_long_ones_cut(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt,v\n" + "".join(f"request {i},{'long' * 20 if i == 0 else i}\n" for i in range(20)))
    with pytest.raises(PromptError, match=r"there are (long)+lon…, 1, 2, 3, 4, 5, 6, 7 and 12 more$"):
        load_prompts(f"{file}:v=none")


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a request\n")
    with pytest.raises(PromptError, match=r"no column 'label'.*plain text, without columns"):
        load_prompts(f"{tmp_path / 'x.txt'}:label=safe")


def test_a_missing_file_names_those_beside_it(tmp_path: Path) -> None:
    xstest(tmp_path / "xstest.csv")
    with pytest.raises(PromptError, match=r"xstst\.csv: no such file \(from .*label=safe'\); .* has xstest\.csv$"):
        load_prompts(f"{tmp_path / 'xstst.csv'}:label=safe")


@pytest.mark.parametrize("source", ["nowhere/data.csv", "a/b/c", "a/../c.csv", "~nobody-at-all/x.csv", "x" * 300, ""])
def test_what_can_be_no_file_and_no_hub_id_is_said_without_asking_the_hub(source: str) -> None:
    with pytest.raises(PromptError, match="no such file"):
        load_prompts(source)
