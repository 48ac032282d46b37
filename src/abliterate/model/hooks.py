"""Watch and change the residual stream of a running model through forward hooks.

Owns recording, directional ablation at run time and adding a vector; hooks are gone when the block ends.
Never knows where a direction came from or which prompts run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
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
    model: ChatModel,
    sites: Sequence[WriterSite],
    directions: torch.Tensor,
    strength: float | torch.Tensor = 1.0,
    offset: torch.Tensor | None = None,
) -> Iterator[None]:
    """Remove directions from everything that writes to the residual stream, at every token.

    `y' = y − s·Dᵀ D y` at each site's output, `D` the orthonormal basis of `g ⊙ r̂` behind a gain `g`: the same function
    as orthogonalised weights (Arditi et al. 2024, arXiv 2406.11717, §2.4 and appendix E). Gradients reach `directions`
    and `strength` where they ask for them.

    Args:
        model: the model to hook.
        sites: where the stream is written.
        directions: `[d_model]`, or `[rows, d_model]` for a direction of its own for each row of the batch, or
            `[rows or 1, k, d_model]` for several orthonormal ones, or `[n_layers, rows or 1, k, d_model]` for each
            layer's own; what writes outside the blocks loses those of layer 0.
        strength: 1 removes, 2 reflects; times the site's own. Or `[sites]`, one for each.
        offset: `[rows or 1, k]`, what is left along them instead of nothing: the embedding writes it.
    """
    unit = torch.atleast_2d(directions).to(model.device, torch.float32)
    unit = unit[:, None] if unit.ndim == 2 else unit
    each = strength if isinstance(strength, torch.Tensor) else [strength] * len(sites)
    with ExitStack() as stack:
        for site, own in zip(sites, each, strict=True):
            of_site = unit[site.layer or 0] if unit.ndim == 4 else unit
            kept = offset.to(unit) if offset is not None and site.module == "embed" else None
            module, project = _module(model, site), _Projection(model, site, of_site, own * site.strength, kept)
            # Block by block a gain may not be loaded before its site first writes; else no block that is run again on
            # the way back should find this anew.
            _ = project.removed if model.weights is None else None
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


@dataclass(frozen=True)
class _Projection:
    """Takes directions `[rows or 1, k, d_model]` out of what a site writes."""

    model: ChatModel
    site: WriterSite
    unit: torch.Tensor
    strength: float | torch.Tensor
    kept: torch.Tensor | None = None

    def __call__(self, output: Any) -> Any:
        y, d = hidden_states(output), self.removed
        # Mixtures of experts write [rows x tokens, d_model]: a view by rows gives each its own direction.
        # Outside the blocks two axes are [tokens, d_model], the same for all rows.
        flat = self.site.layer is not None and y.ndim == 2
        wide = (y.reshape(len(d), -1, y.shape[-1]) if flat else y).float()
        parts = wide @ d.mT if self.kept is None else wide @ d.mT - self.kept[:, None]
        left = (wide - (self.strength * parts) @ d).to(y.dtype)
        left = left.reshape(y.shape) if flat else left
        return (left, *output[1:]) if isinstance(output, tuple) else left

    @cached_property
    def removed(self) -> torch.Tensor:
        """`D` `[rows or 1, k, d_model]`, found once."""
        behind = self.unit
        if self.site.gain is not None:
            behind = behind * (
                _root(self.model, self.site).get_parameter(self.site.gain).float() + self.site.gain_offset
            )
        behind = behind - behind.mean(-1, keepdim=True) if self.site.centred else behind
        return nn.functional.normalize(behind, dim=-1) if behind.shape[1] == 1 else torch.linalg.qr(behind.mT)[0].mT


def _root(model: ChatModel, site: WriterSite) -> nn.Module:
    return model.model if site.layer is None else model.blocks[site.layer]


def _module(model: ChatModel, site: WriterSite) -> nn.Module:
    """Where a site writes."""
    if site.module == "head":
        head: nn.Module = model.model.get_output_embeddings()
        return head
    return (
        model.model.get_input_embeddings() if site.module == "embed" else _root(model, site).get_submodule(site.module)
    )


def hidden_states(output: Any) -> torch.Tensor:
    """A block's hidden states; some classes return them first in a tuple."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden
