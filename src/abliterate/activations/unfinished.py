"""What a pass block by block has found so far, in one file after every block, so that another can go on from it.

Owns that file and what it must fit; never knows what the statistics are for.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.activations.stats import RunningStats
from abliterate.checkpoint.codecs import Raw
from abliterate.checkpoint.stream import sync
from abliterate.errors import CheckpointError
from abliterate.portable import load_arrays, save_arrays

KIND = "unfinished activation statistics"
_SUMS = ("mean", "m2", "count")


class Unfinished:
    """Fills `stats` from the file `path` where it is of the same run (`of`: its model, rows, sizes), and writes it."""

    def __init__(self, path: Path, stats: list[RunningStats], of: Any) -> None:
        self._path, self._stats = path, stats
        self._of = sha256(json.dumps(of).encode()).hexdigest()

    def resumed(self) -> tuple[int, list[Raw]]:
        """How many layers are in the statistics already, and the streams behind them; none of another run."""
        if not self._path.is_file():
            return 0, []
        try:
            arrays, note = load_arrays(self._path, KIND)
        except CheckpointError:  # half of a file that was being written when the machine went down
            return 0, []
        if note.get("of") != self._of:
            return 0, []
        done = int(note["layers"])
        for i, stats in enumerate(self._stats):
            for name in _SUMS:
                getattr(stats, name)[:done] = arrays[f"{name} {i}"]
        return done, [arrays[f"stream {i}"].view(np.uint8) for i in range(int(note["streams"]))]

    def after(self, layer: int, streams: list[Raw]) -> None:
        """Layer `layer` is in the statistics."""
        done = layer + 1
        arrays = {f"{name} {i}": getattr(s, name)[:done] for i, s in enumerate(self._stats) for name in _SUMS}
        partial = self._path.with_suffix(".tmp")
        save_arrays(
            partial,
            KIND,
            arrays | {f"stream {i}": stream for i, stream in enumerate(streams)},
            {"of": self._of, "layers": done, "streams": len(streams)},
        )
        sync(partial)
        partial.replace(self._path)
