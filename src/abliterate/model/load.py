"""Load a checkpoint for running and find its parts: blocks, embeddings, device and dtype.

Owns the loaded model; never knows prompts, refusals or edits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

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

from abliterate.checkpoint import open_checkpoint
from abliterate.errors import CheckpointError, UnsupportedError, UsageError
from abliterate.model.chat import ChatFormat, Thinking, load_tokenizer
from abliterate.model.gguf import gguf_model
from abliterate.model.weights import BlockWeights, Weights, block_list, build_without_weights, without_bars

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


#: Of the memory that a run block by block may take, one in so many bytes holds streams, or keys and values.
_STREAMS = 8


class StopForward(Exception):
    """Raised to leave a forward pass early."""


@dataclass(frozen=True)
class ChatModel:
    """A model in evaluation mode, with the format its chats take; with `weights` it is read block by block."""

    model: PreTrainedModel
    chat: ChatFormat
    weights: Weights | None = None
    runs_on: ClassVar[str] = "transformers"

    @cached_property
    def block_list(self) -> nn.ModuleList:
        """The transformer blocks in order; block `l` writes `resid_post[l]`."""
        return block_list(self.model)[1]

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """The same, whatever stands in for them in the model."""
        return list(self.block_list)

    @cached_property
    def block_returns(self) -> Callable[[torch.Tensor], Any]:
        """Puts a stream into what the model's blocks return: itself, or the first of a tuple."""
        found = list[Any]()

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(output)
            raise StopForward

        handle = self.blocks[0].register_forward_hook(stop)
        ids = torch.tensor([[self.pad_id] * 2], device=self.device)
        with self.weights.loaded(0) if self.weights is not None else nullcontext(), torch.inference_mode():
            try:
                with suppress(StopForward):
                    self.model.base_model(input_ids=ids, use_cache=False)
            finally:
                handle.remove()
        rest = tuple(found[0][1:]) if isinstance(found[0], tuple | list) else None
        return lambda hidden: hidden if rest is None else (hidden, *rest)

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
    source: Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    system_prompt: str | None = None,
    chat_template: Path | None = None,
    thinking: Thinking = "template",
    adapter: Path | None = None,
    memory: int | None = None,
) -> ChatModel:
    """The checkpoint in a folder or a GGUF file, ready to run on `device` in `dtype` (None: what suits the machine).

    A LoRA `adapter` is merged into it, which takes PEFT. Where it may take only `memory`
    bytes, its blocks stay in their files until each is to run; those of a GGUF do not.

    Raises:
        UnsupportedError: transformers does not know the architecture, or there is no chat template.
        CheckpointError: weights of the model are not in the checkpoint; names them.
        UsageError: no such device or dtype.
    """
    tokenizer = load_tokenizer(source, chat_template)
    where = pick_device(device)
    chosen, weights = pick_dtype(dtype, where), None
    try:
        with without_bars():
            if memory is not None:
                model, weights = _in_blocks(source, chosen, where, memory)
            else:
                model = _whole(source, chosen)
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedError(f"{source}: transformers cannot load this model ({str(error)[:200]})") from None
    if adapter is not None:
        model = _merged(model, adapter)
    # Only the stop tokens of the checkpoint's own generation settings are kept: a repetition penalty or a
    # temperature that a release ships would otherwise shape the answers that are judged.
    stop = model.generation_config.eos_token_id if model.generation_config else None
    model.generation_config = GenerationConfig(eos_token_id=stop)
    if weights is None:
        nn.Module.to(model, where)
    model.eval().requires_grad_(False)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        head.register_forward_pre_hook(_contiguous)
    return ChatModel(model, ChatFormat(tokenizer, system_prompt, thinking), weights)


def _contiguous(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give the head its input in one piece: of a slice (the last tokens) torch multiplies a copy of the head a row."""
    return (args[0].contiguous(), *args[1:])


def _whole(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    if source.is_file():
        return gguf_model(source, dtype)
    loaded: Any = _auto_class(source).from_pretrained(source, dtype=dtype, output_loading_info=True)
    _require_whole(source, loaded[1])
    model: PreTrainedModel = loaded[0]
    return model


def _in_blocks(
    folder: Path, dtype: torch.dtype, device: torch.device, memory: int
) -> tuple[PreTrainedModel, BlockWeights]:
    auto, config = _auto_class(folder), AutoConfig.from_pretrained(folder)
    model = build_without_weights(auto, config, dtype)
    with suppress(OSError):  # most checkpoints have settings for generation, whose stop tokens are wanted
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, BlockWeights(open_checkpoint(folder), model, dtype, device, memory // _STREAMS)


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError:
        raise UnsupportedError("an adapter is merged by PEFT, which is not installed: pip install peft") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie.*")  # a tied head is meant to change with its embedding
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged


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
