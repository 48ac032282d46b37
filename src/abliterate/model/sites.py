"""Where a running model writes to its residual stream, as plain values.

Owns the names only, so that planning an edit needs no torch; `hooks` turns them into hooks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WriterSite:
    """A module whose output is added to the residual stream: `module` within block `layer`.

    Outside the blocks `layer` is None and `module` is "embed", or "head" for an LM head that shares the
    embedding's weights and so loses the direction from what it reads. `gain` names the normalisation
    within the block whose gain lies between the output and the stream, `gain_offset` what its formula
    adds to the stored gain (1 in Gemma).
    """

    layer: int | None
    module: str
    gain: str | None = None
    gain_offset: float = 0.0
