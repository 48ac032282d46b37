"""Build a shrunken twin of a model class from a configuration: the same code, tiny sizes, random weights.

Owns which class is built, whether it runs, and which part of it text runs through. Never knows what is measured on
the twin.
"""

from __future__ import annotations

import copy
import itertools
import textwrap
import warnings
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from abliterate.architecture.shrink import MOST_LAYERS, VOCABULARY, WHOLE, Form, depth, forms, shrink
from abliterate.errors import UnsupportedError

MAX_PARAMETERS = 100_000_000
#: What model classes raise on a size they do not like.
REFUSALS = (
    StrictDataclassError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError,
    ImportError, AssertionError,
)  # fmt: skip


def build_twin(config: PreTrainedConfig) -> PreTrainedModel:
    """A runnable model of the class that `config` names, on the CPU, with random weights.

    In float64, or in float32 where the class does not compute in that.

    Layers are cut to the shortest prefix that has every kind of layer, other sizes to a few units; everything
    else (norms, biases, activations, flags) is as configured.

    Raises:
        UnsupportedError: no shrunken form of the configuration runs; gives the reason.
    """
    reusing = getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", None)
    if reusing and reusing == depth(config):
        raise UnsupportedError(f"architecture '{config.model_type}': all layers read keys and values of another model")
    reasons = []
    ways = list(forms(config, _least_depth(config)))
    for dtype, form in itertools.product((torch.float64, torch.float32), ways):
        made = _attempt(config, dtype, form)
        if not isinstance(made, str):
            return made
        reasons.append(made)
    raise UnsupportedError(f"architecture '{config.model_type}': no small model of it runs ({_short(reasons[0])})")


def _short(reason: str) -> str:
    return textwrap.shorten(reason, 150, placeholder=" …")


def _attempt(config: PreTrainedConfig, dtype: torch.dtype, form: Form) -> PreTrainedModel | str:
    """The model of a configuration shrunken in one way, or why it does not run."""
    try:
        return _runnable(shrink(config, form), dtype)
    # The model classes of all of transformers are behind this call, and what each of them raises on a size it does
    # not like is not known; the reason is kept and given where no form runs.
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}"


def random_ids(seed: int = 0) -> torch.Tensor:
    """Token ids `[2, 7]` for a twin."""
    return torch.randint(5, VOCABULARY - 11, (2, 7), generator=torch.Generator().manual_seed(seed))


def _least_depth(config: PreTrainedConfig) -> int:
    """How many first layers have every kind of layer, by the parameters in them; 0 where that cannot be told."""
    try:
        with torch.device("meta"):
            shape = _auto_class(config).from_config(shrink(config, Form(4, True, least=WHOLE)), dtype=torch.float32)
    except REFUSALS:
        return 0
    least = 0
    for layers in (m for m in shape.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth(config)):
        kinds = [tuple(name for name, _ in layer.named_parameters()) for layer in layers]
        least = max(least, *(kinds.index(kind) + 1 for kind in set(kinds)))
    return min(least, 2 * MOST_LAYERS)


def _auto_class(config: PreTrainedConfig) -> Any:
    # A type with both classes has images in its checkpoints, and the names of that class; its text part alone is a
    # type of its own.
    pictures = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if pictures else AutoModelForCausalLM


def _runnable(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    auto = _auto_class(config)
    with torch.device("meta"):
        shape = auto.from_config(copy.deepcopy(config), dtype=torch.float32)
    size = sum(parameter.numel() for parameter in shape.parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"the twin would have {size} parameters")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(
            config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        model.requires_grad_(False)
        _randomise(model)
        with torch.no_grad():
            text_part(model)
    return model


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or its language model where the whole does not run on text alone."""
    wanted = model.config.get_text_config(decoder=True)
    inside = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model and m.config is wanted]
    whole = _run(model)
    found = model if whole is None else next((part for part in inside if _run(part) is None), None)
    if found is None:
        assert whole is not None
        raise whole
    return found


def _run(model: PreTrainedModel) -> Exception | None:
    """Run random text through a model; what it raised, or None."""
    try:
        model(input_ids=random_ids(), use_cache=False)
    except REFUSALS as error:
        return error
    return None


def _randomise(model: PreTrainedModel) -> None:
    """Weights at which nothing is accidentally zero or one: a forgotten gain or bias shows."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1:
            parameter.copy_(0.15 * noise)
        else:
            parameter.add_(0.3 * noise)
