"""What an edit will change and what it leaves alone, decided before any weight is read.

Owns the plan and its translation into run-time sites; never applies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from abliterate.architecture.patterns import Architecture
from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.storage import matrices
from abliterate.edit.retype import retyped
from abliterate.edit.untie import Untied
from abliterate.edit.writers import ResidualWriter, residual_writers
from abliterate.errors import UnsupportedError, VerifyError
from abliterate.model.sites import WriterSite

Embeddings = Literal["edit", "keep", "untie"]


@dataclass(frozen=True, slots=True)
class EditPlan:
    """The writers that will be edited; `kept` maps writers left alone to the reason; `untouched` counts the rest.

    `untied` names the embedding from whose bytes the LM head gets a tensor of its own, and that tensor;
    `shared_head` is whether the base's head shares its embedding's weights; `retyped` has the new types of tensors
    whose own cannot be edited.
    """

    writers: tuple[ResidualWriter, ...]
    kept: dict[str, str]
    untouched: int
    source: str
    untied: Untied | None = None
    shared_head: bool = False
    retyped: Mapping[str, str] = field(default_factory=dict)

    @property
    def tied_head(self) -> str | None:
        """What becomes of an LM head that shares the embedding's weights, in words; None where none does."""
        if self.untied is not None:
            return f"now has a tensor of its own, '{self.untied.head}', as it was"
        if any(w.tied_to for w in self.writers):
            return "shares the embedding's weights and changes with it"
        return "shares the embedding's weights, which were kept" if self.shared_head else None

    @property
    def sites(self) -> list[WriterSite]:
        """The same edit as places to hook in the running model, one for each module."""
        found = list(dict.fromkeys(_site(w, w.layer, w.module) for w in self.writers))
        # A tied head reads through the edited embedding, and so loses what that was projected against.
        tied = (w for w in self.writers if w.tied_to and self.untied is None)
        return found + [_site(w, None, "head") for w in tied]

    @property
    def places(self) -> list[str]:
        """The place of each site, by which its strength goes: a tied head has that of the embedding."""
        tied = [w.place for w in self.writers if w.tied_to and self.untied is None]
        outside = len(self.sites) - len(tied)
        return [s.module if s.layer is None else f"{s.layer}.{s.module}" for s in self.sites[:outside]] + tied

    def weighted(self, strengths: Mapping[str, float]) -> EditPlan:
        """The same plan with a strength of its own for every place; a writer whose place has none, or 0, is left alone.

        No strengths at all stand for 1 everywhere.

        Raises:
            VerifyError: there is no such place in a block.
        """
        if not strengths:
            return self
        places = {w.place for w in self.writers}
        if unknown := [name for name in strengths if name[0].isdigit() and name not in places]:
            raise VerifyError(
                f"the direction has a strength for '{unknown[0]}', and nothing there writes to the stream: it was "
                "tuned on another model"
            )
        writers = tuple(replace(w, strength=strengths[w.place]) for w in self.writers if strengths.get(w.place))
        kept = {w.tensor: "strength 0" for w in self.writers if not strengths.get(w.place)}
        untied = self.untied if self.untied is not None and self.untied.embedding not in kept else None
        retyped = {name: dtype for name, dtype in self.retyped.items() if name not in kept}
        return replace(self, writers=writers, kept=self.kept | kept, untied=untied, retyped=retyped)


def _site(writer: ResidualWriter, layer: int | None, module: str) -> WriterSite:
    offset = writer.gain_offset + writer.gain_included
    return WriterSite(layer, module, writer.gain_parameter, offset, writer.centred, writer.strength)


def plan_edit(
    checkpoint: Checkpoint,
    embeddings: Embeddings = "edit",
    known: Architecture | None = None,
    requantize: str | None = None,
) -> EditPlan:
    """The plan to edit every residual writer of a checkpoint, by what is kept or learned of its class, or `known`.

    With `embeddings="edit"` the stream loses the direction entirely; an embedding that is tied to the LM
    head takes the direction out of what the head reads as well. With "untie" the head gets a copy of its own first,
    which is not edited; where they are not tied, that is the same as "edit". With "keep", what the embedding writes
    along the direction stays in the stream.

    With `requantize`, tensors of a GGUF whose type cannot be edited get that one.

    Raises:
        UnsupportedError: weights that cannot be placed, or are stored in a type that cannot be edited; names them. Or
            a GGUF's tied head is to be untied.
        UsageError: `requantize` is no type, or the checkpoint no GGUF.
    """
    writers = residual_writers(checkpoint, known)
    kept = {w.tensor: "--embeddings keep" for w in writers if w.role == "embed" and embeddings == "keep"}
    edited = tuple(w for w in writers if w.tensor not in kept)
    names = [w.tensor for w in edited]
    new_types = retyped(checkpoint, names, requantize) if requantize is not None else {}
    for w in (w for w in edited if w.tensor not in new_types):
        next(matrices(checkpoint, checkpoint.tensors[w.tensor], w.axis), None)  # raises where it cannot be edited
    untied = next((Untied(w.tensor, w.tied_to) for w in edited if w.tied_to), None) if embeddings == "untie" else None
    if untied is not None and checkpoint.format == "gguf":
        raise UnsupportedError(
            f"{checkpoint.source}: its LM head shares the embedding's weights, and a GGUF is given none of its own; "
            "use --embeddings edit or keep, or untie the safetensors checkpoint and convert the result"
        )
    untouched, shared = len(checkpoint.tensors) - len(writers), any(w.tied_to for w in writers)
    return EditPlan(edited, kept, untouched, checkpoint.fingerprint, untied, shared, new_types)
