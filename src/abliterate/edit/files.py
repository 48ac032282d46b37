"""The files of an edited checkpoint: how each is laid out beside its source, and how it is called.

Owns what is added to the metadata of a GGUF. Never reads weights, and never knows how they are projected.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.codecs import Float32Array
from abliterate.checkpoint.gguf_copy import Added, lay_out_copy
from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.checkpoint.layout import Layout, in_place
from abliterate.edit.plan import EditPlan

#: The key by which an edited GGUF and its records know each other.
BASE = "abliterate.base"


def layouts(checkpoint: Checkpoint, plan: EditPlan, names: tuple[str, ...], added: Added) -> list[Layout]:
    """How each file of weights is laid out, called by `names`: all copied but for the tensors that are edited.

    Safetensors files stay as they are; in a GGUF's first file keys are added, and tensors may have other types.

    Raises:
        UnsupportedError: a tensor does not fit the type that it is to have.
    """
    edited, found = {w.tensor for w in plan.writers}, []
    for i, (shard, name) in enumerate(zip(checkpoint.shards, names, strict=True)):
        if checkpoint.format == "gguf":
            source = read_gguf(checkpoint.path / shard)
            found.append(lay_out_copy(source, name, added if not i else {}, plan.retyped, edited))
        else:
            tensors = {n: t for n, t in checkpoint.tensors.items() if t.file == shard}
            found.append(in_place(tensors, edited, (checkpoint.path / shard).stat().st_size))
    return found


def provenance(checkpoint: Checkpoint, plan: EditPlan, directions: Float32Array, strength: float) -> Added:
    """What a GGUF says of its edit in its metadata, beside the folder of records."""
    own = {w.strength for w in plan.writers} != {1.0}
    rank = directions.shape[-2] if directions.ndim > 1 else 1
    return {
        "abliterate.version": version("abliterate"),
        BASE: checkpoint.fingerprint,
        "abliterate.directions": hashlib.sha256(directions.tobytes()).hexdigest(),
        "abliterate.edit": f"rank {rank}, {'strengths of each place' if own else f'strength {strength:g}'}, "
        f"{len(plan.writers)} tensors",
    }
