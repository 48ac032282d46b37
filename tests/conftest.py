"""Shared fixtures: tiny checkpoints of every family, made once a session and never written to by tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from abliterate.report.record import RunRecord

# No test may reach the hub: those about the hub name a local stand-in server themselves.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads of torch that have nothing to do sleep: in models this small they would spin, and take the others' time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # another worker has the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


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


@dataclass(frozen=True)
class Refusing:
    """A tiny model that declines, and the options that make a run on it work without a choice."""

    folder: Path

    @property
    def options(self) -> dict[str, Any]:
        """Prompt sets of the model, and a direction that is known to carry its refusal."""
        root = self.folder.parent
        return {
            "harmful": str(root / "harmful.txt"), "harmless": str(root / "harmless.txt"),
            "layer": 2, "position": -1, "device": "cpu", "dtype": "float32", "tune": False,
        }  # fmt: skip

    @property
    def arguments(self) -> list[str]:
        """The same options for the command line."""
        given = {name: value for name, value in self.options.items() if name != "tune"}
        return [word for name, value in given.items() for word in (f"--{name}", str(value))] + ["--no-tune"]


@pytest.fixture(scope="session")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Refusing:
    """A tiny model that has learned to decline."""
    from tests.organism import organism

    return Refusing(organism(tmp_path_factory.mktemp("organism") / "model"))


@pytest.fixture(scope="session")
def finished(refusing: Refusing, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    """The record and the folder of a whole run on the refusing model, at strength 1 everywhere."""
    import abliterate

    out = tmp_path_factory.mktemp("finished") / "out"
    return abliterate.run(str(refusing.folder), out, **refusing.options), out


@pytest.fixture(scope="session")
def tuned(refusing: Refusing, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Path]:
    """The record and the folder of a whole run on the refusing model, its strengths tuned."""
    import abliterate

    out = tmp_path_factory.mktemp("tuned") / "out"
    return abliterate.run(str(refusing.folder), out, **(refusing.options | {"tune": True})), out
