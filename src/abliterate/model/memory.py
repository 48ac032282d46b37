"""What running a model takes, and which way of running it fits: whole in memory, or block by block.

Owns the estimates and what this machine has; never loads anything.
"""

from __future__ import annotations

import math
import re
import resource
import sys
from collections import Counter
from dataclasses import dataclass

import psutil
import torch

from abliterate.checkpoint import Checkpoint, TensorInfo
from abliterate.checkpoint.codecs import BITS
from abliterate.errors import ResourceError

#: What the interpreter, torch and the working numbers of a batch take.
_FLOOR = 1_000_000_000
#: What a comparison along answers takes more: logits of both models at every token of a few answers.
_ANSWERS = 600_000_000
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Need:
    """Bytes to run some models at once: `whole` in memory, or `blockwise`, two blocks of each at a time."""

    whole: int
    blockwise: int


def need(checkpoints: list[Checkpoint], dtype: torch.dtype, device: torch.device, answers: bool) -> Need:
    """What running these models at once takes in `dtype` on `device`, by the sizes in their files.

    Block by block, the two blocks of one model are in memory, and what lies outside the blocks of all; more where they
    are compared along `answers`.
    """
    whole = blocks = outside = 0
    for checkpoint in checkpoints:
        sizes, beside = Counter[int](), dict[str, int]()
        for tensor in checkpoint.tensors.values():
            size = _numbers(tensor) * dtype.itemsize
            layer = re.search(r"\.(\d+)\.", tensor.name)
            if layer is not None:
                sizes[int(layer[1])] += size
            else:
                beside[tensor.name] = size
        whole += sum(sizes.values()) + sum(beside.values())
        blocks = max(blocks, *sizes.values(), 0)
        outside += sum(beside.values()) - _untouched(checkpoint, beside, dtype, device)
    beside_weights = _FLOOR + (_ANSWERS if answers and len(checkpoints) > 1 else 0)
    return Need(int(1.1 * whole + 2e8 + beside_weights), int(2 * blocks + outside + beside_weights))


def _numbers(tensor: TensorInfo) -> int:
    """How many numbers a tensor's codes stand for: of less than a byte each, as many as fit."""
    bits = BITS.get(tensor.dtype)
    return math.prod(tensor.shape) if bits is None else tensor.nbytes * 8 // bits


def _untouched(checkpoint: Checkpoint, beside: dict[str, int], dtype: torch.dtype, device: torch.device) -> int:
    """What of a large embedding is never read: the file's own pages are mapped, and few of its rows are asked for.

    A head of the same shape is read whole; where there is none, it is the embedding.
    """
    largest = max(beside, key=lambda name: beside[name], default=None)
    if largest is None or device.type != "cpu":
        return 0
    info = checkpoint.tensors[largest]
    mapped = _STORED.get(info.dtype) == dtype
    alike = [n for n in beside if checkpoint.tensors[n].shape == info.shape]
    return int(0.9 * beside[largest]) if mapped and len(alike) > 1 else 0


def require_as_stored(checkpoints: list[Checkpoint], free: int | None) -> None:
    """Check that models fit as they are stored, which is how llama.cpp runs them, within `free` bytes (None: unknown).

    Raises:
        ResourceError: they do not.
    """
    # Some types are laid out anew for the processor, in a copy beside the file's own pages.
    needed = int(1.1 * sum(c.nbytes for c in checkpoints)) + _FLOOR + (_ANSWERS if len(checkpoints) > 1 else 0)
    if free is not None and needed > free:
        raise ResourceError(
            f"llama.cpp takes about {needed / 1e9:.1f} GB of memory for this, {free / 1e6:,.0f} MB may be used; raise "
            "--memory, close other programs, or measure one model alone"
        )


def available(device: torch.device) -> int | None:
    """Bytes free on a device, None where it cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


def fits_whole(needed: Need, free: int | None, why_not_blockwise: str | None) -> bool:
    """Whether models run whole within `free` bytes (None: nobody knows); block by block where they do not.

    Raises:
        ResourceError: neither way fits.
    """
    if free is None or needed.whole <= free:
        return True
    if why_not_blockwise is None and needed.blockwise <= free:
        return False
    other = why_not_blockwise or f"{needed.blockwise / 1e9:.1f} GB block by block"
    raise ResourceError(
        f"this takes about {needed.whole / 1e9:.1f} GB of memory ({other}), {free / 1e6:,.0f} MB may be used; raise "
        "--memory or close other programs; --dtype bfloat16 takes half of float32, and run --no-eval one model alone"
    )


def peak_memory() -> int:
    """The most resident memory this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
