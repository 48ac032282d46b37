"""Find a model's residual stream: the list of blocks it runs through, and what each of them is called with.

Owns watching one forward pass; never changes a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from abliterate.architecture.twin import random_ids, text_part
from abliterate.errors import UnsupportedError
from abliterate.model.hooks import hidden_states
from abliterate.model.load import StopForward


@dataclass(frozen=True)
class BlockCall:
    """One recorded call of a block: its arguments, and which of them is the stream `[..., d_model]`."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: int | str

    @property
    def hidden(self) -> torch.Tensor:
        """The stream that the block was called with, in float64."""
        value = self.args[self.stream] if isinstance(self.stream, int) else self.kwargs[self.stream]
        assert isinstance(value, torch.Tensor)
        return value.double()

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for another stream and otherwise the same arguments, in float64."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.stream, int):
            args[self.stream] = hidden.to(args[self.stream].dtype)
        else:
            kwargs[self.stream] = hidden.to(kwargs[self.stream].dtype)
        return hidden_states(self.block(*args, **kwargs)).double()


@dataclass(frozen=True)
class Stream:
    """A model's blocks: the path of their list, and one recorded call for each layer that ran.

    `part` is what text runs through: the model itself, or the language model in it.
    """

    model: PreTrainedModel
    part: PreTrainedModel
    path: str
    calls: dict[int, BlockCall]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.calls[min(self.calls)].hidden.shape[-1]

    def run(self) -> None:
        """A forward pass of some text."""
        self.part(input_ids=random_ids(), use_cache=False)

    def embed(self) -> torch.Tensor:
        """What enters the first block, in float64, `[..., d_model]`; the rest of the model does not run."""
        first = self.calls[min(self.calls)]
        found: list[torch.Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(BlockCall(first.block, args, kwargs, first.stream).hidden)
            raise StopForward

        handle = first.block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.run()
        except StopForward:
            pass
        finally:
            handle.remove()
        return found[0]

    def states(self) -> list[torch.Tensor]:
        """The stream before and after every block in one forward pass, in float64."""
        found = []
        with _watch({(self.path, layer): call.block for layer, call in self.calls.items()}) as seen:
            self.run()
        for (_, layer), (args, kwargs, output) in seen.items():
            call = self.calls[layer]
            found += [BlockCall(call.block, args, kwargs, call.stream).hidden, hidden_states(output).double()]
        return found

    def share(self, r: torch.Tensor) -> float:
        """The largest component along `r` of any token's stream in a forward pass, relative to the mean norm there."""
        unit = r.double()
        return max(float((h @ unit).abs().max() / h.norm(dim=-1).mean()) for h in self.states())


def find_stream(model: PreTrainedModel) -> Stream:
    """The longest list of modules that a text runs through and that keep the shape of what they are given.

    Raises:
        UnsupportedError: there is no such list, or another beside it.
    """
    lists = {
        (path, i): module
        for path, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList)
        for i, module in enumerate(modules)
        if isinstance(module, nn.Module)
    }
    with torch.no_grad():
        part = text_part(model)
        with _watch(lists) as seen:
            part(input_ids=random_ids(), use_cache=False)
    by_path: dict[str, dict[int, BlockCall]] = {}
    for (path, i), (args, kwargs, output) in seen.items():
        where = _stream_argument(args, kwargs, output)
        if where is not None:
            by_path.setdefault(path, {})[i] = BlockCall(lists[path, i], args, _stateless(kwargs), where)
    if not by_path:
        raise UnsupportedError(
            f"architecture '{model.config.model_type}': no list of blocks that keep a stream's shape"
        )
    path = max(by_path, key=lambda p: (len(by_path[p]), -len(p)))
    others = [p for p in by_path if not f"{p}.".startswith(f"{path}.") and len(by_path[p]) == len(by_path[path])]
    if others:
        raise UnsupportedError(f"architecture '{model.config.model_type}': text runs through several stacks of blocks")
    return Stream(model, part, path, dict(sorted(by_path[path].items())))


@contextmanager
def _watch(modules: dict[tuple[str, int], nn.Module]) -> Iterator[dict[tuple[str, int], tuple[Any, Any, Any]]]:
    """Collect `(args, kwargs, output)` of the first call of each module."""
    seen: dict[tuple[str, int], tuple[Any, Any, Any]] = {}
    with ExitStack() as stack:
        for key, module in modules.items():

            def hook(_m: nn.Module, args: Any, kwargs: Any, output: Any, key: tuple[str, int] = key) -> None:
                seen.setdefault(key, (args, dict(kwargs), output))

            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield seen


def _stream_argument(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int | str | None:
    """Which argument is the stream: the first tensor shaped like the output."""
    output = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(output, torch.Tensor) or output.ndim < 3:
        return None
    named = sorted(kwargs.items(), key=lambda item: item[0] != "hidden_states")
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *named]
    for key, value in arguments:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == output.shape:
            return key
    return None


def _stateless(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments without caches, so that a second call sees nothing of the first."""
    return {name: None if name in ("past_key_values", "past_key_value", "cache_params") else value
            for name, value in kwargs.items()}  # fmt: skip
