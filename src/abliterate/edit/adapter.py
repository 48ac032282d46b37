"""The same edit as a LoRA adapter: `ΔW = −s·D (Dᵀ W)` is of rank k, so it is an adapter of rank k exactly.

Owns the adapter's two files, as PEFT reads them, and which writers can be in one. Reads the weights, writes none.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.codecs import Float32Array
from abliterate.checkpoint.storage import by_rows, matrices
from abliterate.edit.apply import check_fits, removal_of
from abliterate.edit.plan import EditPlan
from abliterate.edit.projection import Removal
from abliterate.edit.shard import EditRecord
from abliterate.edit.writers import ResidualWriter
from abliterate.errors import UnsupportedError
from abliterate.model.progress import Progress, silent

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_adapter(
    checkpoint: Checkpoint,
    plan: EditPlan,
    directions: Float32Array,
    out: Path,
    strength: float = 1.0,
    progress: Progress = silent,
    *,
    offset: float = 0.0,
) -> list[EditRecord]:
    """Write the edit as an adapter into the existing folder `out`; one record for each tensor of the plan.

    Factors are float32. `leak` is what the factors leave; merged into weights of 16 bits, a plain cast brings 0.3 to
    1% of the direction back, which an edited checkpoint does not.

    Raises:
        UnsupportedError: a writer that no adapter can change; names it.
        VerifyError: the directions do not fit.
    """
    check_fits(checkpoint, plan, directions)
    _require_possible(checkpoint, plan)
    tensors: dict[str, Float32Array] = {}
    experts = defaultdict[str, dict[int, Float32Array]](dict)
    records = []
    for writer in plan.writers:
        removal = removal_of(checkpoint, writer, directions, strength, offset=offset)
        factors, record = _right_factors(checkpoint, writer, removal)
        module, _, kind = writer.parameter.rpartition(".")
        key, left = _PREFIX + module, (-removal.strength * removal.basis).astype(np.float32)
        if kind == "bias":
            tensors[f"{key}.lora_B.bias"] = left @ factors[0][:, 0]
        elif writer.role == "embed":
            tensors |= {f"{key}.lora_embedding_A": factors[0], f"{key}.lora_embedding_B": left}
        elif kind == "weight":
            tensors |= {f"{key}.lora_A.weight": factors[0], f"{key}.lora_B.weight": left}
        else:
            experts[key] |= {_expert(writer.tensor, i): factor for i, factor in enumerate(factors)}
            tensors[f"{key}.lora_B.weight"] = np.repeat(left, len(experts[key]), axis=1)
        records.append(record)
        progress(1)
    for key, of_experts in experts.items():  # [k x E, d_in] and [d_model, E x k], in the orders that PEFT unfolds
        tensors[f"{key}.lora_A.weight"] = np.concatenate([of_experts[i] for i in sorted(of_experts)])
    whole = {name: np.ascontiguousarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
    (out / WEIGHTS).write_bytes(save(whole, {"format": "pt"}))
    config = _config(checkpoint, plan, np.atleast_2d(directions).shape[-2])
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return records


def _right_factors(
    checkpoint: Checkpoint, writer: ResidualWriter, removal: Removal
) -> tuple[list[Float32Array], EditRecord]:
    """`Dᵀ W − offset` `[k, d_in]` of a tensor, one for each expert in it, and the tensor's record."""
    info, d = checkpoint.tensors[writer.tensor], removal.basis
    along_rows = by_rows(info, writer.axis)
    found, norm = [], 0.0
    with (checkpoint.path / info.file).open("rb") as file:
        for matrix in matrices(checkpoint, info, writer.axis):
            total = np.zeros((0, d.shape[1])) if along_rows else np.zeros((d.shape[1], matrix.columns))
            for rows in matrix.blocks():
                block = matrix.values(file.fileno(), rows)
                norm += float(np.vdot(block, block))
                total = np.concatenate([total, block @ d]) if along_rows else total + d[rows].T @ block
            if not np.isfinite(total).all():
                matrix.require_finite(file.fileno())
            found.append((total.T if along_rows else total) - removal.offset)
    if along_rows:  # one after the other in pieces: put together, and apart by experts
        joined = np.concatenate(found, axis=1)
        found = np.split(joined, info.shape[0], axis=1) if len(info.shape) > 2 else [joined]
    factors = [factor.astype(np.float32) for factor in found]
    removed = float(np.sqrt(sum(np.vdot(f, f) for f in found)))
    # Dᵀ(W − s·D A) − (1 − s) Dᵀ W: what rounding the factors to float32 leaves
    left = [f - d.T.astype(np.float64) @ d @ a for f, a in zip(found, factors, strict=True)]
    leak = float(np.sqrt(sum(np.vdot(x, x) for x in left))) * abs(removal.strength) / removed if removed else 0.0
    digest = sha256(b"".join(factor.tobytes() for factor in factors)).hexdigest()
    record = EditRecord(
        writer.tensor, writer.role, writer.layer, float(np.sqrt(norm)), removed, leak, digest, removal.strength
    )
    return factors, record


def _expert(tensor: str, in_tensor: int) -> int:
    """The number of an expert: in its name where each has a tensor of its own, or its place in the tensor of all."""
    named = re.search(r"experts\.(\d+)\.", tensor)
    return int(named[1]) if named else in_tensor


def _require_possible(checkpoint: Checkpoint, plan: EditPlan) -> None:
    """Refuse what no adapter can change: a head that becomes a tensor of its own, and biases of anything but layers."""
    if plan.untied is not None:
        raise UnsupportedError("an adapter cannot give the LM head a tensor of its own; use --embeddings edit or keep")
    parts: dict[str, set[str]] = defaultdict(set)
    odd = []
    for w in plan.writers:
        module, _, kind = w.parameter.rpartition(".")
        n_axes = len(checkpoint.tensors[w.tensor].shape) + ("experts." in w.tensor and kind not in ("weight", "bias"))
        if kind in ("weight", "bias") and w.role != "embed":
            parts[module].add(kind)
        if (kind, n_axes) not in (("weight", 2), ("bias", 1)) and not (kind not in ("weight", "bias") and n_axes >= 3):
            odd.append(w.tensor)
    biased = any("bias" in kinds for kinds in parts.values())
    if biased:
        odd += [module for module, kinds in parts.items() if kinds != {"weight", "bias"}]
    if odd:
        more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise UnsupportedError(
            f"{checkpoint.path}: no LoRA adapter can change {', '.join(odd[:4])}{more}: biases only together with the "
            "matrix of their layer, and in all layers that write to the stream; use --format checkpoint"
        )
    if biased and any(w.role == "embed" for w in plan.writers):
        raise UnsupportedError(
            f"{checkpoint.path}: PEFT takes either biases or embeddings into a LoRA adapter, and here both write to "
            "the stream; use --format checkpoint, or --embeddings keep"
        )


def _config(checkpoint: Checkpoint, plan: EditPlan, rank: int) -> dict[str, Any]:
    """What PEFT reads: which modules and parameters the factors belong to, and that they are taken as they are."""
    modules, parameters, transposed = set[str](), set[str](), False
    for w in plan.writers:
        module, _, kind = w.parameter.rpartition(".")
        (modules if kind in ("weight", "bias") else parameters).add(
            module if kind in ("weight", "bias") else w.parameter
        )
        transposed |= kind == "weight" and w.role != "embed" and w.axis == 1
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint.path),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": any(w.parameter.endswith(".bias") for w in plan.writers),
        "fan_in_fan_out": transposed,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
    }
