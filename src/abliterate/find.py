"""Step 2 as a whole: which direction, how strongly at which place, and whether it does more than any would.

Owns what the modules of `direction` are handed from prompts and judgements; computes nothing itself.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from abliterate import observe as observing
from abliterate.activations.collect import collect_sets
from abliterate.activations.stats import ActivationStats
from abliterate.contrast import Contrast, candidates_again, causal_test, depth, named, spanned
from abliterate.direction import choose as choosing
from abliterate.direction import controls as controlling
from abliterate.direction import several
from abliterate.direction import tune as tuning
from abliterate.direction.answers import Answered, answered
from abliterate.direction.choose import Choice
from abliterate.direction.direction import Direction, most_separated
from abliterate.direction.front import Point
from abliterate.direction.tune import HOLDING, RECIPE, Task
from abliterate.edit.plan import EditPlan
from abliterate.errors import NoRefusalError, UnsupportedError, UsageError, VerifyError
from abliterate.model.load import ChatModel
from abliterate.model.progress import Steps, no_steps
from abliterate.model.run import starts_as_embedding
from abliterate.observe import Observation
from abliterate.options import Options
from abliterate.prompts import PromptSet, Splits

logger = logging.getLogger("abliterate")

#: Tokens of the base's refusals and answers that strengths are tuned along.
REFUSAL_TOKENS, ANSWER_TOKENS = 8, 24


def select(
    model: ChatModel,
    plan: EditPlan,
    stats: tuple[ActivationStats, ActivationStats],
    shown: Contrast,
    options: Options,
    steps: Steps = no_steps,
) -> Choice:
    """Step 2: the direction, by causal test on validation prompts, and the other candidates; or the one options name.

    With `directions` above 1 as many behind it as are worth their place.

    Raises:
        UsageError: `layer` or `position` is not among the candidates.
        VerifyError: no candidate passes the test.
    """
    if options.method == "affine":
        _require_slot(model, plan)
    found = named(stats, model.n_layers, options, shown.held)
    if not found and shown.held is not None and named(stats, model.n_layers, options):
        raise VerifyError(
            "false refusals have nothing of their own here: their direction is that of true refusals; leave out --keep"
        )
    if not found:
        asked = [f"--{n} {v}" for n, v in (("layer", options.layer), ("position", options.position)) if v is not None]
        raise UsageError(
            f"{' '.join(asked) or model.model.config.model_type}: nothing there tells harmful from harmless requests; "
            f"layers are 0 to {model.n_layers - 1}, positions {stats[0].positions[0]} to -1"
        )
    if not shown.observed.tokens:
        why = "" if options.directions == 1 else "without refusals none can be tested"
        return Choice(several.together([most_separated(found, *stats)], why), [], [])
    bound = options.max_kl if why_not_tuned(model, shown.observed, options) else options.test_max_kl
    trial = causal_test(model, plan, shown, options, options.tested_strength)
    if len(found) == 1:
        first = Choice(choosing.measure(trial, found[0]), [], [])
    else:
        first = choosing.choose(trial, found, bound, steps)
    again = candidates_again(model, plan, shown, options, steps)
    choice = several.extended(trial, first, again, options.directions, bound, steps)
    if choice.direction.stopped:
        kept, most = choice.direction.rank, options.directions
        logger.info("directions: %d of at most %d; %s", kept, most, choice.direction.stopped)
    return choice


def _require_slot(model: ChatModel, plan: EditPlan) -> None:
    """Check that what every row of the embedding has along a direction is what the stream has along it.

    Raises:
        UnsupportedError: it is scaled, or behind a norm.
    """
    embedding = [w for w in plan.writers if w.module == "embed" and w.gain is None and not w.centred]
    if not embedding or not starts_as_embedding(model):
        raise UnsupportedError(
            f"--method affine: what the stream is to keep goes into the embedding, and {model.model.config.model_type} "
            "scales its rows before they enter the stream; use another method"
        )


def why_not_tuned(model: ChatModel, observed: Observation, options: Options) -> str | None:
    """Why strengths cannot be tuned; None where they can."""
    if model.weights is not None:
        return "the model runs block by block"
    quantizer = getattr(model.model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        return "its weights are quantised, and no gradient goes through them"
    return options.why_not_tuned or (None if observed.tokens else "no refusals were seen")


def unless_asked(why_not: str, options: Options) -> str:
    """The reason, where tuning was left to us.

    Raises:
        UsageError: it was asked for.
    """
    asked = "--tune" if options.tune else "--target-refusals" if options.target_refusals is not None else None
    if asked is None and options.keep is not None:
        asked = "--keep harmful"
    if asked is not None:
        raise UsageError(f"{asked}: strengths cannot be tuned here ({why_not}); leave it out")
    logger.info("strengths are not tuned: %s", why_not)
    return why_not


def tune(
    model: ChatModel,
    plan: EditPlan,
    chosen: Direction,
    stats: tuple[ActivationStats, ActivationStats],
    shown: Contrast,
    options: Options,
    steps: Steps = no_steps,
) -> list[Point]:
    """Strengths and direction by gradient on train prompts: what was passed, measured on validation prompts.

    The first point is `chosen` at strength 1 everywhere.
    """
    (lose, keep), (declined, kept), held = shown.train, shown.validation, shown.held
    step = steps("reading answers", len(lose) + len(keep) + len(kept) + (len(held.train) if held is not None else 0))

    def said(prompts: PromptSet, tokens: int, distributions: bool = True) -> Answered:
        rows = model.chat.encode(prompts.prompts)
        return answered(model, rows, tokens, options.batch_size, step, distributions=distributions)

    def refused(prompts: PromptSet) -> int:
        return len(observing.declined(model, prompts, options.batch_size))

    task = Task(
        model, plan.sites, plan.places, shown.observed.tokens,
        lose=said(lose, REFUSAL_TOKENS, distributions=False), keep=said(keep, ANSWER_TOKENS),
        declined=model.chat.encode(declined.prompts), kept=said(kept, ANSWER_TOKENS),
        count=lambda: refused(shown.lose.validation), asked=len(shown.lose.validation),
        hold=None if held is None else said(held.train, REFUSAL_TOKENS),
        held=None if held is None else partial(refused, held.validation), batch_size=options.batch_size,
    )  # fmt: skip
    spanning = spanned(stats, model.n_layers, options, held)
    recipe = RECIPE if held is None else HOLDING
    return tuning.tune(task, chosen, spanning, recipe, options.seed, steps)


def controls(
    model: ChatModel,
    plan: EditPlan,
    direction: Direction,
    shown: Contrast,
    options: Options,
    steps: Steps = no_steps,
) -> dict[str, Any]:
    """What directions that carry no refusal do with the plan's strengths; nothing where that cannot be told.

    It cannot without refusal tokens, or without the layer of the direction.
    """
    if not shown.observed.tokens or direction.layer is None:
        return {}
    trial = causal_test(model, plan, shown, options, options.strength)
    return controlling.controls(trial, direction, shown.train[1], options.seed, steps)


def hold(
    model: ChatModel, plan: EditPlan, harmful: Splits, options: Options, steps: Steps
) -> tuple[list[int], list[int], ActivationStats]:
    """Which train and validation prompts are declined: refusals that are to stay; and statistics of the former.

    Raises:
        NoRefusalError: too few are.
    """
    step = steps("reading refusals that stay", len(harmful.train) + len(harmful.validation))
    train, validation = (observing.declined(model, s, options.batch_size, step) for s in harmful[:2])
    if len(train) < 2 or not validation:
        raise NoRefusalError(
            f"the model declines {len(train)} of {len(harmful.train)} harmful prompts for training and "
            f"{len(validation)} of {len(harmful.validation)} for validation: there is hardly a refusal to keep; leave "
            "out --keep, or give harmful prompts that it declines with --harmful"
        )
    held = harmful.train.take(train)
    (stats,) = collect_sets(
        model, (held,), options.batch_size, model_fingerprint=plan.source, n_layers=depth(model.n_layers, options),
        progress=steps("collecting activations", len(held)),
    )  # fmt: skip
    return train, validation, stats
