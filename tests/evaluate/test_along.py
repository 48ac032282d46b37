"""What lies along a direction: the pass against transformers' own, whole and block by block, and its histograms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abliterate.direction.direction import Direction
from abliterate.errors import VerifyError
from abliterate.evaluate.along import BINS, along, histograms
from abliterate.evaluate.evaluation import Questions, evaluate_first_tokens
from abliterate.model.load import load_model
from abliterate.model.progress import no_steps
from abliterate.prompts import PromptSet

Tiny = Callable[..., Path]
ASKED = ("Hi", "How are you?", "Name a river.", "a", "Tell me more about it, please", "Why?", "Go on")


def direction(position: int | None, *shape: int) -> Direction:
    vector = np.random.default_rng(0).normal(size=shape)
    unit = np.linalg.qr(np.atleast_2d(vector).T)[0].T.astype(np.float32)
    return Direction(unit[0] if len(shape) == 1 else unit, 1, position, 1.0)


@pytest.mark.parametrize("memory", [None, 1 << 30])
def test_a_component_is_what_transformers_gives_row_by_row(memory: int | None, tiny: Tiny) -> None:
    model = load_model(tiny("llama"), device="cpu", dtype="float32", memory=memory)
    tail, rows, where = len(model.chat.tail()), model.chat.encode(ASKED), direction(-2, model.d_model)
    found, streams = along(model, rows, where, tail, 3), list[torch.Tensor]()
    one = load_model(tiny("llama"), device="cpu", dtype="float32").model
    for block in one.base_model.layers:
        block.register_forward_hook(lambda _m, _a, output: streams.append(output[0] if output.ndim > 2 else output))
    assert found.component.shape == (model.n_layers, len(rows))
    for i, row in enumerate(rows):
        streams.clear()
        with torch.inference_mode():
            one(torch.tensor([row]))
        lies = torch.stack(streams) @ torch.from_numpy(where.vector)
        assert np.allclose(found.component[:, i], lies[:, -2], atol=1e-5)
        shares = lies[:, -tail:] / torch.stack(streams)[:, -tail:].norm(dim=-1)
        assert found.share[i] == pytest.approx(float((shares**2).mean() ** 0.5), rel=1e-4)
    assert len(np.unique(found.component[-1].round(6))) == len(rows)


@pytest.mark.parametrize("where", [direction(None, 32), direction(None, 2, 32), direction(-40, 32)])
def test_what_has_no_place_of_its_own_has_a_share_alone(where: Direction, tiny: Tiny) -> None:
    model = load_model(tiny("llama"), device="cpu", dtype="float32")
    found = along(model, model.chat.encode(ASKED), where, len(model.chat.tail()), 4)
    assert found.component.shape == (0, len(ASKED)) and found.share.min() > 0
    assert histograms(found.component, found.component, 3) == []


def test_of_several_directions_prompts_lie_along_the_first_and_share_all(tiny: Tiny) -> None:
    model, two = load_model(tiny("llama"), device="cpu", dtype="float32"), direction(-1, 2, 32)
    rows, tail = model.chat.encode(ASKED), len(model.chat.tail())
    both, *each = (
        along(model, rows, dataclasses.replace(two, vector=v), tail, 4) for v in (two.vector, *two.vector)
    )  # fmt: skip
    assert np.allclose(both.component, each[0].component) and not np.allclose(both.component, each[1].component)
    assert np.allclose(both.share**2, sum(one.share**2 for one in each), rtol=1e-4)


def test_every_prompt_is_counted_in_bins_that_all_share() -> None:
    rng = np.random.default_rng(1)
    base = np.concatenate([rng.normal(3, 1, (2, 40)), rng.normal(0, 2, (2, 30))], 1)
    edited = 0.01 * base
    for layer, (b, e) in zip(histograms(base, edited, 40), zip(base, edited, strict=True), strict=True):
        edges = np.linspace(layer["low"], layer["high"], BINS + 1)
        for who, found in (("base", b), ("edited", e)):
            for kind, part in (("harmful", found[:40]), ("harmless", found[40:])):
                counts = layer[who][kind]
                assert sum(counts) == len(part) and len(counts) == BINS
                near = [np.sum((part > low - 1e-2) & (part < high + 1e-2)) for low, high in pairwise(edges)]
                assert all(n <= most for n, most in zip(counts, near, strict=True))
        spread = np.sqrt((b[:40].var(ddof=1) + b[40:].var(ddof=1)) / 2)
        assert layer["base"]["separation"] == pytest.approx((b[:40].mean() - b[40:].mean()) / spread, rel=1e-3)
        assert layer["edited"]["separation"] == pytest.approx(layer["base"]["separation"] / 100, rel=1e-3)
        assert layer["edited"]["auc"] == layer["base"]["auc"] > 0.8  # which knows no distance
        assert max(layer["edited"]["harmful"]) == 40 > 2 * max(layer["base"]["harmful"])


@pytest.mark.parametrize("odd", [0.0, 3.0, float("nan"), float("inf")])
def test_values_that_are_all_alike_or_none_give_histograms_too(odd: float) -> None:
    (found,) = histograms(np.full((1, 5), odd), np.full((1, 5), odd), 2)
    assert found["low"] < found["high"] and found["base"]["separation"] is None
    assert sum(found["base"]["harmful"]) == (2 if np.isfinite(odd) else 0)
    assert found["base"]["auc"] == (0.5 if np.isfinite(odd) else None)
    json.dumps(found, allow_nan=False)


def test_models_of_different_depth_are_not_compared_along_a_direction(tiny: Tiny) -> None:
    models = [load_model(tiny("llama", n_layers=n), device="cpu", dtype="float32") for n in (3, 4)]
    sets: list[Any] = [PromptSet(kind, ASKED, ("",) * len(ASKED)) for kind in ("harmful", "harmless", "borderline")]
    asked = Questions(*sets, max_new_tokens=1, batch_size=4)
    with pytest.raises(VerifyError, match="3 and 4 layers"):
        evaluate_first_tokens(*models, asked, [], no_steps, direction(-1, 32))
    found = evaluate_first_tokens(models[0], models[0], asked, [], no_steps, direction(-1, 32))
    assert found.charts["along"][0]["base"] == found.charts["along"][0]["edited"] and len(found.charts["along"]) == 3
    several = dataclasses.replace(direction(-1, 2, 32), position=None)
    found = evaluate_first_tokens(models[0], models[0], asked, [], no_steps, several)
    assert found.charts["along"] == [] and found.metrics[-1].name == "leak"


def test_leak_is_that_of_prompts_drawn_over_the_whole_harmful_set(tiny: Tiny) -> None:
    model = load_model(tiny("llama"), device="cpu", dtype="float32")
    harmful = PromptSet("harmful", tuple(f"{ask} {n}" for n in range(6) for ask in ASKED), ("",) * 42)
    harmless = PromptSet("harmless", ASKED, ("",) * 7)
    asked = Questions(harmful, harmless, harmless, max_new_tokens=1, batch_size=8)
    tail, drawn = len(model.chat.tail()), harmful.head(16)
    assert drawn.prompts != harmful.prompts[:16]
    for where in (direction(-1, 32), direction(None, 32)):
        leak = evaluate_first_tokens(model, model, asked, [], no_steps, where).metrics[-1]
        alone = along(model, model.chat.encode(drawn.prompts), where, tail, 8).share
        assert leak.n == 16 and leak.base == leak.edited == pytest.approx(alone.mean(), rel=1e-5)
        assert leak.base != pytest.approx(
            along(model, model.chat.encode(harmful.prompts[:16]), where, tail, 8).share.mean(), rel=1e-5
        )
