"""Edit a tiny checkpoint of every architecture that transformers can generate text with, and measure what is left.

uv run python scripts/sweep_architectures.py [--kept] [TYPE ...]

Prints one line for each TYPE. Without TYPE all are swept, and docs/architectures.md and the architectures kept in the
package are written; with --kept nothing is learned or written, and the edits are made by what is kept, as `edit` does.
Each type's own configuration is shrunk, saved with random weights, edited from file to file by the engine that `edit`
uses, loaded by plain transformers in float32, and run: the largest share of the direction in the stream of any block
is the leak. A type is exact at 1e-5 or less; a leak above that which was not refused is a failure of the sweep.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from abliterate.architecture import kept
from abliterate.architecture.blockwise import same_blockwise, why_not_blockwise
from abliterate.architecture.learn import learn_config
from abliterate.architecture.shrink import depth
from abliterate.architecture.stream import find_stream
from abliterate.architecture.twin import build_twin, random_ids, text_part
from abliterate.checkpoint import Checkpoint, open_checkpoint
from abliterate.edit.apply import apply_edit
from abliterate.edit.plan import plan_edit
from abliterate.errors import AbliterateError
from abliterate.model.weights import BlockWeights, build_without_weights

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
EXACT, SECONDS, MEMORY = 1e-5, 300, 9 << 30
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12],
                                "partial_rotary_factor": 0.5}}  # fmt: skip
_ROPE_BY_LAYER = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
            "indexer_compress_ratio": 4}  # fmt: skip
#: What a default configuration leaves open although its model needs it; released checkpoints set it.
SETTINGS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 1000},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE_BY_LAYER}},
    "cohere_compass_text": {"rope_parameters": _ROPE_BY_LAYER},
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8}, "ffn_config": {"moe_num_experts": 16}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense"] + ["sparse"] * 11,
            "num_hidden_layers": 12,
            "num_experts_per_tok": 6,
            "n_routed_experts": 64,
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "glm46v": {"text_config": _PARTIAL},
    "glm4v": {"text_config": _PARTIAL},
    "glm4v_moe": {"text_config": _PARTIAL | {"head_dim": 128}},
    "glmga": {"text_config": _PARTIAL},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8"},
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 16, 16, 16]},
        }
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 32},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "xmod": {"default_language": "en_XX"},
}


#: Reasons that lie in the model: what they say of it leaves no edit of weights that is exact.
_OF_THE_MODEL = (
    "blocks normalise the stream itself",
    "blocks multiply the stream by a gain",
    "blocks mix several streams (hyper-connections)",
    "blocks mix or gate the stream itself",
    "positions that are computed, not learned, enter the stream",
    "a convolution over tokens lies between what writes and the stream",
    "text runs through several stacks of blocks",
    "all layers read keys and values of another model",
)
APART = "not decoder-only"


@dataclass(frozen=True)
class Result:
    """What came out for one model type: exact, refused, not decoder-only or not built (and why), or wrong."""

    kind: str
    status: str
    before: float = 0.0
    after: float = 0.0
    writers: int = 0
    why: str = ""
    keep: dict[str, Any] | None = None
    blockwise: str = "–"

    @property
    def row(self) -> str:
        """A line of the table."""
        leak = f"{self.before:.1e} → {self.after:.1e}" if self.before else "–"
        return f"| `{self.kind}` | {self.status} | {self.writers or '–'} | {leak} | {self.blockwise} | {self.why} |"


def kinds() -> list[str]:
    """Every model type of the causal-LM and the image-text-to-text mapping."""
    causal, images = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return sorted({*causal, *images})


def sweep_one(kind: str, as_kept: bool) -> Result:
    """Build, edit, reload and measure one type, by a new experiment or as it is kept."""
    config = CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
    if config.is_encoder_decoder:
        return Result(kind, APART, why="encoder and decoder have a residual stream each")
    try:
        twin = build_twin(config).float()
    except AbliterateError as error:
        reason = _reason(error)
        return _refused(config, kind, reason)
    encoder = "" if _is_causal(twin) else "text is read in both directions"
    with tempfile.TemporaryDirectory() as name:
        base, out = Path(name) / "base", Path(name) / "out"
        twin.save_pretrained(base)
        _count_layers(base, twin.config.get_text_config(decoder=True))
        out.mkdir()
        checkpoint = open_checkpoint(base)
        try:
            known = None if as_kept else replace(learn_config(config), n_layers=0)  # the tiny one has fewer
            plan = plan_edit(checkpoint, known=known)
        except AbliterateError as error:
            reason = _reason(error, str(base))
            if encoder:
                return Result(kind, APART, why=f"{encoder}; {reason}")
            return replace(_refused(config, kind, reason), status="refused")
        first = plan.writers[0]
        r = np.random.default_rng(0).normal(size=checkpoint.tensors[first.tensor].shape[first.axis])
        r = (r / np.linalg.norm(r)).astype(np.float32)
        apply_edit(checkpoint, plan, r, out)
        before, after = (_share(type(twin), folder, r) for folder in (base, out))
        blocks = _blockwise(config, twin, base, checkpoint)
    status = "exact" if after <= EXACT and after < 1e-3 * before and blocks != "WRONG" else "WRONG"
    keep = kept.entry(_plain(config), known) if known is not None and status == "exact" else None
    return Result(kind, status, before, after, len(plan.writers), encoder, keep, blocks)


def _refused(config: PreTrainedConfig, kind: str, reason: str) -> Result:
    """A type that cannot be edited exactly, which is kept as well, or that could not be built."""
    of_the_model = reason in _OF_THE_MODEL
    keep = kept.entry(_plain(config), reason) if of_the_model else None
    return Result(kind, "refused" if of_the_model else "not built", why=reason, keep=keep)


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration as its file has it, with every default."""
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return plain


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether what follows leaves a token's stream as it is."""
    ids, part = random_ids(), text_part(model)
    with torch.no_grad():
        one, other = (
            part(input_ids=x, use_cache=False, output_hidden_states=True).logits[:, :3]
            for x in (ids, torch.cat([ids[:, :-1], ids[:, -1:].roll(1, 0)], dim=1))
        )
    return bool((one - other).abs().max() <= 1e-5 * one.abs().max())


def _count_layers(folder: Path, text: PreTrainedConfig) -> None:
    """Name the number of layers in config.json, as released checkpoints do where transformers derives it."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    part = config.get("text_config", config)
    part.setdefault("num_hidden_layers", depth(text) or 0)
    file.write_text(json.dumps(config), encoding="utf-8")


def _blockwise(config: PreTrainedConfig, twin: PreTrainedModel, folder: Path, checkpoint: Checkpoint) -> str:
    """Whether the checkpoint runs block by block from its files: `yes`, `no`, or `WRONG` where the trial missed it."""
    if why_not_blockwise(copy.deepcopy(config)) is not None:
        return "no"
    whole = type(twin).from_pretrained(folder, dtype=torch.float32).eval()
    build = SimpleNamespace(from_config=type(twin)._from_config)
    empty = build_without_weights(build, copy.deepcopy(whole.config), torch.float32).eval()
    weights = BlockWeights(checkpoint, empty, torch.float32, torch.device("cpu"), 1 << 30)
    return "yes" if same_blockwise(text_part(whole), _same_part(empty, whole), weights) else "WRONG"


def _same_part(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that text runs through, as found in another of its class."""
    path = next(name for name, module in other.named_modules() if module is text_part(other))
    part = model.get_submodule(path)
    assert isinstance(part, PreTrainedModel)
    return part


def _share(model_class: Any, folder: Path, r: np.ndarray[Any, Any]) -> float:
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return find_stream(model).share(torch.from_numpy(r))


def _reason(error: Exception, folder: str = "-") -> str:
    """What an error says, without the folder, the type and the tensors that it names."""
    text = str(error).split("; cannot tell which")[0].replace(f"{folder}: ", "")
    for opening in (r"architecture '[^']*': ", "no edit can be exact: ", r"no small model of it runs \((.*)\)$"):
        text = re.sub(opening, r"\1" if "(.*)" in opening else "", text)
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("|", "/").replace("<", "&lt;")


def guarded(kind: str, as_kept: bool) -> Result:
    """One type, with the errors of classes that cannot even be configured, and a limit on its time."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return sweep_one(kind, as_kept)
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ImportError,
        RuntimeError,
        OSError,
        MemoryError,
        StrictDataclassError,
    ) as error:
        return Result(kind, "not built", why=f"{type(error).__name__}: {_reason(error)}".splitlines()[0])
    finally:
        signal.alarm(0)


def page(results: list[Result]) -> str:
    """The page of all results."""
    counts = Counter(r.status for r in results)
    reasons = Counter((r.status, r.why.split("; ")[0]) for r in results if r.status not in ("exact", "WRONG"))
    lines = []
    for status in ("exact", "WRONG", "refused", APART, "not built"):
        if counts[status]:
            lines.append(f"- **{counts[status]} {status}**")
            lines += [f"  - {n}: {why}" for (s, why), n in reasons.most_common() if s == status and n > 1]
            if single := [r.kind for r in results if reasons[status, r.why.split("; ")[0]] == 1 and r.status == status]:
                lines.append(f"  - {len(single)} for other reasons: {', '.join(f'`{k}`' for k in single)}")
    exact = sum(r.status == "exact" and not r.why for r in results)
    other = [r.kind for r in results if r.status not in ("exact", APART) and r.why not in _OF_THE_MODEL]
    share = f"{exact} of {exact + len(other)} ({100 * exact / (exact + len(other)):.1f}%)"
    rows = "\n".join(r.row for r in results)
    blockwise = sum(r.blockwise == "yes" for r in results)
    return (
        "# Architectures\n\n"
        f"Written by `uv run python scripts/sweep_architectures.py` with transformers {transformers.__version__}, "
        f"which names {len(results)} types that generate text:\n\n" + "\n".join(lines) + "\n\n"
        f"Of the decoder-only types whose blocks add to one residual stream, {share} are exact. Decoder-only: no\n"
        "encoder-decoder, and a token's logits do not change with later tokens. Blocks add to one stream: not refused\n"
        "for one of the reasons "
        + "; ".join(f"*{reason}*" for reason in _OF_THE_MODEL)
        + f". Not exact, and counted against\nit: {', '.join(f'`{k}`' for k in other)}.\n\n"
        "A tiny checkpoint of each type's own configuration, random weights, is edited from file to file, loaded by\n"
        "plain transformers in float32 and run. The leak is the largest share of the direction in the stream at any\n"
        f"block, base → edited; exact means at most {EXACT:g}. *Not built*: no tiny model of the default\n"
        "configuration runs on text alone here, so nothing is known.\n\n"
        f"Of the exact ones {blockwise} run *block by block*, as models larger than memory do: from the files, with\n"
        "and without an opening that rows share, every stream and logit is that of a whole pass. The others run\n"
        "whole only.\n\n"
        "| type | result | tensors edited | leak | block by block | why |\n| --- | --- | --- | --- | --- | --- |\n"
        f"{rows}\n"
    )


def alone(kind: str, as_kept: bool) -> Result:
    """One type in a process of its own, so that a process that dies takes only its own row along."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver"), _quietly_on_one_thread) as worker:
        try:
            return worker.submit(guarded, kind, as_kept).result()
        except BrokenProcessPool:
            return Result(kind, "not built", why=f"its process was ended, perhaps beyond {MEMORY >> 30} GiB")


def _quietly_on_one_thread() -> None:
    """Prepare a worker: operations on a twin are too small to share, and one type must not take the others' memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def main() -> None:
    """Sweep the types named, or all of them and write the page and what is kept."""
    as_kept = "--kept" in sys.argv
    named = [argument for argument in sys.argv[1:] if argument != "--kept"]
    results = []
    multiprocessing.set_forkserver_preload(["torch", "transformers", "abliterate.architecture.learn"])
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for done in as_completed([workers.submit(alone, kind, as_kept) for kind in named or kinds()]):
            results.append(done.result())
            print(results[-1].row, flush=True)
    results.sort(key=lambda result: result.kind)
    if not named and not as_kept:
        PAGE.write_text(page(results), encoding="utf-8")
        kept.write({r.kind: r.keep for r in results if r.keep is not None})
    if any(r.status == "WRONG" for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
