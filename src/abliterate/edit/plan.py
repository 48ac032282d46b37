"""What an edit will change and what it leaves alone, decided before any weight is read.

Owns the plan and its translation into run-time sites; never applies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.dtypes import EDITABLE
from abliterate.edit.writers import ResidualWriter, residual_writers
from abliterate.errors import UnsupportedError
from abliterate.model.sites import WriterSite

Embeddings = Literal["edit", "keep"]


@dataclass(frozen=True, slots=True)
class EditPlan:
    """The writers that will be edited; `kept` maps writers left alone to the reason; `untouched` counts the rest."""

    writers: tuple[ResidualWriter, ...]
    kept: dict[str, str]
    untouched: int
    source: str

    @property
    def sites(self) -> list[WriterSite]:
        """The same edit as places to hook in the running model, one for each module."""
        sites = (WriterSite(w.layer, w.module, w.gain_parameter, w.gain_offset, w.centred) for w in self.writers)
        found = list(dict.fromkeys(sites))
        # A tied head reads through the edited embedding, and so loses what that was projected against.
        tied = (w for w in self.writers if w.tied_to)
        return found + [WriterSite(None, "head", w.gain_parameter, w.gain_offset, w.centred) for w in tied]


def plan_edit(checkpoint: Checkpoint, embeddings: Embeddings = "edit") -> EditPlan:
    """The plan to edit every residual writer of a checkpoint.

    With `embeddings="edit"` the stream loses the direction entirely; an embedding that is tied to the LM
    head takes the direction out of what the head reads as well. With "keep", what the embedding writes
    along the direction stays in the stream.

    Raises:
        UnsupportedError: weights that cannot be placed, or are stored in a type that cannot be edited; names them.
    """
    writers = residual_writers(checkpoint)
    kept = {w.tensor: "--embeddings keep" for w in writers if w.role == "embed" and embeddings == "keep"}
    edited = tuple(w for w in writers if w.tensor not in kept)
    for tensor in (checkpoint.tensors[w.tensor] for w in edited):
        if tensor.dtype not in EDITABLE:
            raise UnsupportedError(
                f"{checkpoint.path}: tensor '{tensor.name}' is stored as {tensor.dtype}; can edit {', '.join(EDITABLE)}"
            )
    return EditPlan(edited, kept, len(checkpoint.tensors) - len(writers), checkpoint.fingerprint)
