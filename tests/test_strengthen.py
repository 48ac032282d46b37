"""A run at a strength below 0: refusals rise, every word says so, and the way back and the adapter are the same."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import abliterate
from abliterate import verbs
from abliterate.direction.direction import Direction
from abliterate.report.card import model_card
from abliterate.report.comparison import sentence
from abliterate.report.page import page
from abliterate.report.record import RunRecord
from abliterate.report.table import print_run
from tests.cli.test_main import run_here
from tests.conftest import Refusing
from tests.schemas import valid
from tests.test_run import contents

STRENGTH = -0.5


@pytest.fixture(scope="module")
def stronger(refusing: Refusing, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    """A run that strengthens, without answers: its model declines all harmful prompts already, so scores must tell."""
    out = tmp_path_factory.mktemp("stronger") / "out"
    return abliterate.run(str(refusing.folder), out, strength=STRENGTH, generate=False, **refusing.options), out


def test_the_refusal_score_rises_by_more_than_with_any_control(
    stronger: tuple[RunRecord, Path], finished: tuple[RunRecord, Path]
) -> None:
    record, controls = stronger[0], stronger[0].controls
    score = record.metric("refusal_score")
    assert score is not None and score["low"] > score["base"] and not record.missed
    assert controls["chosen"]["score"] > controls["base"] and controls["margin_low"] > 0
    removed = finished[0].controls
    assert removed["chosen"]["score"] < removed["base"] == pytest.approx(controls["base"])
    assert {e["strength"] for e in record.edits} == {STRENGTH}
    valid(json.dumps(record.as_dict), "run")


def test_the_direction_is_chosen_by_removal(stronger: tuple[RunRecord, Path], finished: tuple[RunRecord, Path]) -> None:
    assert stronger[0].direction["scores"] == finished[0].direction["scores"]
    assert stronger[0].direction["scores"]["ablated"] < stronger[0].direction["scores"]["base_harmful"]


def test_undo_restores_every_byte(stronger: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path) -> None:
    verbs.undo(str(stronger[1]), tmp_path / "base")
    assert contents(tmp_path / "base") == contents(refusing.folder) != contents(stronger[1])


def test_the_stream_has_more_of_the_direction_and_an_adapter_the_same(
    stronger: tuple[RunRecord, Path], refusing: Refusing, tmp_path: Path
) -> None:
    from peft import PeftModel

    direction = stronger[1] / "abliteration" / "directions.safetensors"
    options = {"strength": STRENGTH, "format": "adapter"}
    adapter = verbs.edit(str(refusing.folder), direction, tmp_path / "adapter", **options)
    assert adapter.strengthens
    r = Direction.load(direction).vector.astype(np.float64)
    base, edited = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (refusing.folder, stronger[1])
    )
    before = {e["tensor"]: base.get_parameter(e["tensor"]).detach().double().numpy() for e in adapter.edits}
    merged = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    for e in adapter.edits:
        w, *after = before[e["tensor"]], *(m.get_parameter(e["tensor"]) for m in (edited, merged))
        for found in after:
            now = found.detach().double().numpy()
            was, now = (w @ r, now @ r) if e["role"] == "embed" else (r @ w, r @ now)
            assert np.linalg.norm(now - (1 - STRENGTH) * was) < 2e-3 * np.linalg.norm(was)


def test_words_are_those_of_a_strengthened_model(stronger: tuple[RunRecord, Path]) -> None:
    record, out = stronger
    text, card = (out / "abliteration" / "report.html").read_text(), (out / "README.md").read_text()
    assert "was strengthened in 9 tensors" in text and "at strength −0.5: the refusal score of" in text
    assert "harmless test prompts went from" in text and "borderline test prompts went from" in text
    assert "added to the weights" in text and "taken out" not in text and "projected out" not in text
    assert "still answer harmful" in text and "fewer" not in text
    assert "strengthened in the weights" in card and "fewer" not in card and "directional-ablation" not in card
    rate = {"name": "refusal_rate", "base": 0.5, "edited": 0.75}
    rated = dataclasses.replace(record, metrics=[record.metrics[0] | rate])
    assert "**It declines more requests" in model_card(rated, "out") and "It is meant to" in card
    console = Console(width=200, file=io.StringIO())
    lost = dataclasses.replace(record, metrics=[record.metrics[0] | rate | {"edited": 0.5}])
    assert "did not rise" in page(lost, "out") and "did not rise" not in page(rated, "out")
    for one, shown in ((record, False), (lost, True)):
        print_run(console, one, "out")
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert "strength −0.5 (adds to the direction)" in said and ("did not rise" in said) == shown


def test_compare_says_that_the_component_grew(stronger: tuple[RunRecord, Path], refusing: Refusing) -> None:
    found = verbs.compare(str(refusing.folder), str(stronger[1]))
    assert found.strength == pytest.approx(STRENGTH, abs=0.01)
    assert "has along it grew by 50" in sentence(found.as_dict) and "is gone" not in sentence(found.as_dict)


def test_the_command_line_takes_a_strength_below_0(
    refusing: Refusing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    words = ["--strength", "-0.5", "--no-eval", *refusing.arguments]
    assert run_here("run", str(refusing.folder), "-o", out, *words) == 0
    assert "strength −0.5 (adds to the direction)" in capsys.readouterr().out.replace("\n", " ")
