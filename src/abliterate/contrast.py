"""What step 2 needs of the prompts that show the contrast: candidates of the train ones, a test on the validation ones.

Owns the hand-over from what was observed to `direction`, which knows no prompts; chooses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from abliterate.activations.collect import collect_sets
from abliterate.activations.stats import ActivationStats
from abliterate.direction.choose import DEEPEST, Trial
from abliterate.direction.direction import Direction, affine, apart, by_layer, candidates
from abliterate.direction.several import Again
from abliterate.edit.plan import EditPlan
from abliterate.model.load import ChatModel
from abliterate.model.progress import Steps, no_steps
from abliterate.observe import Observation, contrast
from abliterate.options import Options
from abliterate.prompts import PromptSet, Splits

#: Validation prompts in the causal test, of each kind.
TRIAL_PROMPTS = 32
#: Share of harmful prompts whose refusals may be lost where these are to be kept.
MOST_LOST = 0.05


def depth(n_layers: int, options: Options) -> int:
    """How many of the first layers statistics are needed of."""
    return n_layers if options.method == "per-layer" else deepest(n_layers, options)


def deepest(n_layers: int, options: Options) -> int:
    """How many of the first layers a direction may come from."""
    return options.layer + 1 if options.layer is not None else max(1, int(DEEPEST * n_layers))


@dataclass(frozen=True)
class Held:
    """Refusals that are to stay: the train and validation prompts that are declined, of how many `asked` for
    validation, and statistics of the former.
    """

    train: PromptSet
    validation: PromptSet
    asked: int
    stats: ActivationStats


@dataclass(frozen=True)
class Contrast:
    """The prompts of step 2: of `lose` those that are declined are to be answered, of `keep` the answers are to stay.

    `held` are refusals that are to stay as well, if any.
    """

    observed: Observation
    lose: Splits
    keep: Splits
    held: Held | None = None

    @property
    def least_held(self) -> int:
        """How many of the held validation refusals must stay: all but `MOST_LOST` of the prompts asked for them."""
        return 0 if self.held is None else math.ceil(len(self.held.validation) - MOST_LOST * self.held.asked)

    @property
    def train(self) -> tuple[PromptSet, PromptSet]:
        """Declined and answered train prompts."""
        return contrast(self.observed, self.lose, self.keep)

    @property
    def validation(self) -> tuple[PromptSet, PromptSet]:
        """Declined and answered validation prompts."""
        seen = self.observed
        return (
            self.lose.validation.take(seen.harmful_validation),
            self.keep.validation.take(seen.harmless_validation),
        )


def spanned(
    stats: Sequence[ActivationStats], n_layers: int, options: Options, held: Held | None = None
) -> list[Direction]:
    """All candidates in the statistics of a model of `n_layers`, without the refusals that are held."""
    lose, keep = stats
    found = candidates(lose, keep, depth(n_layers, options), options.method in ("projected", "per-layer"))
    if options.method == "affine":
        return affine(found, keep)
    if options.method == "per-layer":
        within = range(deepest(n_layers, options)) if options.layer is None else [options.layer]
        return by_layer(found, within, lose, keep)
    return found if held is None else apart(found, candidates(held.stats, keep, depth(n_layers, options)))


def named(
    stats: Sequence[ActivationStats], n_layers: int, options: Options, held: Held | None = None
) -> list[Direction]:
    """These candidates: all, or those of the layer and position in options."""
    return [
        d
        for d in spanned(stats, n_layers, options, held)
        if options.layer in (None, d.layer) and options.position in (None, d.position)
    ]


def causal_test(model: ChatModel, plan: EditPlan, shown: Contrast, options: Options, strength: float = 1.0) -> Trial:
    """The causal test on validation prompts; where refusals are held, the KL of these counts too.

    The direction of false refusals alone need not cause any when it is added (Wang et al. 2025, arXiv 2410.03415).
    """
    lose, keep = (model.chat.encode(p.head(TRIAL_PROMPTS).prompts) for p in shown.validation)
    if shown.held is not None:
        keep = keep + model.chat.encode(shown.held.validation.head(TRIAL_PROMPTS).prompts)
    induces, tokens = shown.held is None, shown.observed.tokens
    return Trial(model, plan.sites, lose, keep, tokens, options.batch_size, strength, induces=induces)


def candidates_again(
    model: ChatModel, plan: EditPlan, shown: Contrast, options: Options, steps: Steps = no_steps
) -> Again:
    """Gives the candidates behind what a trial has removed, from means over the same train prompts."""
    sets = shown.train

    def again(behind: Trial) -> list[Direction]:
        step = steps("collecting activations", sum(map(len, sets)))
        with behind.begun():
            stats = collect_sets(
                model, sets, options.batch_size, model_fingerprint=plan.source,
                n_layers=depth(model.n_layers, options), progress=step,
            )  # fmt: skip
        return named(stats, model.n_layers, options)

    return again
