"""What step 2 needs of the prompts that show the contrast: candidates of the train ones, a test on the validation ones.

Owns the hand-over from what was observed to `direction`, which knows no prompts; chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from abliterate.activations.collect import collect_sets
from abliterate.activations.stats import ActivationStats
from abliterate.direction.choose import DEEPEST, Trial
from abliterate.direction.direction import Direction, candidates
from abliterate.direction.several import Again
from abliterate.edit.plan import EditPlan
from abliterate.model.load import ChatModel
from abliterate.model.progress import Steps, no_steps
from abliterate.observe import Observation, contrast
from abliterate.options import Options
from abliterate.prompts import Splits

#: Validation prompts in the causal test, of each kind.
TRIAL_PROMPTS = 32


def depth(n_layers: int, options: Options) -> int:
    """How many of the first layers a direction may come from."""
    return options.layer + 1 if options.layer is not None else max(1, int(DEEPEST * n_layers))


def named(stats: Sequence[ActivationStats], n_layers: int, options: Options) -> list[Direction]:
    """The candidates in the statistics of a model of `n_layers`: all, or those of the layer and position in options."""
    harmful, harmless = stats
    found = candidates(harmful, harmless, last_layer=depth(n_layers, options))
    return [d for d in found if options.layer in (None, d.layer) and options.position in (None, d.position)]


def causal_test(
    model: ChatModel,
    plan: EditPlan,
    observed: Observation,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    strength: float = 1.0,
) -> Trial:
    """The causal test on the validation prompts that show the contrast."""
    harmful_rows, harmless_rows = (
        model.chat.encode(splits.validation.take(shown[:TRIAL_PROMPTS]).prompts)
        for splits, shown in ((harmful, observed.harmful_validation), (harmless, observed.harmless_validation))
    )
    return Trial(model, plan.sites, harmful_rows, harmless_rows, observed.tokens, options.batch_size, strength)


def candidates_again(
    model: ChatModel,
    plan: EditPlan,
    observed: Observation,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    steps: Steps = no_steps,
) -> Again:
    """Gives the candidates behind what a trial has removed, from means over the same train prompts."""
    sets = contrast(observed, harmful, harmless)

    def again(behind: Trial) -> list[Direction]:
        step = steps("collecting activations", sum(map(len, sets)))
        with behind.begun():
            stats = collect_sets(
                model, sets, options.batch_size, model_fingerprint=plan.source,
                n_layers=depth(model.n_layers, options), progress=step,
            )  # fmt: skip
        return named(stats, model.n_layers, options)

    return again
