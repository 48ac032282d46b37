"""Open a checkpoint in whichever form it lies: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from abliterate.checkpoint.folder import open_folder
from abliterate.checkpoint.gguf_model import open_gguf
from abliterate.checkpoint.opened import Checkpoint
from abliterate.errors import CheckpointError


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder or a GGUF file, every header read and checked, no tensor data read.

    Raises:
        CheckpointError: no such folder or file, no config.json, a missing shard, a malformed header or index.
        UnsupportedError: only pickled weights, a quantised checkpoint whose codes cannot be edited, or no model.
    """
    try:
        return open_gguf(path) if path.is_file() else open_folder(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from None
