"""A model whose blocks stay in their files: each is loaded when it is to run, the next one meanwhile, and let go.

Owns building the model without its blocks' weights, and which tensors belong to which block; transformers' own loader
renames, stacks and casts them. Never knows what runs.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from abliterate.checkpoint import Checkpoint, TensorInfo
from abliterate.errors import CheckpointError, UnsupportedError

#: The group of all weights outside the blocks.
OUTSIDE = -1


def require_loader() -> None:
    """Check that transformers has the parts of its own loader that are used here: they are not promised to stay.

    Raises:
        UnsupportedError: it has not.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: F401
        from transformers.core_model_loading import (  # noqa: F401
            convert_and_load_state_dict_in_model,
            rename_source_key,
        )
        from transformers.modeling_utils import LoadStateDictConfig  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has another loader, so no model runs block by block; 5.23 has it"
        ) from None


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the library's own loading bar away: ours says what happens."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The transformer blocks in order, and their path in the model; block `l` writes `resid_post[l]`.

    Raises:
        UnsupportedError: there is no such list.
    """
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    paths = {module: path for path, module in model.named_modules()}
    # The decoder first: an image encoder beside it may have as many blocks.
    for root in (model.get_decoder(), model):
        for module in root.modules():
            if isinstance(module, nn.ModuleList) and len(module) == n_layers:
                return paths[module], module
    raise UnsupportedError(f"{type(model).__name__}: no list of {n_layers} blocks found in the model")


def build_without_weights(auto: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters that take no memory, its computed buffers in place."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    return model


class Weights(Protocol):
    """Brings the weights of blocks when they are needed; what runs through them may take `stream_memory` bytes."""

    stream_memory: int

    def loaded(self, layer: int, last: int | None = None) -> AbstractContextManager[None]:
        """Block `layer` can run; the next one is read meanwhile, where it is not behind the `last` (this one)."""
        ...

    def release(self) -> None:
        """Let go of what was read ahead."""
        ...


class BlockWeights:
    """Loads the weights outside the blocks at once, and those of a block while it is needed.

    On the CPU in their stored type they are the file's own pages, mapped; else copies.

    Raises:
        CheckpointError: the checkpoint lacks a weight.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        dtype: torch.dtype,
        device: torch.device,
        stream_memory: int,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self.stream_memory = stream_memory
        self._checkpoint, self._model = checkpoint, model
        self._path, _ = block_list(model)
        mapping: list[Any] = get_model_conversion_mapping(model, None, None)
        self._config = LoadStateDictConfig(
            device_map={"": device}, dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping
        )
        self._tensors = self._grouped(mapping)
        self._ahead: dict[int, Future[list[str]]] = {}
        self._reader = ThreadPoolExecutor(1)
        self._load(OUTSIDE)
        model.tie_weights()
        for name, buffer in model.named_buffers():  # computed ones; those of the files are there already
            if buffer.device != device:
                parent, _, own = name.rpartition(".")
                model.get_submodule(parent)._buffers[own] = buffer.to(device)
        self._require(OUTSIDE)

    def _grouped(self, mapping: list[Any]) -> dict[int, list[TensorInfo]]:
        """The tensors of each block, by the names that their weights have in the model."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        wanted, groups = self._model.state_dict(), defaultdict[int, list[TensorInfo]](list)
        for tensor in self._checkpoint.tensors.values():
            name, _ = rename_source_key(tensor.name, renamings, converters, self._model.base_model_prefix, wanted)
            inside = name.removeprefix(f"{self._path}.").partition(".")[0] if name.startswith(self._path) else ""
            groups[int(inside) if inside.isdigit() else OUTSIDE].append(tensor)
        return groups

    @contextmanager
    def loaded(self, layer: int, last: int | None = None) -> Iterator[None]:
        """Block `layer` can run; the next one is read meanwhile, where it is not behind the `last` (this one)."""
        names = self._begin(layer).result()
        self._require(layer)
        if last is not None and layer < last:
            self._begin(layer + 1)
        try:
            yield
        finally:
            del self._ahead[layer]
            self._let_go(names)

    def release(self) -> None:
        """Let go of what was read ahead."""
        for layer in list(self._ahead):
            self._let_go(self._ahead.pop(layer).result())

    def _begin(self, layer: int) -> Future[list[str]]:
        if layer not in self._ahead:
            self._ahead[layer] = self._reader.submit(self._load, layer)
        return self._ahead[layer]

    def _load(self, group: int) -> list[str]:
        """Load a group's weights into the model; the names of those that were loaded."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        tensors = self._tensors[group]
        lacking = [n for n, p in self._model.state_dict(keep_vars=True).items() if p.is_meta]
        with ExitStack() as stack, torch.inference_mode(False), without_bars():
            files = {
                file: stack.enter_context(safe_open(self._checkpoint.path / file, framework="pt"))
                for file in {t.file for t in tensors}
            }
            self._announce(tensors)
            slices = {t.name: files[t.file].get_slice(t.name) for t in tensors}
            convert_and_load_state_dict_in_model(self._model, slices, self._config)
        held = self._model.state_dict(keep_vars=True)
        return [name for name in lacking if not held[name].is_meta]

    def _announce(self, tensors: list[TensorInfo]) -> None:
        """Ask the kernel to read them, where it can be asked."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file in {t.file for t in tensors}:
            fd = os.open(self._checkpoint.path / file, os.O_RDONLY)
            try:
                for t in tensors:
                    if t.file == file:
                        os.posix_fadvise(fd, t.offset, t.nbytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def _require(self, group: int) -> None:
        inside = self._path if group == OUTSIDE else f"{self._path}.{group}"
        missing = [
            name
            for name, value in self._model.state_dict(keep_vars=True).items()
            if value.is_meta and name.startswith(f"{inside}.") != (group == OUTSIDE)
        ]
        if missing:
            raise CheckpointError(
                f"{self._checkpoint.path}: config.json asks for {len(missing)} weights that the checkpoint lacks: "
                f"{', '.join(missing[:4])}; the two do not belong together"
            )

    def _let_go(self, names: list[str]) -> None:
        for name in names:
            parent, _, own = name.rpartition(".")
            module = self._model.get_submodule(parent)
            held: dict[str, Any] = module._parameters if own in module._parameters else module._buffers
            value: torch.Tensor = held[own]
            meta = value.to("meta")
            held[own] = nn.Parameter(meta, requires_grad=False) if isinstance(value, nn.Parameter) else meta
