"""llama.cpp's names of tensors, by the table of the package `gguf`.

Owns asking for it. Never knows what the tensors are.
"""

from __future__ import annotations

from typing import Any


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
