"""What experiments found for the architectures of transformers, kept as data so that no torch is needed.

Owns `kept.json` and the question whether a configuration is like the one that was experimented on. The file is written
by `scripts/sweep_architectures.py`, which also proves every entry by an edit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from abliterate.architecture.patterns import ONLY, Architecture, Gain, WriterPattern

FILE = Path(__file__).with_name("kept.json")
#: What a configuration says that has no part in what writes to the stream: names, versions, activations, caches.
_IRRELEVANT = frozenset({
    "_name_or_path", "activation_function", "architectures", "attn_implementation", "auto_map", "dtype",
    "experts_implementation", "finetuning_task", "hidden_act", "hidden_activation", "hidden_activations", "id2label",
    "is_encoder_decoder", "label2id", "mlp_hidden_act", "model_type", "output_attentions", "output_hidden_states",
    "position_embedding_type", "prefix", "problem_type", "return_dict", "rope_type", "summary_first_dropout",
    "summary_type", "summary_use_proj", "task_specific_params", "tie_word_embeddings", "tokenizer_class", "torch_dtype",
    "transformers_version", "type", "use_bfloat16", "use_cache",
})  # fmt: skip
#: Parts of a configuration that describe what stands beside the language model.
_BESIDE = ("vision", "audio", "image", "video", "speech", "quantization", "compression", "generation")


def find(config: dict[str, Any]) -> Architecture | str | None:
    """What is kept for a `config.json`: the architecture, why it is refused, or None where nothing like it was seen."""
    entry = _entries().get(str(config.get("model_type", "")))
    if entry is None or not _alike(config, entry["structure"]):
        return None
    return entry["refused"] if "refused" in entry else _architecture(entry)


def model_types() -> Iterable[str]:
    """The model types of which something is kept."""
    return _entries().keys()


def entry(config: dict[str, Any], found: Architecture | str) -> dict[str, Any] | None:
    """What to keep of an experiment on a configuration: an architecture, or why it is refused.

    None where what was found holds for certain layers of this configuration alone.
    """
    if isinstance(found, str):
        return {"structure": _structure(config), "refused": found}
    if any(ONLY in w.tensor for w in found.writers):
        return None
    plain = asdict(found) | {"n_layers": 0}  # another configuration has others
    plain["kinds"] = [sorted(kind) for kind in found.kinds]
    return {"structure": _structure(config), **plain}


def write(entries: dict[str, dict[str, Any]]) -> None:
    """Keep the entries, one line for each model type."""
    lines = [f"{json.dumps(name)}: {json.dumps(entries[name], separators=(',', ':'))}" for name in sorted(entries)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@cache
def _entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return entries


def _architecture(entry: dict[str, Any]) -> Architecture:
    writers = tuple(
        WriterPattern(**{**w, "gain": None if w["gain"] is None else Gain(**w["gain"])}) for w in entry["writers"]
    )
    kinds = tuple(frozenset(kind) for kind in entry["kinds"])
    return Architecture(entry["model_type"], entry["prefix"], writers, tuple(entry["bystanders"]), kinds, entry["leak"])


def _structure(config: dict[str, Any]) -> dict[str, Any]:
    """The choices of a configuration (not its sizes), which may change what its blocks compute."""
    return dict(_choices(config, ""))


def _choices(config: dict[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(config.items()):
        if name in _IRRELEVANT or name.startswith(_BESIDE):
            continue
        if isinstance(value, dict) and not name.startswith("rope"):
            yield from _choices(value, f"{at}{name}.")
        elif isinstance(value, bool | str) or value is None:
            yield f"{at}{name}", value
        elif isinstance(value, list) and value and all(isinstance(v, str | bool) for v in value):
            yield f"{at}{name}", sorted({str(v) for v in value})


def _alike(config: dict[str, Any], structure: dict[str, Any]) -> bool:
    """Whether every choice that `config` makes is the one that was experimented on, or among its kinds of layers."""
    for name, value in _choices(config, ""):
        if name not in structure:
            continue  # the class does not read it
        seen = structure[name]
        if isinstance(value, list) and isinstance(seen, list):
            if not set(value) <= set(seen):
                return False
        elif value != seen:
            return False
    return True
