"""Where a running model writes to its residual stream, as plain values.

Owns the names only, so that planning an edit needs no torch; `hooks` turns them into hooks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WriterSite:
    """A module whose output is added to the residual stream: `module` within block `layer`.

    Outside the blocks `layer` is None and `module` is "embed", or "head" for an LM head that shares the
    embedding's weights and so loses the direction from what it reads; any other name is a path in the model.
    `gain` is the path (within the block, or of the model) of the gain between the output and the stream,
    `gain_offset` what the norm's formula adds to it (1 in Gemma), `centred` whether it subtracts the mean. `strength`
    is this place's own share of what is removed.
    """

    layer: int | None
    module: str
    gain: str | None = None
    gain_offset: float = 0.0
    centred: bool = False
    strength: float = 1.0
