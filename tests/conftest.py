"""Shared fixtures: tiny checkpoints of every family, made once a session and never written to by tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# No test may reach the hub: those about the hub name a local stand-in server themselves.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, **settings)`: the folder of a tiny random checkpoint; the same settings give the same folder."""
    from tests.tiny import tiny_checkpoint

    made: dict[str, Path] = {}

    def make(family: str = "llama", **settings: Any) -> Path:
        key = repr((family, sorted(settings.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(family) / "model", family, **settings)
        return made[key]

    return make
