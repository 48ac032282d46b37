"""What the package `gguf` is asked for: llama.cpp's names of tensors, and a writer of new files.

Never knows what the tensors are.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from abliterate.checkpoint.ggml import MEND
from abliterate.errors import UnsupportedError

#: What rotary frequencies are divided by, where positions were stretched.
FACTORS = "rope_freqs.weight"


def name_map(architecture: Any, n_layers: int) -> Any:
    """The table of an architecture (gguf's number of it), from names in transformers to those in a GGUF.

    Making one writes what is particular to its architecture into the table that all others are made of: here into a
    copy.

    Raises:
        ImportError: the package is not installed.
    """
    from gguf.tensor_mapping import TensorNameMap

    shared = TensorNameMap.block_mappings_cfg
    TensorNameMap.block_mappings_cfg = dict(shared)
    try:
        return TensorNameMap(architecture, n_layers)
    finally:
        TensorNameMap.block_mappings_cfg = shared


def new_writer(path: Path, architecture: str) -> Any:
    """gguf's writer of a new file.

    Raises:
        UnsupportedError: the package is not installed.
    """
    require_gguf()
    from gguf import GGUFWriter

    return GGUFWriter(path, architecture)


def require_gguf() -> None:
    """Check that the package is there.

    Raises:
        UnsupportedError: it is not installed.
    """
    if find_spec("gguf") is None:
        raise UnsupportedError(f"GGUF files need the package gguf: {MEND}")
