"""Open a Hugging Face checkpoint folder as one table of tensors plus its side files.

Owns the folder layout: single file or index with shards, which files are weights, the fingerprint.
Never loads weights, and never knows what the tensors are for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from abliterate.checkpoint.naming import RECORDS
from abliterate.checkpoint.opened import Checkpoint, stamp, take_samples
from abliterate.checkpoint.safetensors_file import MAX_HEADER, TensorInfo, read_header
from abliterate.errors import CheckpointError, UnsupportedError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: Weight files of other tools and frameworks: they hold the unedited base, so an edited copy leaves them out.
FOREIGN_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot")
#: What training leaves behind; optimizer state and the like do not belong to the model.
NOT_SIDE_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt")
#: Values of `quant_method` whose weights are codes with scales beside them: FP8 of several makers, and MXFP4.
QUANTISED = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4")
#: Of a JSON file; the longest index known has a tenth of these bytes, the deepest configuration a tenth of the levels.
_MOST_JSON, _MOST_LEVELS = 1 << 26, 64


def open_folder(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`, every header read and checked, no tensor data read.

    Raises:
        CheckpointError: no such folder, no config.json, a missing shard, a malformed header or index.
        UnsupportedError: only pickled weights, or a quantised or GGUF checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a Hugging Face checkpoint folder or a hub id org/name")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: an adapter, not a model; merge it into its base first (PEFT: merge_and_unload)")
    config = _read_json(path / "config.json", "every Hugging Face checkpoint has one")
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(f"{path}: config.json: model_type is {config['model_type']!r:.40}; expected a name")
    _check_quantisation(path, config)
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
    shards = _shard_names(path, files)
    side = tuple(f for f in files if f not in shards and not _is_foreign(f))
    left_out = tuple(f for f in files if f not in shards and _is_foreign(f))
    check_links(path, (*shards, *side))
    stamps = {f: stamp(path / f) for f in (*shards, *side)}
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, tensor in read_header(path / shard).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor '{name}' is in both {tensors[name].file} and {shard}")
            tensors[name] = replace(tensor, file=shard)
    _check_index(path, tensors)
    return Checkpoint(path, "safetensors", tensors, config, shards, side, left_out, _fingerprint(path, shards), stamps)


def check_links(path: Path, files: Iterable[str]) -> None:
    """Refuse links that lead out of the folder: a stranger's model could have any file copied into the result.

    A snapshot in the hub's cache consists of links into the `blobs` beside it.

    Raises:
        CheckpointError: one does; names it.
    """
    root = path.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in files:
        target = (path / name).resolve() if (path / name).is_symlink() else root / name
        if not any(home in target.parents for home in homes):
            raise CheckpointError(
                f"{path / name}: a link that leads out of the model's folder, to {target}; put the file itself there "
                "(cp -rL copies a folder that way)"
            )


def _check_quantisation(path: Path, config: dict[str, Any]) -> None:
    """Refuse the ways to quantise whose codes cannot be edited one by one."""
    stated = config.get("quantization_config")
    if not stated:
        return
    method = str(stated.get("quant_method", "unknown")) if isinstance(stated, dict) else "unknown"
    if method not in QUANTISED:
        raise UnsupportedError(
            f"{path}: weights are quantised by '{method}', which packs several weights into one word or stores them in "
            f"a form that only its own kernels read; edit the model's bf16 or f16 checkpoint and quantise the result "
            f"(of quantised ones, {', '.join(QUANTISED)} can be edited as they are)"
        )


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") and part != ".gitattributes" for part in file.relative_to(root).parts)


def _is_foreign(name: str) -> bool:
    """Whether a file holds weights, or what training left; the records of an edit are neither, directions included."""
    return not name.startswith(f"{RECORDS}/") and (name in NOT_SIDE_FILES or name.lower().endswith(FOREIGN_WEIGHTS))


def _read_json(file: Path, why: str) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: no {file.name}; {why}: is this the right folder?")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file that may be anyone's.

    Raises:
        CheckpointError: it is too long, too deep, or no JSON object.
    """
    size = file.stat().st_size
    if size > _MOST_JSON:
        raise CheckpointError(f"{file}: {size:,} bytes; expected a JSON object of at most {_MOST_JSON:,}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    if _deeper(value, _MOST_LEVELS):
        raise CheckpointError(f"{file}: more than {_MOST_LEVELS} objects and lists in one another")
    return value


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(not levels or _deeper(v, levels - 1) for v in inner)


def _weight_map(path: Path) -> dict[str, str] | None:
    """The index's map from tensor to shard, or None for a single-file checkpoint."""
    if not (path / INDEX).is_file():
        return None
    weight_map = _read_json(path / INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path / INDEX}: no weight_map from tensor names to shard files")
    return weight_map


def _shard_names(path: Path, files: list[str]) -> tuple[str, ...]:
    """The safetensors files that make up the model, in name order."""
    weight_map = _weight_map(path)
    if weight_map is None:
        if SINGLE in files:
            return (SINGLE,)
        pickles = [f for f in files if f.endswith(PICKLES) and f not in NOT_SIDE_FILES]
        if pickles:
            raise UnsupportedError(
                f"{path}: weights are pickled ({pickles[0]}), which runs code on loading, and are refused; convert "
                "with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        if ggufs := [f for f in files if f.endswith(".gguf")]:
            raise UnsupportedError(f"{path}: only GGUF weights; give the file itself, as in {path / ggufs[0]}")
        raise CheckpointError(f"{path}: no {SINGLE} and no {INDEX}; the weights are missing: download them again")
    shards = tuple(sorted(set(weight_map.values())))
    odd = next((s for s in shards if not s.endswith(".safetensors") or s.startswith(f"{RECORDS}/")), None)
    if odd is not None:
        raise CheckpointError(f"{path / INDEX}: names the shard {odd!r}; expected files *.safetensors of the model's")
    missing = [s for s in shards if s not in files]
    if missing:
        raise CheckpointError(
            f"{path / INDEX}: names {len(missing)} of {len(shards)} shards that are not there: "
            f"{', '.join(missing[:3])}; the download is incomplete: fetch it again"
        )
    return shards


def _check_index(path: Path, tensors: dict[str, TensorInfo]) -> None:
    weight_map = _weight_map(path)
    if weight_map is None:
        return
    wrong = [n for n, shard in weight_map.items() if n not in tensors or tensors[n].file != shard]
    if wrong:
        raise CheckpointError(
            f"{path / INDEX}: {len(wrong)} tensors are not in the shard it names, first '{wrong[0]}' "
            f"in {weight_map[wrong[0]]}; index and shards are of different saves"
        )


def _fingerprint(path: Path, shards: tuple[str, ...]) -> str:
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for shard in shards:
        with (path / shard).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, MAX_HEADER)))
            take_samples(digest, file, 8 + length, (path / shard).stat().st_size)
    return digest.hexdigest()
