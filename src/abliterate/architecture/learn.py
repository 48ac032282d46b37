"""What was learned of a model class, as plain values: patterns of the tensors that write to the stream.

Owns the way from a configuration to an `Architecture`: build a twin, probe it, trace its files, find where the
same edit can be made at run time. Never reads a real checkpoint's weights.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from abliterate.architecture.patterns import LAYER, Architecture, Gain, WriterPattern, merge
from abliterate.architecture.probe import Finding, Writer, probe, random_unit, removed_from
from abliterate.architecture.shrink import depth, layer_kinds
from abliterate.architecture.trace import Trace, trace
from abliterate.architecture.twin import build_twin, random_ids
from abliterate.errors import UnsupportedError
from abliterate.model.hooks import hidden_states

#: How far ablation by hooks may be from the edited weights: norms compute in float32.
_SAME = 1e-5


def learn(folder: Path) -> Architecture:
    """The architecture that the config.json in `folder` describes, by experiments on a shrunken twin of it.

    Raises:
        UnsupportedError: transformers does not know it, or no edit of its weights can be exact; says why.
    """
    return _learned(folder, (folder / "config.json").read_bytes())


@lru_cache(maxsize=8)
def _learned(folder: Path, _config: bytes) -> Architecture:
    """What is known for as long as the folder's configuration stays as it is."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise UnsupportedError(f"transformers does not know this architecture ({str(error)[:110]}…)") from None
    return learn_config(config)


def learn_class(model_type: str, stated: dict[str, Any]) -> Architecture:
    """The architecture of a class of transformers by its name, as it is but for what is stated; see `learn`."""
    try:
        config = AutoConfig.for_model(model_type, **stated)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UnsupportedError(f"transformers has no '{model_type}' of this form ({str(error)[:110]}…)") from None
    return learn_config(config)


def learn_config(config: PreTrainedConfig) -> Architecture:
    """The architecture of a configuration; see `learn`."""
    if config.is_encoder_decoder:
        raise UnsupportedError(f"architecture '{config.model_type}': encoder and decoder have a residual stream each")
    n_layers = depth(config)
    if n_layers is None:
        raise UnsupportedError(f"architecture '{config.model_type}': text runs through several stacks of blocks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a twin's operations are too small to share
    try:
        twin = build_twin(config)
        finding = probe(twin)
        if finding.refused is not None:
            raise UnsupportedError(f"architecture '{config.model_type}': no edit can be exact: {finding.refused}")
        return replace(_describe(config, finding, trace(twin)), n_layers=n_layers)
    finally:
        torch.set_num_threads(threads)


def _describe(config: PreTrainedConfig, finding: Finding, traced: Trace) -> Architecture:
    sites = _sites(finding)
    embedding, head = _embedding_and_head(finding.stream.model, traced)
    found, block = list[WriterPattern](), f"{finding.stream.path}.{LAYER}."
    for writer, site in zip(finding.writers, sites, strict=True):
        gain = None
        if writer.gain is not None:
            g, stored = writer.gain.parameter, None
            stored = traced.same(g) if g is not None else None
            gain = Gain(stored, _local(finding, writer, g), writer.gain.offset, writer.gain.centred)
        for t in traced.writer(writer):
            beside = head if t.name == embedding else None
            role, path = _role(writer), writer.parameter.replace(f"{finding.stream.path}.{writer.layer}.", block, 1)
            found.append(WriterPattern(t.name, t.axis, role, writer.layer, gain, site, beside, path))
    return merge(config.model_type, found, traced.names, len(finding.stream.calls), finding.after, layer_kinds(config))


def _embedding_and_head(model: PreTrainedModel, traced: Trace) -> tuple[str | None, str | None]:
    """The tensors of token embedding and LM head; the latter by its parameter's name where the two are one."""
    named = {id(p): name for name, p in model.named_parameters()}
    heads = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}  # the last name of each
    found: list[str | None] = []
    for module, names in ((model.get_input_embeddings(), named), (model.get_output_embeddings(), heads)):
        name = names.get(id(getattr(module, "weight", None)))
        found.append(traced.tensor_of(name) if name is not None else None)
        if name is not None and found[-1] == found[0] and names is heads:
            found[-1] = name
    return found[0], found[1]


def _role(writer: Writer) -> str:
    """What part of a block a writer belongs to, by its name; a label for people."""
    name = writer.parameter.lower()
    if writer.layer is None:
        return "embed"
    if "expert" in name:
        return "expert out"
    if re.search(r"mlp|ffn|feed_forward|ff\.|fc\d|dense_\dh|w2|wo\.", name):
        return "MLP out"
    return "attention out" if re.search(r"att", name) else "mixer out"


def _local(finding: Finding, writer: Writer, path: str | None) -> str | None:
    """A module's or parameter's path within its block, or in the model outside the blocks."""
    return path.removeprefix(f"{finding.stream.path}.{writer.layer}.") if path is not None else None


def _sites(finding: Finding) -> list[str]:
    """For every writer the module whose output carries what it writes: its own, or the nearest one around it.

    Raises:
        UnsupportedError: ablating there does not compute what the edited weights compute.
    """
    model, stream = finding.stream.model, finding.stream
    sizes: dict[str, int] = {}
    handles = []
    for path, module in model.named_modules():

        def measure(_m: nn.Module, _a: Any, output: Any, path: str = path) -> None:
            sizes.setdefault(path, _size(output))

        handles.append(module.register_forward_hook(measure))
    with torch.no_grad():
        stream.run()
    for handle in handles:
        handle.remove()
    hidden = stream.calls[min(stream.calls)].hidden
    full = hidden.numel() if hidden.ndim == 3 else random_ids().numel() * stream.d_model  # of one of several streams
    found = []
    for writer in finding.writers:
        path, block = writer.parameter.rpartition(".")[0], f"{stream.path}.{writer.layer}"
        # Embeddings of positions are the same for all rows of a batch, and may be computed once for them.
        wanted = (full,) if writer.layer is not None else (full, full // random_ids().shape[0])
        while path not in ("", block) and sizes.get(path, 0) not in wanted:
            path = path.rpartition(".")[0]
        if path in ("", block):
            raise UnsupportedError(f"no module of its own carries what '{writer.parameter}' writes")
        found.append(path)
    _require_same(finding, found)
    # Other classes that load the same files may have the embeddings at another path.
    embeddings = {path for path, module in model.named_modules() if module is model.get_input_embeddings()}
    return [
        "embed" if path in embeddings else path.removeprefix(f"{stream.path}.{w.layer}.")
        for w, path in zip(finding.writers, found, strict=True)
    ]


def _size(output: Any) -> int:
    try:
        return hidden_states(output).numel()
    except (AssertionError, IndexError):
        return 0


def _require_same(finding: Finding, paths: list[str]) -> None:
    """Check that hooks at the sites take the direction out as the edited weights do."""
    model, stream = finding.stream.model, finding.stream
    r = random_unit(stream.d_model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    handles = []
    for writer, path in zip(finding.writers, paths, strict=True):
        d = removed_from(parameters, writer, r)

        def hook(_m: nn.Module, _a: Any, output: Any, d: torch.Tensor = d) -> Any:
            y = hidden_states(output)
            y = (y.double() - (y.double() @ d)[..., None] * d).to(y.dtype)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    with torch.no_grad():
        left = stream.share(r)
    for handle in handles:
        handle.remove()
    if left > _SAME:
        raise UnsupportedError(f"ablation at run time leaves {left:.1e} of the direction in the stream")
