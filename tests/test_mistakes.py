"""What a person can get wrong, or find damaged, between a command and its result: named, and nothing is lost."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file

import abliterate
from abliterate import steps, verbs
from abliterate.at_rest import find_model
from abliterate.checkpoint import open_checkpoint
from abliterate.direction.direction import Direction
from abliterate.edit.plan import plan_edit
from abliterate.errors import (
    AbliterateError,
    CheckpointError,
    PromptError,
    ResourceError,
    UnsupportedError,
    UsageError,
    VerifyError,
)
from abliterate.evaluate.intervals import Interval
from abliterate.evaluate.metric import Metric
from abliterate.prompts import load_prompts, split
from abliterate.report.card import model_card
from abliterate.report.record import RunRecord
from abliterate.report.table import print_run
from tests.conftest import Refusing
from tests.test_run import damage

Tiny = Callable[..., Path]
DIRECTION = {"layer": 0, "position": -1, "scale": 1.0}


def direction_file(path: Path, d_model: int, **changed: Any) -> Path:
    """A file with some unit direction."""
    vector = np.zeros(d_model, np.float32)
    vector[3] = 1
    Direction(vector, **(DIRECTION | changed)).save(path)
    return path


def prompt_options(refusing: Refusing) -> dict[str, Any]:
    """The refusing model's options without those that name a direction."""
    return {k: v for k, v in refusing.options.items() if k not in ("layer", "position")}


# ------------------------------------------------------------------ outputs


@pytest.mark.parametrize("verb", ["edit", "collect", "run", "resume"])
def test_a_folder_in_the_way_is_never_deleted(verb: str, refusing: Refusing, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.write_text("mine")
    model, out = str(refusing.folder), tmp_path / "out"
    with pytest.raises(UsageError, match="in the way"):
        if verb == "edit":
            verbs.edit(model, direction_file(tmp_path / "d.safetensors", 64), out)
        elif verb == "collect":
            verbs.collect(model, out, **prompt_options(refusing))
        else:
            abliterate.run(model, out, resume=verb == "resume", **refusing.options)
    assert mine.read_text() == "mine"


def test_what_a_killed_edit_left_is_named_with_the_way_on(refusing: Refusing, tmp_path: Path) -> None:
    left = tmp_path / "out.partial" / "abliteration" / "steps"
    left.mkdir(parents=True)
    (left / "settings.json").write_text("{}")
    (tmp_path / "out.partial" / "model.safetensors").write_text("half")
    found = direction_file(tmp_path / "d.safetensors", 64)
    with pytest.raises(UsageError, match="--resume"):
        verbs.edit(str(refusing.folder), found, tmp_path / "out")
    with pytest.raises(UsageError, match="other settings"):
        verbs.edit(str(refusing.folder), found, tmp_path / "out", resume=True)
    shutil.rmtree(tmp_path / "out.partial")
    verbs.edit(str(refusing.folder), found, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists() and (tmp_path / "out" / "config.json").exists()


def test_outputs_that_cannot_be_made_are_named_before_the_work(refusing: Refusing, tmp_path: Path) -> None:
    model = str(refusing.folder)
    with pytest.raises(UsageError, match="not a name"):
        abliterate.run(model, tmp_path / ("x" * 300), **refusing.options)
    acts = tmp_path / "acts"
    verbs.collect(model, acts, **prompt_options(refusing))
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write there"):
        verbs.select(model, acts, tmp_path / "file" / "d.safetensors", device="cpu")


@pytest.mark.parametrize(("option", "value"), [("layer", 4), ("position", -9)])
def test_a_layer_or_position_that_is_not_there_is_found_before_the_model_is_loaded(
    option: str, value: int, refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "load", lambda *_a: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match=f"-*{option} {value}: (?!.*None)"):
        abliterate.run(str(refusing.folder), tmp_path / "out", **(refusing.options | {option: value}))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ resume


@pytest.fixture
def unfinished(refusing: Refusing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OUT of a run that was cut short before its comparison."""

    def cut(*_a: object, **_k: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(steps, "compare", cut)
        abliterate.run(str(refusing.folder), tmp_path / "out", **refusing.options)
    return tmp_path / "out"


def resume(refusing: Refusing, out: Path, **options: Any) -> RunRecord:
    """Go on with an unfinished run."""
    return abliterate.run(str(refusing.folder), out, resume=True, **(refusing.options | options))


def test_a_resumed_run_may_leave_out_the_comparison(unfinished: Path, refusing: Refusing) -> None:
    assert resume(refusing, unfinished, evaluate=False).metrics == []
    assert unfinished.is_dir()


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name in ("settings", "observe", "edit") for text in ("", "[1]")]
    + [("observe", '{"result": {}, "seconds": 1}')],
)
def test_damaged_steps_are_named_with_the_way_out(name: str, text: str, unfinished: Path, refusing: Refusing) -> None:
    partial = unfinished.with_name("out.partial")
    (partial / "abliteration" / "steps" / f"{name}.json").write_text(text)
    with pytest.raises((CheckpointError, UsageError), match="delete"):
        resume(refusing, unfinished)
    assert partial.is_dir() and not unfinished.exists()


@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_weights_damaged_since_they_were_written_are_not_published(
    how: str, unfinished: Path, refusing: Refusing
) -> None:
    partial = unfinished.with_name("out.partial")
    tensor = open_checkpoint(partial).tensors["model.layers.1.mlp.down_proj.weight"]
    shard = partial / tensor.file
    if how == "gone":
        shard.unlink()
    else:
        with shard.open("r+b") as file:
            if how == "cut":
                file.truncate(tensor.offset + 10)
            else:
                file.seek(tensor.offset)
                file.write(bytes(20))
    with pytest.raises(CheckpointError, match=r"damaged .*delete it"):
        resume(refusing, unfinished)
    assert not unfinished.exists()


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("role", ["model", "base"])
def test_a_damaged_model_is_not_measured(role: str, refusing: Refusing, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    bad, good = str(damage(refusing.folder, tmp_path / "bad", name, float("nan"))), str(refusing.folder)
    pair = (bad, good) if role == "model" else (good, bad)
    with pytest.raises(VerifyError, match=name.replace(".", r"\.")):
        verbs.evaluate(*pair, **prompt_options(refusing))


def test_weights_that_the_checkpoint_lacks_are_not_made_up(refusing: Refusing, tmp_path: Path, tiny: Tiny) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama", tied=True), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        verbs.evaluate(str(model), **prompt_options(refusing))


@pytest.mark.parametrize(("layers", "words"), [(2, "are 2 layers"), (4, "missing"), ("three", "number of layers")])
def test_layers_that_the_configuration_does_not_count_are_named(
    layers: object, words: str, tmp_path: Path, tiny: Tiny
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises((UnsupportedError, CheckpointError), match=words):
        plan_edit(open_checkpoint(model))


def test_a_weight_of_a_type_that_cannot_be_edited_is_found_by_the_plan(tmp_path: Path, tiny: Tiny) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny("llama", dtype=torch.float32), model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.int32)}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=rf"{name}.*I32"):
        plan_edit(open_checkpoint(model))


def test_a_direction_of_another_width_is_not_looked_for(
    finished: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path
) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(finished[1], edited)
    direction_file(edited / "abliteration" / "directions.safetensors", 32)
    with pytest.raises(VerifyError, match=r"width 64 and 64.* has width 32"):
        verbs.evaluate(str(edited), str(refusing.folder), **prompt_options(refusing))


def test_templates_that_cannot_be_used_are_named(refusing: Refusing, tmp_path: Path) -> None:
    for text, kind, words in (
        ("hello", UnsupportedError, "leaves out the request"),
        ("", UsageError, "empty"),
        ("{{ raise_exception('no') }}", UnsupportedError, "--chat-template"),
    ):
        (tmp_path / "t.jinja").write_text(text)
        with pytest.raises(kind, match=words):
            abliterate.run(
                str(refusing.folder), tmp_path / "out", chat_template=str(tmp_path / "t.jinja"), **refusing.options
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.jinja"]


# ------------------------------------------------------------------ our own files


@pytest.mark.parametrize("damage_by", ["note", "name", "norm", "nan"])
def test_damaged_directions_are_named(damage_by: str, tmp_path: Path) -> None:
    path = direction_file(tmp_path / "d.safetensors", 8)
    vector = load_file(path)["direction"]
    note = {"kind": "a direction", "schema": 1, **Direction.load(path).where}
    if damage_by == "note":
        del note["layer"]
    scale = {"norm": 3.0, "nan": np.nan}.get(damage_by, 1.0)
    name = "vector" if damage_by == "name" else "direction"
    save_file({name: vector * np.float32(scale)}, path, {"abliterate": json.dumps(note)})
    with pytest.raises(CheckpointError, match=r"damaged|norm (3|nan)"):
        Direction.load(path)


def test_damaged_observations_are_named(refusing: Refusing, tmp_path: Path) -> None:
    acts = tmp_path / "acts"
    verbs.collect(str(refusing.folder), acts, **prompt_options(refusing))
    whole = json.loads((acts / "observed.json").read_text())
    for change in (
        {"options": whole["options"] | {"limit": "x"}},
        {"options": whole["options"] | {"colour": 1}},
        {"observed": whole["observed"] | {"tokens": "abc"}},
        {"observed": whole["observed"] | {"refused": None}},
        {"schema": whole["schema"] + 1},
    ):
        (acts / "observed.json").write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError, match="collect"):
            verbs.select(str(refusing.folder), acts, tmp_path / "d.safetensors")


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": \n', "line 2 is not JSON"),
        ("a.json", b'[{"prompt": 7}]', "'prompt' is 7; expected text"),
        ("a.csv", b"prompt,n\n", "no prompts"),
        ("a.txt", "caf\xe9".encode("latin-1"), "not UTF-8 text .byte 3"),
    ],
)
def test_prompt_files_say_what_is_wrong_and_where(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=words):
        load_prompts(str(tmp_path / name))


def test_repeated_prompts_are_counted_once_and_near_duplicates_named(tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("how do I bake bread\n" * 30)
    with pytest.raises(PromptError, match="1 different prompts"):
        split(load_prompts(str(tmp_path / "same.txt")), 0)
    near = "\n".join(f"please tell me in detail how one might bake a good loaf {i}" for i in range(24))
    (tmp_path / "near.txt").write_text(near)
    with pytest.raises(PromptError, match="24 prompts fall into 1 groups"):
        split(load_prompts(str(tmp_path / "near.txt")), 0)


# ------------------------------------------------------------------ what is said


def said(record: RunRecord, tmp_path: Path) -> tuple[str, str]:
    """What the terminal and the card say of a record."""
    stream = io.StringIO()
    print_run(Console(file=stream, width=80), record, "out")
    return stream.getvalue(), model_card(record, "out")


def test_broken_answers_and_failed_bounds_are_said(refusing: Refusing, tmp_path: Path) -> None:
    record = abliterate.run(str(refusing.folder), tmp_path / "out", **(refusing.options | {"layer": 0, "strength": 4}))
    record.verdicts["edited"] = {"harmful": {"refusal": 4}, "harmless": {"broken": 9, "compliance": 1}}
    record.direction["scores"]["kl"] = 15.3
    terminal, card = said(record, tmp_path)
    n = sum(sum(counts.values()) for counts in record.verdicts["base"].values())
    squeezed = "".join(terminal.split())  # wherever the lines break
    assert f"of{n}→9of14" in squeezed
    assert "KL15.300isabove--max-kl" in squeezed
    assert "Broken answers" in card and "→ 9 of" in card


def test_the_card_claims_only_what_was_measured_and_its_table_stands_alone(
    finished: tuple[RunRecord, Path], tmp_path: Path
) -> None:
    record = finished[0]
    _, card = said(record, tmp_path)
    assert "**It declines fewer" in card
    lines = card.splitlines()
    assert lines[lines.index(next(x for x in lines if x.startswith("| measure"))) - 1] == ""
    rate = record.metric("refusal_rate")
    assert rate is not None
    unmeasured = RunRecord(**{**record.as_dict, "metrics": [], "verdicts": {}})
    unchanged = RunRecord(**{**record.as_dict, "metrics": [rate | {"edited": rate["base"]}]})
    for other in (unmeasured, unchanged):
        assert "**It declines fewer" not in said(other, tmp_path)[1]


def test_a_direction_of_another_checkpoint_is_said(refusing: Refusing, tmp_path: Path) -> None:
    found = direction_file(tmp_path / "d.safetensors", 64, source={"model": "another"})
    record = verbs.edit(str(refusing.folder), found, tmp_path / "out")
    terminal, card = said(record, tmp_path)
    assert "another checkpoint" in terminal and "another checkpoint" in card


def test_one_prompt_gets_no_interval() -> None:
    found = Metric.of("kl_first_token", "set", None, Interval(0.5, 0.5, 0.5), 1, "how")
    assert (found.edited, found.low, found.high) == (0.5, None, None)
    assert Metric.of("kl_first_token", "set", None, Interval(0.5, 0.4, 0.6), 2, "how").low == 0.4


def test_an_empty_model_name_is_not_the_current_folder() -> None:
    with pytest.raises(AbliterateError, match="empty"):
        find_model("")
