"""`inspect`: what an edit of a model would change and leave, and what it would take here.

Owns the summary of a plan by kinds of writers; never reads weights, and never knows how it is printed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from abliterate.at_rest import find_model
from abliterate.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.edit.estimate import estimate
from abliterate.edit.files import BASE
from abliterate.edit.plan import Embeddings, plan_edit
from abliterate.options import check_embeddings


@dataclass(frozen=True)
class Inspection:
    """What an edit of a model would do: `writers` by role, what it would keep and leave, and what it would take here.

    Sizes in bytes; `writers` holds `{role, tensors, shape, axis, dtype, behind, nbytes}`, `axis` the one that lies in
    the stream, `behind` the norm between the writers and it. `edited` says whether the model is the result of an edit.
    """

    model: str
    model_type: str
    n_layers: int
    d_model: int
    tensors: int
    nbytes: int
    writers: list[dict[str, Any]]
    kept: dict[str, str]
    untouched: int
    tied_head: str | None
    left_out: list[str]
    edited: bool
    disk: int
    memory: int
    seconds: float


def inspect(model: str, *, embeddings: str = "edit", undo: bool = True, requantize: str | None = None) -> Inspection:
    """Which weights of `model` write to the residual stream, what `edit` would do to them, and what it would take.

    Reads headers only. Time and disk are those of a result in the current folder.

    Raises:
        AbliterateError: as its kinds say; UnsupportedError where an edit would be refused, with the reason.
    """
    check_embeddings(embeddings)
    checkpoint = open_checkpoint(find_model(model))
    plan = plan_edit(checkpoint, cast(Embeddings, embeddings), requantize=requantize)
    groups: dict[tuple[Any, ...], list[TensorInfo]] = {}
    for w in plan.writers:
        tensor = checkpoint.tensors[w.tensor]
        behind = w.gain_parameter or ("a norm without gain" if w.centred else None)
        groups.setdefault((w.role, tensor.shape, w.axis, tensor.dtype, behind), []).append(tensor)
    writers = [
        {
            "role": role, "tensors": len(tensors), "shape": list(shape), "axis": axis, "dtype": dtype,
            "behind": behind, "nbytes": sum(t.nbytes for t in tensors),
        }
        for (role, shape, axis, dtype, behind), tensors in groups.items()
    ]  # fmt: skip
    needs = estimate(checkpoint, plan, Path.cwd(), undo)
    first = plan.writers[0]
    return Inspection(
        model=model,
        model_type=checkpoint.model_type,
        n_layers=checkpoint.n_layers,
        d_model=checkpoint.tensors[first.tensor].shape[first.axis],
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        writers=writers,
        kept=plan.kept,
        untouched=plan.untouched,
        tied_head=plan.tied_head,
        left_out=list(checkpoint.left_out),
        edited=_is_edited(checkpoint),
        **asdict(needs),
    )


def _is_edited(checkpoint: Checkpoint) -> bool:
    """Whether there are records of an edit, or a GGUF itself says so, whose records may lie elsewhere."""
    if f"{checkpoint.records}/run.json" in checkpoint.side_files:
        return True
    return checkpoint.format == "gguf" and BASE in read_gguf(checkpoint.source).metadata
