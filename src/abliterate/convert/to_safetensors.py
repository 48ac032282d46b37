"""A GGUF as a folder of safetensors that transformers loads: weights decoded, configuration, tokenizer, template.

Owns what a folder must say of positions that were stretched, which a GGUF holds as factors. Never edits a weight.
"""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.gguf_decode import decoded
from abliterate.checkpoint.gguf_names import FACTORS
from abliterate.checkpoint.stream import require_disk
from abliterate.errors import UnsupportedError, UsageError

#: By the name that a person types: torch's.
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
#: How Llama 3.1 (and 3.3), and 3.2, were stretched; a GGUF holds only the factors that follow.
_STRETCHED = [
    {"rope_type": "llama3", "factor": f, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}
    for f in (8.0, 32.0)
]  # fmt: skip


def to_safetensors(checkpoint: Checkpoint, folder: Path, dtype: str = "bf16") -> None:
    """Write a GGUF's model into the existing folder `folder`, its weights decoded and rounded once to `dtype`.

    It is held in memory: transformers turns names and layouts back.

    Raises:
        UsageError: there is no such type.
        UnsupportedError: transformers does not load the architecture from a GGUF, or not all of it, or its
            configuration cannot say how positions were stretched; or a package is missing.
        ResourceError: the disk has no room for it.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--type {dtype}: expected {', '.join(DTYPES)}")
    import torch

    from abliterate.model.gguf import gguf_model, gguf_tokenizer
    from abliterate.model.weights import without_bars

    require_disk(folder, decoded_size(checkpoint, dtype))
    tokenizer = gguf_tokenizer(checkpoint.source)
    with without_bars():
        model = gguf_model(checkpoint.source, getattr(torch, DTYPES[dtype]))
        if stretched := _stretched(checkpoint, model.config):
            model.config.rope_parameters = model.config.rope_parameters | stretched
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def decoded_size(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of a checkpoint's numbers in a float type."""
    return sum(math.prod(t.shape) for t in checkpoint.tensors.values()) * (4 if dtype == "f32" else 2)


def _stretched(checkpoint: Checkpoint, config: Any) -> dict[str, Any]:
    """How positions were stretched, by the factors in the file.

    Raises:
        UnsupportedError: in a way that they do not tell.
    """
    if any(name.startswith("rope_factors_") for name in checkpoint.tensors):
        raise UnsupportedError(_unsaid(checkpoint, ""))
    if FACTORS not in checkpoint.tensors:
        return {}
    factors = decoded(checkpoint.path, checkpoint.tensors[FACTORS])
    for known in _STRETCHED:
        if np.allclose(factors, _factors(config, known, 2 * len(factors)), rtol=1e-4):
            return known
    raise UnsupportedError(_unsaid(checkpoint, " that are not Llama's"))


def _unsaid(checkpoint: Checkpoint, whose: str) -> str:
    return (
        f"{checkpoint.source}: positions are stretched by factors{whose}, and no configuration says by which rule; "
        "edit the GGUF as it is, or take the model's own safetensors checkpoint"
    )


def _factors(config: Any, known: dict[str, Any], turned: int) -> Any:
    from abliterate.convert.families import slowed

    other = deepcopy(config)
    base = config.rope_parameters["rope_theta"]
    other.rope_parameters = config.rope_parameters | known
    return slowed(other, base, turned)
