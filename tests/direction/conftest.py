"""What the tests of directions share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from abliterate.checkpoint import open_checkpoint
from abliterate.direction.choose import Trial
from abliterate.edit.plan import plan_edit
from abliterate.model.load import load_model

Tiny = Callable[..., Path]


@pytest.fixture
def trial(tiny: Tiny) -> Trial:
    """A random model with gains behind what it writes, a few uneven rows, and two tokens that count as refusal."""
    folder = tiny("gemma2")
    model = load_model(folder, device="cpu", dtype="float32")
    rows = model.chat.encode(["Hi", "How are you?", "Name a river in Asia", "What now", "Yes or no"])
    return Trial(model, plan_edit(open_checkpoint(folder)).sites, rows[:3], rows[2:], [40, 50], batch_size=4)
