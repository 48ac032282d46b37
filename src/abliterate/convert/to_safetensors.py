"""A GGUF as a folder of safetensors that transformers loads: weights decoded, configuration, tokenizer, template.

Owns what is refused because transformers would read it otherwise than llama.cpp. Never edits a weight.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.stream import require_disk
from abliterate.errors import UnsupportedError, UsageError

DTYPES = ("bfloat16", "float16", "float32")
_FACTORS = "rope_freqs.weight"
#: How Llama 3.1 (and 3.3), and 3.2, were stretched; a GGUF holds only the factors that follow.
_STRETCHED = [
    {"rope_type": "llama3", "factor": f, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}
    for f in (8.0, 32.0)
]  # fmt: skip


def to_safetensors(checkpoint: Checkpoint, folder: Path, dtype: str = "bfloat16") -> None:
    """Write a GGUF's model into the existing folder `folder`, its weights decoded and rounded once to `dtype`.

    It is held in memory, for a while up to three times: transformers' own loader turns names and layouts back.

    Raises:
        UsageError: there is no such type.
        UnsupportedError: transformers does not load the architecture from a GGUF, or not all of it, or otherwise than
            llama.cpp does; or a package is missing.
        ResourceError: the disk has no room for it.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    numbers = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
    require_disk(folder, numbers * torch.finfo(getattr(torch, dtype)).bits // 8)
    source = {"pretrained_model_name_or_path": str(checkpoint.path), "gguf_file": checkpoint.shards[0]}
    stretched = _stretched(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source, **_whole(), dtype=getattr(torch, dtype), output_loading_info=True, ignore_mismatched_sizes=True
        )
    except ImportError as error:
        raise UnsupportedError(
            f"{checkpoint.source}: reading it takes the package {error.name}: pip install 'abliterate[gguf]' accelerate"
        ) from None
    except (ValueError, KeyError, NotImplementedError) as error:
        raise _unread(checkpoint, str(error).splitlines()[0]) from None
    model, info = loaded
    if lacking := sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]})):
        raise _unread(checkpoint, f"it finds no tensors for {', '.join(lacking[:3])}")
    plain = _plain(model, stretched)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _whole() -> dict[str, Any]:
    """What asks transformers for numbers in place of codes, which newer versions keep."""
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}


def _unread(checkpoint: Checkpoint, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{checkpoint.source}: architecture '{checkpoint.model_type}': transformers cannot load it from a GGUF "
        f"({reason[:160]}); edit the GGUF as it is, or take the model's own safetensors checkpoint"
    )


def _plain(model: Any, stretched: dict[str, Any]) -> Any:
    """The same weights in a model that does not know where they are from."""
    import torch
    from transformers import AutoModelForCausalLM

    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if stretched:
        config.rope_parameters = config.rope_parameters | stretched
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _stretched(checkpoint: Checkpoint) -> dict[str, Any]:
    """How positions were stretched, by the factors in the file, of which transformers reads nothing.

    Raises:
        UnsupportedError: in a way that they do not tell.
    """
    if any(name.startswith("rope_factors_") for name in checkpoint.tensors):
        raise _unread(checkpoint, "it leaves out the factors by which positions are stretched")
    if _FACTORS not in checkpoint.tensors:
        return {}
    from transformers import AutoConfig

    tensor = checkpoint.tensors[_FACTORS]
    factors = np.fromfile(checkpoint.path / tensor.file, "<f4", tensor.shape[0], offset=tensor.offset)
    config = AutoConfig.from_pretrained(checkpoint.path, gguf_file=checkpoint.shards[0])
    for known in _STRETCHED:
        if np.allclose(factors, _factors(config, known, 2 * len(factors)), rtol=1e-4):
            return known
    raise _unread(checkpoint, "it leaves out the factors by which positions are stretched, and they are not Llama's")


def _factors(config: Any, known: dict[str, Any], turned: int) -> Any:
    from copy import deepcopy

    from abliterate.convert.families import slowed

    other = deepcopy(config)
    base = config.rope_parameters["rope_theta"]
    other.rope_parameters = config.rope_parameters | known
    return slowed(other, base, turned)
