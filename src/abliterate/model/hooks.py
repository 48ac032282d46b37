"""Watch and change the residual stream of a running model through forward hooks.

Owns recording, directional ablation at run time and adding a vector; hooks are gone when the block ends.
Never knows where a direction came from or which prompts run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from abliterate.model.load import ChatModel
from abliterate.model.sites import WriterSite


@contextmanager
def record_resid_post(model: ChatModel, on_block: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call `on_block(layer, resid_post[layer])` with `[rows, tokens, d_model]` after every block that runs."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):

            def hook(_module: nn.Module, _args: Any, output: Any, layer: int = layer) -> None:
                on_block(layer, hidden_states(output))

            stack.callback(block.register_forward_hook(hook).remove)
        yield


@contextmanager
def ablate(
    model: ChatModel, sites: Sequence[WriterSite], directions: torch.Tensor, strength: float = 1.0
) -> Iterator[None]:
    """Remove a direction from everything that writes to the residual stream, at every token.

    `y' = y − s·d dᵀy` at each site's output, `d = normalise(g ⊙ r̂)` behind a gain `g`: the same function as
    orthogonalised weights (Arditi et al. 2024, arXiv 2406.11717, §2.4 and appendix E).

    Args:
        model: the model to hook.
        sites: where the stream is written.
        directions: `[d_model]`, or `[rows, d_model]` for a direction of its own for each row of the batch.
        strength: 1 removes, 2 reflects.
    """
    unit = torch.atleast_2d(directions).to(model.device, torch.float32)
    with ExitStack() as stack:
        for site in sites:
            module, gain = site_modules(model, site)
            behind = unit * gain if gain is not None else unit
            behind = behind - behind.mean(-1, keepdim=True) if site.centred else behind
            d = nn.functional.normalize(behind, dim=-1)[:, None, :]

            def project(output: Any, d: torch.Tensor = d, flat: bool = site.layer is not None) -> Any:
                y = hidden_states(output)
                # Mixtures of experts write [rows x tokens, d_model]: a view by rows gives each its own direction.
                # Outside the blocks two axes are [tokens, d_model], the same for all rows.
                flat = flat and y.ndim == 2
                wide = (y.reshape(len(d), -1, y.shape[-1]) if flat else y).float()
                left = (wide - (strength * (wide * d).sum(-1, keepdim=True)) * d).to(y.dtype)
                left = left.reshape(y.shape) if flat else left
                return (left, *output[1:]) if isinstance(output, tuple) else left

            if site.module == "head":  # (W − s·W r̂ r̂ᵀ) h = W (h − s·r̂ r̂ᵀ h): the head's own input loses it
                hook = module.register_forward_pre_hook(lambda _m, args, p=project: (p(args[0]), *args[1:]))
            else:
                hook = module.register_forward_hook(lambda _m, _a, output, p=project: p(output))
            stack.callback(hook.remove)
        yield


@contextmanager
def add_vectors(model: ChatModel, layers: Sequence[int], vectors: torch.Tensor) -> Iterator[None]:
    """Add `vectors[row]` (`[rows, d_model]`) to `resid_post[layers[row]]` at every token of that row."""
    where = torch.tensor(layers, device=model.device)
    vectors = vectors.to(model.device, torch.float32)
    with ExitStack() as stack:
        for layer in sorted(set(layers)):
            shift = (vectors * (where == layer)[:, None])[:, None, :]

            def hook(_module: nn.Module, _args: Any, output: Any, shift: torch.Tensor = shift) -> Any:
                hidden = hidden_states(output)
                shifted = (hidden.float() + shift).to(hidden.dtype)
                return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

            stack.callback(model.blocks[layer].register_forward_hook(hook).remove)
        yield


def site_modules(model: ChatModel, site: WriterSite) -> tuple[nn.Module, torch.Tensor | None]:
    """A site's module, and the float32 gain `[d_model]` between its output and the stream, if there is one."""
    root: nn.Module = model.model if site.layer is None else model.blocks[site.layer]
    if site.module == "head":
        module = model.model.get_output_embeddings()
    elif site.module == "embed":
        module = model.model.get_input_embeddings()
    else:
        module = root.get_submodule(site.module)
    return module, None if site.gain is None else root.get_parameter(site.gain).float() + site.gain_offset


def hidden_states(output: Any) -> torch.Tensor:
    """A block's hidden states; some classes return them first in a tuple."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden
