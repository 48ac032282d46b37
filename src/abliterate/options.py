"""What can be set about a run, and which values make sense.

Owns the options as a value; never knows how a command line or a step uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from abliterate.errors import UsageError

#: Most prompts used of each set, unless `limit` says otherwise.
LIMITS = {"train": 64, "validation": 48, "test": 64}


@dataclass(frozen=True)
class Options:
    """Everything that can be set about a run, as resolved; the verbs' options of the same names explain each."""

    harmful: str | None = None
    harmless: str | None = None
    limit: int | None = None
    layer: int | None = None
    position: int | None = None
    strength: float = 1.0
    max_kl: float = 0.2
    embeddings: Literal["edit", "keep", "untie"] = "edit"
    keep_norms: bool = False
    format: Literal["checkpoint", "adapter"] = "checkpoint"
    undo: bool = True
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 64
    max_new_tokens: int = 32
    seed: int = 0
    system_prompt: str | None = None
    chat_template: str | None = None
    evaluate: bool = True
    force: bool = False

    def check(self) -> None:
        """Raise `UsageError` for values that make no sense, before anything is loaded."""
        for name, least in (("limit", 8), ("batch_size", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        if self.layer is not None and self.layer < 0:
            raise UsageError(f"--layer {self.layer}: layers count from 0")
        if self.position is not None and self.position >= 0:
            raise UsageError(f"--position {self.position}: positions are negative, -1 is the prompt's last token")
        if not self.max_kl > 0:
            raise UsageError(f"--max-kl {self.max_kl:g}: expected a positive number of nats")
        if not -4 <= self.strength <= 4:
            raise UsageError(
                f"--strength {self.strength:g}: expected -4 to 4 (1 removes the direction, 2 reflects, -1 doubles it)"
            )
        check_embeddings(self.embeddings)
        if self.format not in ("checkpoint", "adapter"):
            raise UsageError(f"--format {self.format}: expected checkpoint or adapter")
        if self.format == "adapter" and self.keep_norms:
            raise UsageError("--format adapter: an edit that keeps norms is of full rank and fits none; leave out one")


def check_embeddings(value: str) -> None:
    """Raise `UsageError` for what is not a way to treat embeddings."""
    if value not in ("edit", "keep", "untie"):
        raise UsageError(f"--embeddings {value}: expected edit, keep or untie")
