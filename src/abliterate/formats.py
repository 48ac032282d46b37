"""What OUT is, and the base in its format: MODEL as it is, or converted first.

Owns which formats and types go together, and that a base is edited only when all of it is converted. Never edits one.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoint import Checkpoint, open_checkpoint
from abliterate.checkpoint.ggml import llama_cpp
from abliterate.checkpoint.gguf_file import read_gguf
from abliterate.checkpoint.gguf_names import require_gguf
from abliterate.checkpoint.naming import gguf_names, is_gguf
from abliterate.checkpoint.stream import require_disk, sync
from abliterate.convert.mixes import MIXES
from abliterate.convert.to_gguf import size_of, to_gguf
from abliterate.convert.to_safetensors import DTYPES, decoded_size, to_safetensors
from abliterate.edit.plan import EditPlan, plan_edit
from abliterate.edit.retype import larger
from abliterate.errors import UnsupportedError, UsageError
from abliterate.model.progress import Steps
from abliterate.options import Options
from abliterate.workspace import Workspace

#: Disk that the way back and the records take, as a share of the model; measured at one to three hundredths.
_BESIDE = 0.05
_TYPES = {"gguf": tuple(MIXES), "safetensors": tuple(DTYPES)}
_DEFAULT = "bf16"


@dataclass(frozen=True)
class Target:
    """What OUT is: the names of its `files` where it is a GGUF, and the `type` MODEL is converted to, if it is."""

    files: tuple[str, ...]
    type: str | None = None

    @property
    def made(self) -> bool:
        """Whether a GGUF is made of a folder."""
        return bool(self.files) and self.type is not None

    def base(
        self, checkpoint: Checkpoint, work: Workspace, options: Options, steps: Steps
    ) -> tuple[Checkpoint, EditPlan]:
        """What is edited, and how: the checkpoint, or what it is converted to in the workspace, until `publish`.

        A GGUF is made of the base and its codes are moved then: quantising what was edited would put up to nine tenths
        of the direction back.

        Raises:
            UnsupportedError: its class, tokenizer or a tensor is not converted, or not edited.
            ResourceError: the disk has no room for the base in both states.
            VerifyError: a file of the model changed meanwhile, or a number does not fit the type.
        """
        base = checkpoint
        if self.type is not None:
            place = work.aside / ("base.gguf" if self.files else "base")
            if not place.exists():
                self._convert(checkpoint, work, place, steps)
            base = open_checkpoint(place)
        plan = plan_edit(base, options.embeddings, requantize=options.requantize)
        require_room(work.output, base, plan)
        return base, plan

    def _convert(self, checkpoint: Checkpoint, work: Workspace, place: Path, steps: Steps) -> None:
        """Write all of the base; it has its name when it is on disk."""
        assert self.type is not None
        shutil.rmtree(work.aside, ignore_errors=True)
        work.aside.mkdir()
        nbytes = size_of(checkpoint, self.type) if self.files else decoded_size(checkpoint, self.type)
        require_disk(work.folder, int((2 + _BESIDE) * nbytes) - _there(work.output))
        part = place.with_name(f"unfinished{place.suffix}")
        if self.files:
            to_gguf(checkpoint, part, self.type, steps(f"converting to {self.type}", len(checkpoint.tensors)))
        else:
            decoded = steps(f"decoding to {self.type}", 1)
            part.mkdir()
            to_safetensors(checkpoint, part, self.type)
            for path in (*part.iterdir(), part):
                sync(path)
            decoded(1)
        checkpoint.require_unchanged()
        part.rename(place)
        sync(work.aside)


def check_format(out: Path, options: Options) -> None:
    """Check what can be checked before a model is looked for.

    Raises:
        UsageError: the format has no such type, or OUT the name of another.
    """
    types = _TYPES.get(options.format, ())
    if options.type is not None and options.type not in types:
        raise UsageError(f"--type {options.type}: --format {options.format} takes {', '.join(types)}")
    if options.format == "gguf" and not is_gguf(out.name):
        raise UsageError(f"--output {out}: with --format gguf comes a GGUF; choose a name that ends in .gguf")
    if options.format == "safetensors" and is_gguf(out.name):
        raise UsageError(f"--output {out}: with --format safetensors comes a folder; leave out '{out.suffix}'")


def target_of(out: Path, checkpoint: Checkpoint, options: Options) -> Target:
    """What OUT is to be, of this checkpoint.

    Raises:
        UsageError: the name of OUT is one of another format; the type is not the checkpoint's, where nothing is
            converted; or options do not go with what OUT is.
        UnsupportedError: an adapter of a GGUF is asked for, or packages for GGUF files are missing.
    """
    wanted = checkpoint.format if options.format in ("checkpoint", "adapter") else options.format
    if options.engine == "llama.cpp" and options.evaluate and wanted != "gguf":
        raise UsageError("--engine llama.cpp: runs GGUF files, and OUT is a folder; leave it out, or add --format gguf")
    if wanted == checkpoint.format:
        _require_own_type(checkpoint, options.type)
        return Target(result_files(out, checkpoint, options.format))
    if options.requantize is not None:
        raise UsageError(
            f"--requantize {options.requantize}: all of a converted model is stored in types that can be edited; leave "
            "it out, and choose --type"
        )
    require_gguf()
    if wanted == "gguf":
        llama_cpp()  # its encoder, and its tokenizer
    return Target((out.name,) if wanted == "gguf" else (), options.type or _DEFAULT)


def _require_own_type(checkpoint: Checkpoint, wanted: str | None) -> None:
    """Check that weights that are not converted are of the type asked for."""
    if wanted is None:
        return
    if checkpoint.format == "gguf":
        number = read_gguf(checkpoint.source).metadata.get("general.file_type")
        stored = next((name for name, (known, _) in MIXES.items() if known == number), f"llama.cpp's type {number}")
        way_on = "leave it out, or give the model's safetensors checkpoint, which is converted to any"
    else:
        nbytes = Counter[str]()
        for tensor in checkpoint.tensors.values():
            nbytes[tensor.dtype.lower()] += tensor.nbytes
        stored, way_on = max(nbytes, key=lambda dtype: nbytes[dtype]), "leave it out"
    if stored != wanted:
        raise UsageError(
            f"--type {wanted}: {checkpoint.source} is stored as {stored}, and what is not converted keeps its types; "
            f"{way_on}"
        )


def result_files(out: Path, checkpoint: Checkpoint, kind: str = "base") -> tuple[str, ...]:
    """The names of the files at OUT where OUT has the checkpoint's format and that is GGUF; none of a folder.

    `kind` is what OUT is to be: the base of an edited checkpoint, or what --format names.

    Raises:
        UsageError: the name of OUT is one of the other kind.
        UnsupportedError: an adapter of a GGUF is asked for.
    """
    if checkpoint.format != "gguf":
        if is_gguf(out.name):
            raise UsageError(
                f"--output {out}: of a safetensors checkpoint comes a folder; leave out '{out.suffix}'"
                f"{'' if kind == 'base' else ', or add --format gguf'}"
            )
        return ()
    if kind == "adapter":
        raise UnsupportedError(
            f"{checkpoint.source}: adapters are for PEFT, which has none for a GGUF; leave out --format adapter, or "
            "give the model's safetensors checkpoint"
        )
    if not is_gguf(out.name):
        raise UsageError(
            f"--output {out}: of a GGUF comes a GGUF; choose a name that ends in .gguf"
            f"{'' if kind == 'base' else ', or add --format safetensors'}"
        )
    return gguf_names(out.name, len(checkpoint.shards))


def require_room(out: Path, checkpoint: Checkpoint, plan: EditPlan | None = None) -> None:
    """Check that the disk has room for a whole copy of the checkpoint, and what is kept beside it.

    A plan says of which tensors the bytes are kept as well, as they get another type.

    What an interrupted run has written there already is not needed again.

    Raises:
        ResourceError: it has not.
    """
    files = checkpoint.shards + checkpoint.side_files
    nbytes = int((1 + _BESIDE) * sum((checkpoint.path / name).stat().st_size for name in files))
    nbytes += larger(checkpoint, plan.retyped) if plan is not None else 0
    require_disk(out.parent, nbytes - _there(out))


def _there(out: Path) -> int:
    """Bytes of the result of an interrupted run, without what it had set aside."""
    work = Workspace.place(out)
    files = (p for p in work.rglob("*") if p.is_file() and Workspace.ASIDE not in p.relative_to(work).parts)
    return sum(p.stat().st_size for p in files)
