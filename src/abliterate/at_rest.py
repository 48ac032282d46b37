"""What is done to checkpoints at rest: find MODEL, `edit`, `undo`, `compare`, finish a result with record and card.

Runs no model and imports no torch, unless an architecture must be learned.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from yaml import YAMLError, safe_load

from abliterate.checkpoint import Checkpoint, first_part, hub_name, open_checkpoint, resolve_model
from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.checkpoint.naming import DIRECTIONS, PAGE
from abliterate.checkpoint.stream import tensor_sha256
from abliterate.compare.compare import Comparison, compare_checkpoints
from abliterate.direction.direction import Direction
from abliterate.direction.given import load_given
from abliterate.edit.adapter import write_adapter
from abliterate.edit.apply import apply_edit
from abliterate.edit.plan import EditPlan
from abliterate.edit.undo import WayBack, undo_edit
from abliterate.edit.untie import BASE_FILES
from abliterate.errors import AbliterateError, UsageError, VerifyError
from abliterate.formats import check_format, require_room, result_files, target_of
from abliterate.model.progress import Steps, no_steps
from abliterate.options import Options
from abliterate.report.card import CARRIED_OVER, model_card
from abliterate.report.page import page
from abliterate.report.record import RunRecord
from abliterate.workspace import Workspace, check_output, writable

#: Characters of a model's card in which its metadata must stand.
_HEAD = 1 << 16


def find_model(model: str) -> Path:
    """The folder or GGUF file of MODEL: a folder, a file, a hub id, or `demo`.

    Raises:
        CheckpointError: there is no such model here.
    """
    if model == "demo":
        from abliterate.demo.build import demo_folder

        return demo_folder()
    return resolve_model(model)


def edit(
    model: str,
    direction: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    steps: Steps = no_steps,
    **options: Any,
) -> RunRecord:
    """Steps 3 and 4: project the directions in a file out of `model`, into the new folder `output`. Runs no model.

    Of a GGUF `output` is a GGUF too, with its records in a folder beside it, unless `format` names the other: then the
    base is converted first, to `type`, and what came of it is edited. Takes a file that `select` wrote, a `.npy`
    of shape `[d_model]` or `[k, d_model]`, or a control vector in a `.gguf`; `layer` takes one layer's of directions by
    layer. An edit that was killed leaves `output.partial`, which `resume=True` takes up at the first unfinished file.

    Raises:
        AbliterateError: as its kinds say.
    """
    chosen, out = Options(**options), Path(output).expanduser()
    chosen.check()
    check_format(out, chosen)
    found = load_given(Path(direction), chosen.layer)
    _require_place_for_offset(found, direction, chosen)
    source = find_model(model)
    check_output(out, source)
    checkpoint = open_checkpoint(source)
    target = target_of(out, checkpoint, chosen)
    given = {"model": model, "direction": str(direction), "output": str(output), **options}
    start = time.monotonic()
    with Workspace(out, source, _edit_settings(checkpoint, found, chosen), resume, target.files) as work:
        try:
            work.write("given", given)
            base, plan = target.base(checkpoint, work, chosen, steps)
            plan = plan.weighted(found.strengths)
            edits = write_edited(base, plan, found, work, chosen, steps)
        except AbliterateError:
            work.discard_if_new()
            raise
        found.save(work.record(DIRECTIONS))
        record = RunRecord(
            model=model,
            hub_id=hub_name(model),
            model_fingerprint=checkpoint.fingerprint,
            given=given,
            resolved=asdict(chosen) | {"type": target.type, "n_layers": checkpoint.n_layers},
            direction=found.where | {"rank": found.rank},
            edits=edits,
            kept=plan.kept,
            untouched=plan.untouched,
            tied_head=plan.tied_head,
            retyped=dict(plan.retyped),
            base_card=base_card(checkpoint.source),
            seconds={"edit": round(time.monotonic() - start, 2)},
        )
        finish(work, record)
    return record


def _require_place_for_offset(found: Direction, name: str | Path, options: Options) -> None:
    """Check that what a direction leaves in the stream can go into the embedding.

    Raises:
        UsageError: options keep the embedding, or scale it.
    """
    if found.offset and (options.keep_norms or options.embeddings == "keep"):
        option = "--keep-norms" if options.keep_norms else "--embeddings keep"
        raise UsageError(f"{name}: an affine edit, whose constant goes into the embedding as it is; leave out {option}")


def _edit_settings(checkpoint: Checkpoint, found: Direction, options: Options) -> dict[str, Any]:
    """What an edit that goes on must have in common with the one that was stopped."""
    return {
        "edit": checkpoint.fingerprint,
        "direction": sha256(found.removed.tobytes()).hexdigest(),
        "strengths": found.strengths,
        "offset": found.offset,
        **{
            name: getattr(options, name)
            for name in ("strength", "embeddings", "keep_norms", "format", "type", "undo", "requantize")
        },
    }


def write_edited(
    checkpoint: Checkpoint, plan: EditPlan, direction: Direction, work: Workspace, options: Options, steps: Steps
) -> list[dict[str, Any]]:
    """Steps 3 and 4 into a workspace, as a checkpoint or an adapter; the records of all edited tensors."""
    progress = steps("editing weights", len(plan.writers))
    vector, out, offset = direction.removed, work.folder, direction.offset
    try:
        if options.format == "adapter":
            edits = write_adapter(checkpoint, plan, vector, out, options.strength, progress, offset=offset)
        else:
            edits = apply_edit(
                checkpoint, plan, vector, out, options.strength, progress,
                keep_norms=options.keep_norms, offset=offset, undo=options.undo, journal=work, names=work.files,
            )  # fmt: skip
    except VerifyError:
        _require_unchanged(checkpoint, work)
        raise
    _require_unchanged(checkpoint, work)
    records = [asdict(record) for record in edits]
    if options.format != "adapter":
        try:
            check_edited(work.result, records if work.resumed else [])
        except AbliterateError as error:
            raise work.damaged(str(error)) from None
    return records


def _require_unchanged(checkpoint: Checkpoint, work: Workspace) -> None:
    """Drop all that was written where a file of the model changed meanwhile: it may be of two models.

    Raises:
        VerifyError: one did.
    """
    try:
        checkpoint.require_unchanged()
    except VerifyError:
        work.discard()
        raise


def check_edited(result: Path, edits: list[dict[str, Any]]) -> None:
    """Check that a folder or GGUF is whole, and that every edited tensor still has the bytes that its record names.

    Raises:
        CheckpointError: the checkpoint is not whole.
        VerifyError: a tensor has other bytes.
    """
    opened = open_checkpoint(result)
    tensors = opened.tensors
    for edit_record in edits:
        name = edit_record["tensor"]
        if name in tensors:
            with (opened.path / tensors[name].file).open("rb") as file:
                found = tensor_sha256(file.fileno(), tensors[name])
        if name not in tensors or found != edit_record["sha256"]:
            raise VerifyError(f"tensor '{name}' is not as it was written")


@dataclass(frozen=True)
class Restored:
    """What `undo` restored: the output, the base's fingerprint, how many tensors and files were checked by hash."""

    output: str
    base: str
    tensors: int
    files: int
    seconds: float


def undo(edited: str, output: str | Path, *, steps: Steps = no_steps) -> Restored:
    """The base of an edited checkpoint, bit for bit, into the new folder (or GGUF) `output`.

    Raises:
        AbliterateError: as its kinds say; VerifyError where the edited weights were changed since.
    """
    source, out = find_model(edited), Path(output).expanduser()
    check_output(out, source)
    checkpoint = open_checkpoint(source)
    names = result_files(out, checkpoint)
    way_back = WayBack.load(checkpoint)
    tensors = sum(len(f.tensors) for f in way_back.files)
    require_room(out, checkpoint)
    start = time.monotonic()
    with Workspace.scratch(out, source, names) as work:
        undo_edit(checkpoint, way_back, work.folder, steps("restoring weights", tensors), names=names)
        work.publish()
    files = len(way_back.files) + len(way_back.side_files)
    return Restored(str(first_part(out)), way_back.base, tensors, files, round(time.monotonic() - start, 2))


def base_card(source: Path) -> dict[str, Any]:
    """What a model's own card says of licence, language and task; nothing where it has none that can be read.

    A GGUF says so in its metadata: a card beside it may be another model's.
    """
    if source.is_file():
        stated = read_gguf(source).metadata
        return {k: v for k in CARRIED_OVER if isinstance(v := stated.get(f"general.{k.replace('_', '.')}"), str)}
    try:
        with (source / "README.md").open(encoding="utf-8") as file:
            head = re.match(r"\s*---\n(.*?)\n---\s", file.read(_HEAD), re.DOTALL)
        said = safe_load(head[1]) if head else None
    except (OSError, ValueError, YAMLError, RecursionError):  # a stranger's file
        return {}
    if not isinstance(said, dict):
        return {}

    def is_plain(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))

    return {k: said[k] for k in CARRIED_OVER if is_plain(said.get(k))}


def finish(work: Workspace, record: RunRecord) -> None:
    """Write record, page and card (the base's own card is set aside), then publish."""
    card, aside = work.card, work.folder / BASE_FILES / "README.md"
    if card.exists() and not aside.exists() and not work.files:
        aside.parent.mkdir(parents=True, exist_ok=True)
        card.rename(aside)
    card.write_text(model_card(record, work.output.name), encoding="utf-8")
    work.record(PAGE).write_text(page(record, work.output.name), encoding="utf-8")
    record.save(work.record("run.json"))
    work.publish()


def compare(
    base: str,
    other: str,
    *,
    direction: str | Path | None = None,
    save: str | Path | None = None,
    steps: Steps = no_steps,
) -> Comparison:
    """How `other` differs from `base`: tensors, the direction that their changes share, settings. Runs no model.

    With `direction`, how near the shared one is to those in that file; `save` writes the shared one, for `edit`.

    Raises:
        AbliterateError: as its kinds say; VerifyError where there is no direction to save.
    """
    given = load_given(Path(direction)).vector if direction is not None else None
    if save is not None:
        if Path(save).exists():
            raise UsageError(f"{save}: exists already; choose another name")
        if Path(save).suffix != ".safetensors":
            raise UsageError(f"{save}: directions are written as safetensors; give it a name that ends in .safetensors")
        writable(Path(save))
    before, after = (open_checkpoint(find_model(model)) for model in (base, other))
    found = compare_checkpoints(before, after, given, steps)
    if save is not None:
        if not found.directions.size:
            raise VerifyError(f"{other}: no change of a matrix of the stream's width, so there is no direction to save")
        vector = found.directions[0] if len(found.directions) == 1 else found.directions
        Direction(vector, None, None, 1.0, f"shared by the changes from {base} to {other}").save(Path(save))
    return found
