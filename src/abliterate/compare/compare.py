"""`compare`: two checkpoints at rest, tensor by tensor, and what their differences have in common.

Owns the order of the steps and the result; runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.codecs import Float32Array
from abliterate.compare.change import AlongBasis, Change, along_basis
from abliterate.compare.files import side_differences
from abliterate.compare.shared import Side, cosines, shared_directions
from abliterate.compare.tensors import Files, Names, changed, changes
from abliterate.edit.apply import gain_of
from abliterate.edit.projection import orthonormal
from abliterate.edit.writers import ResidualWriter, residual_writers
from abliterate.envelope import enveloped
from abliterate.errors import CheckpointError, UnsupportedError, VerifyError
from abliterate.model.progress import Steps, no_steps

#: Names of the width of the stream in configurations.
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class TensorChange:
    """What happened to one tensor.

    `share` is `‖Δ‖ / ‖W‖`, None where W is zero; `rank` that of Δ beyond rounding (the largest of its matrices, None:
    of more than 16, or not told), `cosine` of its first vector and the shared direction, `explained` how much of
    `‖Δ‖²` lies along the shared directions, `strength` how much of what the base has along them was taken away. The
    last three are None where no axis is as wide as the stream; `role` where the tensor is not known to write to it.
    """

    tensor: str
    role: str | None
    layer: int | None
    dtype: str
    shape: list[int]
    share: float | None
    rank: int | None
    cosine: float | None
    explained: float | None
    strength: float | None


@dataclass(frozen=True)
class Comparison:
    """How another checkpoint differs from a base: its tensors, the directions their changes share, the other files.

    `explained` is the share of all changes, rounding left out, that lies along `directions`
    `[k, d_model]`; `cosines` are those of the principal angles between their span and the given one's.
    """

    base: str
    other: str
    same: int
    changed: list[TensorChange]
    rounded: list[str]
    unread: list[str]
    added: list[str]
    missing: list[str]
    reshaped: list[str]
    directions: Float32Array
    explained: float | None
    strength: float | None
    cosines: list[float] | None
    files: dict[str, list[str]]
    writers_known: str | None

    @property
    def as_dict(self) -> dict[str, Any]:
        """For JSON: of the vectors only how many they are."""
        return enveloped("comparison", asdict(self) | {"directions": len(self.directions)})


def compare_checkpoints(
    base: Checkpoint, other: Checkpoint, given: Float32Array | None = None, steps: Steps = no_steps
) -> Comparison:
    """What differs between two checkpoints, and along which directions of the stream.

    Reads both a few blocks at a time. The base's architecture tells which axis of a tensor lies in the stream and
    which gain is behind it; where it is not known, every axis of the stream's width is looked at.

    Args:
        base: the model as it was.
        other: what was made of it, by any tool.
        given: directions `[d_model]` or `[k, d_model]` to compare with.
        steps: makes progress bars.

    Raises:
        CheckpointError: no tensor has the same name in both.
        VerifyError: a tensor holds NaN or infinity, or `given` has another width than the stream.
    """
    names = Names.of(base, other)
    writers, why = _writers(base)
    width = _width(base, writers)
    _check(base, other, names, width, given)
    with Files.opened(base, other) as files:
        differ = changed(files, names.both, steps("comparing", len(names.both)))
        found = changes(files, differ, steps("looking at changes", len(differ)))
        real = {n: c for n, c in found.items() if c is not None and any(len(m.sizes) for m in c)}
        sides = {name: _sides(files, name, writers.get(name), width) for name in real}
        shared = shared_directions([(m, s) for n, c in real.items() for s in sides[n] for m in c])
        advance = steps("measuring along them", len(real))
        tensors = []
        for name, of in real.items():
            tensors.append(_described(files, name, of, writers.get(name), sides[name], shared))
            advance(1)
    along = AlongBasis.together(a for _, a in tensors if a is not None)
    delta = sum(m.delta - m.rounding for c in real.values() for m in c)
    return Comparison(
        base=str(base.source),
        other=str(other.source),
        same=len(names.both) - len(differ),
        changed=[t for t, _ in tensors],
        rounded=[n for n, c in found.items() if c is not None and n not in real],
        unread=[n for n, c in found.items() if c is None],
        added=names.added,
        missing=names.missing,
        reshaped=names.reshaped,
        directions=shared,
        explained=min(1.0, along.delta / delta) if delta > 0 else None,
        strength=along.strength,
        cosines=cosines(given, shared) if given is not None and shared.size else None,
        files=side_differences(base, other),
        writers_known=why,
    )


def _check(base: Checkpoint, other: Checkpoint, names: Names, width: int | None, given: Float32Array | None) -> None:
    """Check that there is something to compare, and that directions to compare with are as wide as the stream."""
    if base.format != other.format:
        gguf, folder = (base, other) if base.format == "gguf" else (other, base)
        raise UnsupportedError(
            f"{gguf.source}: a GGUF, whose tensors have other names and layouts than those of {folder.path}; convert "
            "that with convert_hf_to_gguf.py of llama.cpp, to the same type, and compare the two GGUFs"
        )
    if not names.both:
        raise CheckpointError(
            f"{other.source}: none of its {len(other.tensors)} tensors has the name and shape of one in {base.source}; "
            "are they of one architecture, saved alike?"
        )
    if given is not None and width is not None and np.atleast_2d(given).shape[1] != width:
        raise VerifyError(
            f"the given direction has d_model {np.atleast_2d(given).shape[1]}, the model {width}: not of this model"
        )


def _writers(base: Checkpoint) -> tuple[dict[str, ResidualWriter], str | None]:
    """What is known to write to the stream, by tensor; or why it is not known."""
    try:
        return {w.tensor: w for w in residual_writers(base)}, None
    except UnsupportedError as error:
        return {}, str(error)


def _width(base: Checkpoint, writers: dict[str, ResidualWriter]) -> int | None:
    """Width of the stream."""
    for w in writers.values():
        return base.tensors[w.tensor].shape[w.axis]
    parts = [base.config, *(v for v in base.config.values() if isinstance(v, dict))]
    widths = (part.get(name) for part in parts for name in _WIDTHS)
    return next((w for w in widths if isinstance(w, int)), None)


def _sides(files: Files, name: str, writer: ResidualWriter | None, width: int | None) -> list[Side]:
    """The axes of a tensor's matrices that lie in the stream, or may."""
    shape = files.base.tensors[name].shape
    last = max(0, len(shape) - 2)
    if writer is not None and writer.axis >= last:
        return [Side(len(shape) > 1 and writer.axis == len(shape) - 1, gain_of(files.base, writer), writer.centred)]
    axes = shape[last:] if len(shape) > 1 else shape
    return [Side(i == 1) for i, n in enumerate(axes) if n == width]


def _described(
    files: Files,
    name: str,
    of: Sequence[Change],
    writer: ResidualWriter | None,
    sides: Sequence[Side],
    shared: Float32Array,
) -> tuple[TensorChange, AlongBasis | None]:
    """A changed tensor, and what its change does along the shared directions on the side where that is more."""
    tensor = files.other.tensors[name]
    base, delta, rounding = (sum(getattr(m, part) for m in of) for part in ("base", "delta", "rounding"))
    ranks = [m.rank for m in of]
    best: tuple[AlongBasis, float] | None = None
    for side in sides if shared.size else ():
        basis = orthonormal(shared, side.gain, side.centred)
        along = AlongBasis.together(along_basis(pair, basis, side.by_rows) for pair in files.pairs(name))
        if best is None or along.delta > best[0].delta:
            largest = max((m for m in of if len(m.sizes)), key=lambda m: float(m.sizes[0]))
            first = largest.right[:, 0] if side.by_rows else largest.left[:, 0]
            best = along, float(np.linalg.norm(basis.T @ first))
    described = TensorChange(
        tensor=name,
        role=writer.role if writer is not None else None,
        layer=writer.layer if writer is not None else None,
        dtype=tensor.dtype,
        shape=list(tensor.shape),
        share=(delta / base) ** 0.5 if base else None,
        rank=None if None in ranks else max(r for r in ranks if r is not None),
        cosine=best[1] if best is not None else None,
        explained=min(1.0, best[0].delta / (delta - rounding)) if best is not None and delta > rounding else None,
        strength=best[0].strength if best is not None else None,
    )
    return described, best[0] if best is not None else None
