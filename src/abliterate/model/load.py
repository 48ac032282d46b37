"""Load a checkpoint for running and find its parts: blocks, embeddings, device and dtype.

Owns the loaded model and the machine's memory; never knows prompts, refusals or edits.
"""

from __future__ import annotations

import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from abliterate.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from abliterate.model.chat import ChatFormat, load_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ChatModel:
    """A model that is loaded, in evaluation mode, with the format its chats take."""

    model: PreTrainedModel
    chat: ChatFormat

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order; block `l` writes `resid_post[l]`."""
        n_layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        # The decoder first: an image encoder beside it may have as many blocks.
        for root in (self.model.get_decoder(), self.model):
            for module in root.modules():
                if isinstance(module, nn.ModuleList) and len(module) == n_layers:
                    return list(module)
        raise UnsupportedError(f"{type(self.model).__name__}: no list of {n_layers} blocks found in the model")

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device

    @property
    def pad_id(self) -> int:
        """The token that fills rows on the left; it is masked, so any will do."""
        for token in (self.chat.tokenizer.pad_token_id, self.chat.tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        return 0

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id
        found = set(ids if isinstance(ids, list) else [ids]) | {self.chat.tokenizer.eos_token_id}
        return sorted(i for i in found if isinstance(i, int))


def load_model(
    folder: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    system_prompt: str | None = None,
    chat_template: Path | None = None,
    adapter: Path | None = None,
) -> ChatModel:
    """The checkpoint in `folder`, ready to run on `device` in `dtype` (None: what suits the machine).

    A LoRA `adapter` is merged into it, which takes PEFT.

    Raises:
        UnsupportedError: transformers does not know the architecture, or there is no chat template.
        CheckpointError: weights of the model are not in the checkpoint; names them.
        UsageError: no such device or dtype.
    """
    tokenizer = load_tokenizer(folder, chat_template)
    where = pick_device(device)
    try:
        with _without_bars():
            loaded: Any = _auto_class(folder).from_pretrained(
                folder, dtype=pick_dtype(dtype, where), output_loading_info=True
            )
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedError(f"{folder}: transformers cannot load this model ({str(error)[:200]})") from None
    model: PreTrainedModel = loaded[0]
    _require_whole(folder, loaded[1])
    if adapter is not None:
        model = _merged(model, adapter)
    # Only the stop tokens of the checkpoint's own generation settings are kept: a repetition penalty or a
    # temperature that a release ships would otherwise shape the answers that are judged.
    stop = model.generation_config.eos_token_id if model.generation_config else None
    model.generation_config = GenerationConfig(eos_token_id=stop)
    nn.Module.to(model, where).eval().requires_grad_(False)
    return ChatModel(model, ChatFormat(tokenizer, system_prompt))


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError:
        raise UnsupportedError("an adapter is merged by PEFT, which is not installed: pip install peft") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie.*")  # a tied head is meant to change with its embedding
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the library's own loading bar away: ours says what happens."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _auto_class(folder: Path) -> Any:
    """The class that loads a model with a language head: text alone, or images and text."""
    kind = AutoConfig.from_pretrained(folder).model_type
    return AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText


def _require_whole(folder: Path, report: dict[str, Any]) -> None:
    """Refuse a model in which weights are random because the checkpoint does not have them."""
    lacking = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if lacking:
        raise CheckpointError(
            f"{folder}: config.json asks for {len(lacking)} weights that the checkpoint lacks or has in another shape: "
            f"{', '.join(lacking[:4])}; the two do not belong together"
        )


def pick_device(device: str | None) -> torch.device:
    """The device named, or the machine's accelerator, or its CPU.

    Raises:
        UsageError: no such device here.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"--device {device}: not usable here ({str(error).splitlines()[0][:100]}); try --device cpu"
        ) from None
    return torch.device(device)


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype named, or bfloat16 where the device computes in it, or float32.

    Raises:
        UsageError: not a dtype to compute in.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type != "cpu":
        return torch.bfloat16
    # Emulated bfloat16 is several times slower than float32; oneDNN knows whether this processor has it.
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def require_memory(nbytes: int, device: torch.device) -> None:
    """Check that `device` has room for `nbytes` of weights and activations.

    Raises:
        ResourceError: it has not.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return
    if free < nbytes:
        raise ResourceError(
            f"running this model needs about {nbytes / 1e9:.1f} GB of memory on {device.type}, {free / 1e9:.1f} GB are "
            "free; close other programs, use --dtype bfloat16, or skip the comparison with --no-eval"
        )


def peak_memory() -> int:
    """The most resident memory this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
