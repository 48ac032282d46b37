"""The run record: everything a reader needs to know what was done and to do it again.

Owns `run.json`; never computes a figure.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from abliterate.envelope import TOOL, enveloped, json_text
from abliterate.errors import CheckpointError

KIND, SCHEMA = "run", 1
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class RunRecord:
    """One run: arguments as given and as resolved, sources with hashes, direction, edits, metrics, timings.

    `hub_id` is the base's name on the hub, if that is where it came from; `metrics` is a list of
    `{name, prompts, base, base_low, base_high, edited, low, high, n, method}`; `edits` holds one entry for each
    edited tensor with its leak after the cast; `tied_head` says what became of an LM head that shares the
    embedding's weights, `retyped` which tensors of a GGUF got which other type, as their own cannot be edited; `front`
    holds the points of the tuning on validation prompts, which was picked and by what rule, or why nothing was tuned;
    `controls` what directions that carry no refusal do, as `direction.controls` says; `judge` who judged the answers;
    `seconds` wall time for each step; `charts` is what only the page shows: tables of candidates by layer and position,
    projections by layer (means of the train prompts, and `along`, histograms of the test prompts), counts by category,
    KL by prompt;
    `base_card` what the base's own card says of licence, language and task. Either may be empty.
    """

    model: str
    hub_id: str | None
    model_fingerprint: str
    given: dict[str, Any]
    resolved: dict[str, Any]
    direction: dict[str, Any]
    edits: list[dict[str, Any]]
    kept: dict[str, str]
    untouched: int
    seconds: dict[str, float]
    tied_head: str | None = None
    retyped: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    verdicts: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    observed: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    finalists: list[dict[str, Any]] = field(default_factory=list)
    front: dict[str, Any] = field(default_factory=dict)
    controls: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, Any] = field(default_factory=dict)
    base_card: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    kind: str = KIND
    tool: str = TOOL
    version: str = field(default_factory=lambda: version("abliterate"))
    python: str = field(default_factory=lambda: sys.version.split()[0])
    packages: dict[str, str] = field(default_factory=lambda: {p: version(p) for p in _PACKAGES})
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def metric(self, name: str) -> dict[str, Any] | None:
        """The metric of that name, or None where it was not taken."""
        return next((m for m in self.metrics if m["name"] == name), None)

    @property
    def tuned(self) -> bool:
        """Whether every place has a strength of its own."""
        return bool(self.direction.get("strengths"))

    @property
    def test_max_kl(self) -> float:
        """The bound on KL in the causal test; where strengths are tuned, the result has one instead."""
        return math.inf if self.tuned else float(self.resolved["max_kl"])

    @property
    def converted(self) -> str | None:
        """The type of the base that was edited, where the model was converted to it first."""
        found: str | None = self.resolved.get("type")
        return found

    @property
    def strengthens(self) -> bool:
        """Whether the edit adds to the direction: refusals are to rise."""
        return bool(self.resolved["strength"] < 0)

    @property
    def keeps(self) -> bool:
        """Whether true refusals are to stay: what goes is the direction of false ones."""
        return self.resolved.get("keep") == "harmful"

    @property
    def fitted(self) -> str:
        """Whose refusals are to go: what the direction was found on."""
        return "borderline" if self.keeps else "harmful"

    @property
    def missed(self) -> bool:
        """Whether refusals of harmful test prompts did not rise though they were to."""
        found = self.metric("refusal_rate") or self.metric("refusal_score")
        if not self.strengthens or found is None or None in (found["base"], found["edited"]):
            return False
        return bool(found["edited"] <= found["base"])

    @property
    def direction_from_elsewhere(self) -> bool:
        """Whether the direction was found on another checkpoint than the one that was edited."""
        source = self.direction.get("source")
        return bool(source and source.get("model") != self.model_fingerprint)

    @property
    def as_dict(self) -> dict[str, Any]:
        """The record as JSON stores it."""
        return enveloped(KIND, asdict(self))

    def save(self, path: Path) -> None:
        """Write the record as indented JSON."""
        path.write_text(json_text(self.as_dict) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read what `save` wrote, also of earlier versions.

        Raises:
            CheckpointError: no such file, or not a run record.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or (value.get("tool"), value.get("schema")) != (TOOL, SCHEMA):
                raise ValueError(f"expected the record of a run, schema {SCHEMA}")
            if value.get("kind", KIND) != KIND:
                raise ValueError(f"of kind {value['kind']}; expected {KIND}")
            return cls(**value)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a run record of this version ({error})") from None
