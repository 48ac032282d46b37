"""The steps one by one: what `run` does in order, and what each verb of its own does between files.

Owns what is handed from step to step; computes nothing itself, and knows no order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from abliterate import observe as observing
from abliterate.activations.collect import collect
from abliterate.activations.stats import ActivationStats
from abliterate.checkpoint import Checkpoint
from abliterate.checkpoint.scan import require_finite
from abliterate.direction import choose as choosing
from abliterate.direction.direction import Direction, candidates, most_separated
from abliterate.edit.plan import EditPlan
from abliterate.errors import UsageError, VerifyError
from abliterate.evaluate.evaluation import Evaluation, Questions, evaluate_alone, evaluate_pair
from abliterate.model.chat import ChatFormat, load_tokenizer
from abliterate.model.load import ChatModel, load_model, pick_device, pick_dtype, require_memory
from abliterate.model.progress import Steps, no_steps
from abliterate.observe import Observation
from abliterate.options import LIMITS, Options
from abliterate.prompts import Splits, check_contrast, load_prompts, split
from abliterate.prompts.load import Kind, builtin_splits

#: Validation prompts in the causal test, of each kind.
TRIAL_PROMPTS = 32


def prompt_splits(options: Options) -> tuple[Splits, Splits]:
    """The harmful and the harmless set, split and limited.

    Raises:
        PromptError: a set is empty, unreadable, too small, or the two do not contrast.
    """

    def one(source: str | None, kind: Kind) -> Splits:
        if source is None:
            return builtin_splits(kind)
        return split(load_prompts(source), options.seed)

    harmful, harmless = one(options.harmful, "harmful"), one(options.harmless, "harmless")
    check_contrast(harmful.whole, harmless.whole)
    return limited(harmful, options), limited(harmless, options)


def limited(splits: Splits, options: Options) -> Splits:
    """At most `--limit` prompts of each part, or as many as `LIMITS` says."""
    return Splits(*(part.head(options.limit or LIMITS[name]) for name, part in splits._asdict().items()))


def load(folder: Path, options: Options, adapter: Path | None = None) -> ChatModel:
    """The model, ready to run as the options say, with an adapter merged into it."""
    return load_model(
        folder,
        adapter=adapter,
        device=options.device,
        dtype=options.dtype,
        system_prompt=options.system_prompt,
        chat_template=Path(options.chat_template) if options.chat_template else None,
    )


def check_memory(models: list[Checkpoint], options: Options) -> None:
    """Room for all of `models` at once, and half a gigabyte and a tenth for what runs through them.

    Raises:
        ResourceError: there is not enough.
    """
    device = pick_device(options.device)
    size = pick_dtype(options.dtype, device).itemsize
    elements = sum(int(np.prod(t.shape, dtype=np.int64)) for c in models for t in c.tensors.values())
    require_memory(int(1.1 * elements * size + 5e8), device)


def check_site(checkpoint: Checkpoint, options: Options) -> None:
    """Check that the layer and position asked for exist, and that the template can be used, before anything runs.

    Raises:
        UsageError: there is no such layer or position.
        UnsupportedError: there is no chat template, or one that cannot be used.
    """
    n_layers = checkpoint.n_layers
    if options.layer is not None and options.layer >= n_layers:
        raise UsageError(f"--layer {options.layer}: layers are 0 to {n_layers - 1}")
    template = Path(options.chat_template) if options.chat_template else None
    tail = len(ChatFormat(load_tokenizer(checkpoint.path, template), options.system_prompt).tail())
    if options.position is not None and -options.position > tail:
        raise UsageError(f"--position {options.position}: positions after the request are {-tail} to -1")


def observe(
    model: ChatModel,
    checkpoint: Checkpoint,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    steps: Steps = no_steps,
) -> Observation:
    """What the base declines and answers of the train and validation prompts.

    Raises:
        NoRefusalError: it declines almost nothing.
        VerifyError: its weights are damaged; names the tensor.
    """
    check_runs(model, checkpoint, harmful)
    return observing.observe(model, harmful, harmless, options.batch_size, options.force, steps)


def check_runs(model: ChatModel, checkpoint: Checkpoint, prompts: Splits) -> None:
    """Run one prompt, so that damaged weights show before anything is asked.

    Raises:
        VerifyError: there is NaN or infinity; names the tensor.
    """
    with _naming_bad_weights(checkpoint):
        collect(model, prompts.train.head(1))


def collect_both(
    model: ChatModel,
    checkpoint: Checkpoint,
    observed: Observation,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    steps: Steps = no_steps,
) -> tuple[ActivationStats, ActivationStats]:
    """Step 1 for both sets, over the prompts that show the contrast.

    Raises:
        VerifyError: NaN or infinity in the activations; names the tensor if it comes from the weights.
    """
    sets = observing.contrast(observed, harmful, harmless)
    step = steps("collecting activations", sum(map(len, sets)))
    with _naming_bad_weights(checkpoint):
        first, second = (collect(model, s, options.batch_size, checkpoint.fingerprint, step) for s in sets)
    return first, second


@contextmanager
def _naming_bad_weights(checkpoint: Checkpoint) -> Iterator[None]:
    """Where activations are not finite, look for the weights that cause it, and name them instead."""
    try:
        yield
    except VerifyError:
        require_finite(checkpoint)
        raise


def select(
    model: ChatModel,
    plan: EditPlan,
    stats: tuple[ActivationStats, ActivationStats],
    observed: Observation,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    steps: Steps = no_steps,
) -> tuple[Direction, list[Direction]]:
    """Step 2: the direction, by causal test on validation prompts, and the finalists; or the one named by options.

    Raises:
        UsageError: `layer` or `position` is not among the candidates.
        VerifyError: no candidate passes the test.
    """
    deepest = model.n_layers if options.layer is not None else max(1, int(choosing.DEEPEST * model.n_layers))
    found = candidates(*stats, last_layer=deepest)
    found = [d for d in found if options.layer in (None, d.layer) and options.position in (None, d.position)]
    if not found:
        asked = [f"--{n} {v}" for n, v in (("layer", options.layer), ("position", options.position)) if v is not None]
        raise UsageError(
            f"{' '.join(asked) or model.model.config.model_type}: nothing there tells harmful from harmless requests; "
            f"layers are 0 to {model.n_layers - 1}, positions {stats[0].positions[0]} to -1"
        )
    if not observed.tokens:
        return most_separated(found, *stats), []
    harmful_rows = model.chat.encode(harmful.validation.take(observed.harmful_validation[:TRIAL_PROMPTS]).prompts)
    harmless_rows = model.chat.encode(harmless.validation.take(observed.harmless_validation[:TRIAL_PROMPTS]).prompts)
    trial = choosing.Trial(
        model, plan.sites, harmful_rows, harmless_rows, observed.tokens, options.batch_size, options.strength
    )
    if len(found) == 1:
        return choosing.measure(trial, found[0]), []
    return choosing.choose(trial, found, options.max_kl, steps)


def compare(
    base: ChatModel | None,
    edited: ChatModel,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    direction: npt.NDArray[np.float32] | None,
    steps: Steps = no_steps,
) -> Evaluation:
    """The edited model on the test prompts, against its base where there is one; leak where `direction` is known."""
    asked = Questions(harmful.test, harmless.test, options.max_new_tokens, options.batch_size)
    if base is None:
        return evaluate_alone(edited, asked, steps)
    return evaluate_pair(base, edited, asked, steps, direction)
