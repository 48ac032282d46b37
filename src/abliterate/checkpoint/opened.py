"""A checkpoint as one value: its table of tensors, its configuration, and whether it is still what was opened.

Owns what a configuration says of layers, and the marks by which files are known again. Never opens one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from abliterate.checkpoint.naming import records_of
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.errors import CheckpointError, VerifyError

#: What the language model's part of a configuration is called where it is one of several.
LANGUAGE = ("text_config", "llm_config", "language_config", "language_model_config")
_SAMPLES, _SAMPLE = 8, 1 << 16

#: Device, inode, size and time of the last change of a file.
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint at rest.

    `format` is safetensors or gguf. `tensors` maps names to `TensorInfo` in shard order; `shards` and `side_files` are
    paths relative to the folder `path`, `left_out` the weight files in it that do not belong to the index. `config` is
    config.json, or what a GGUF's metadata amounts to, with llama.cpp's name of the architecture as `model_type`.
    `fingerprint` hashes the configuration, every header and sampled spans of every shard (not every byte). `stamps`
    tells of every file whether it is still the one that was opened.
    """

    path: Path
    format: str
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    shards: tuple[str, ...]
    side_files: tuple[str, ...]
    left_out: tuple[str, ...]
    fingerprint: str
    stamps: dict[str, Stamp]

    @property
    def source(self) -> Path:
        """What it was opened from: the folder, or the GGUF file (of a split one the first part)."""
        return self.path / self.shards[0] if self.format == "gguf" else self.path

    @property
    def records(self) -> str:
        """The folder in which records of an edit of it lie or would lie, from the folder `path` on."""
        return records_of(self.source.name if self.format == "gguf" else "")

    @property
    def nbytes(self) -> int:
        """Size of all tensors on disk, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def n_layers(self) -> int:
        """Number of layers of the language model, by config.json.

        Raises:
            CheckpointError: it does not say.
        """
        for part in self._language:
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
                value = part.get(name)
                if type(value) is int and 0 < value <= len(self.tensors):
                    return value
                if value is not None:
                    raise CheckpointError(
                        f"{self.path}: config.json: {name} is {str(value)[:40]!r}; expected a number of layers, no "
                        f"more than the {len(self.tensors)} tensors"
                    )
        raise CheckpointError(f"{self.path}: config.json does not say how many layers the language model has")

    @property
    def n_further_layers(self) -> int:
        """Layers stored behind the last that predict further tokens, by config.json."""
        numbers = (v for part in self._language for k, v in part.items() if "nextn" in k or "mtp" in k)
        return sum(v for v in numbers if isinstance(v, int))

    @property
    def _language(self) -> list[dict[str, Any]]:
        """The part of the configuration that is the language model's, and the whole; others only if these lack it."""
        parts = [self.config[name] for name in LANGUAGE if isinstance(self.config.get(name), dict)]
        others = [v for v in self.config.values() if isinstance(v, dict) and "vocab_size" in v]
        return [*parts, self.config, *(part for part in others if not parts and part not in parts)]

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""
        return str(self.config.get("model_type", ""))

    def require_unchanged(self) -> None:
        """Check that no file was written to or replaced since the checkpoint was opened.

        Raises:
            VerifyError: one was; names it.
        """
        for name, known in self.stamps.items():
            path = self.path / name
            if not path.is_file() or stamp(path) != known:
                raise VerifyError(
                    f"{path}: changed while the model was read; nothing was published: start again when it is whole"
                )


def stamp(file: Path) -> Stamp:
    """The marks by which a file is known again."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class Digest(Protocol):
    """What takes bytes in to make a hash of them."""

    def update(self, data: bytes, /) -> None:
        """Take in more bytes."""
        ...


def take_samples(digest: Digest, file: BinaryIO, start: int, size: int) -> None:
    """Take in spans of a file's data, which begins at `start`: evenly spread, so that any other weights show."""
    for i in range(_SAMPLES):
        file.seek(start + max(0, size - start) * i // _SAMPLES)
        digest.update(file.read(_SAMPLE))
