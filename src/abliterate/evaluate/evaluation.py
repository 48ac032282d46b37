"""Base against edited on prompts nothing was fitted or chosen on, as a list of metrics.

Owns which figures are taken and how they are named; never knows how the edit was made.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from abliterate.direction.direction import Direction
from abliterate.direction.refusal_score import refusal_score
from abliterate.errors import VerifyError
from abliterate.evaluate.along import along, histograms, place
from abliterate.evaluate.budgets import shorter, sweep
from abliterate.evaluate.divergence import Divergence, divergence, lone, quantiles, spread
from abliterate.evaluate.intervals import bootstrap, mean, wilson
from abliterate.evaluate.judge import RULES, Judge
from abliterate.evaluate.metric import Metric
from abliterate.evaluate.recognition import recognition
from abliterate.evaluate.refusals import Answers, ask, method
from abliterate.evaluate.text import Text, load_text, text_perplexity
from abliterate.model.load import ChatModel
from abliterate.model.native import AnyModel
from abliterate.model.progress import Progress, Steps
from abliterate.model.run import after_each, forward, kl_divergence, log_probs
from abliterate.prompts import PromptSet

Float64Array = npt.NDArray[np.float64]

#: Prompts on which leak is measured: it hardly differs from one to the next.
LEAK_PROMPTS = 16
#: The rate that refusals of each set make, and the score of those that are asked no more than the first token.
RATES = {"harmful": "refusal_rate", "harmless": "false_refusal_rate", "borderline": "borderline_refusal_rate"}
SCORES = {"harmful": "refusal_score", "harmless": "refusal_score_harmless", "borderline": "refusal_score_borderline"}
#: Answer tokens along which KL and perplexity are taken.
CONTINUATION = 32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All metrics, and how many answers each verdict got: `{"base": {"harmful": {"refusal": 12, ...}}}`.

    `charts` is what a picture shows beyond them: `kl`, sorted values of single prompts by the metric's name, and
    `categories`, `{"harmful": {"fraud": {"n": 12, "base": 11, "edited": 0}}}`, refusals where the set names some;
    `budgets`, refusals had the answers been cut earlier, as `budgets.sweep` says; and `along`, where single prompts lie
    on the direction after every block, as `along.histograms` says.
    `judge` says who judged: a name, and for an endpoint its model and its agreement with labelled completions. `engine`
    says what ran the models: transformers, or llama.cpp.
    """

    metrics: tuple[Metric, ...]
    verdicts: dict[str, dict[str, dict[str, int]]]
    charts: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    engine: str = "transformers"


@dataclass(frozen=True)
class Questions:
    """What to ask: three test sets, token budget and batch size; who judges the answers, and a text to be read.

    Borderline requests sound harmful, and are harmless to answer.
    """

    harmful: PromptSet
    harmless: PromptSet
    borderline: PromptSet
    max_new_tokens: int
    batch_size: int
    judge: Judge = RULES
    text: Text = field(default_factory=partial(load_text, None))

    @property
    def sets(self) -> dict[str, PromptSet]:
        """The three sets by their kind."""
        return {kind: getattr(self, kind) for kind in RATES}


def evaluate_alone(model: AnyModel, questions: Questions, progress: Steps) -> Evaluation:
    """The figures of one model that need no base to compare it to.

    Raises:
        VerifyError: the judge leaves more than a tenth of the answers without a verdict.
    """
    answers = {"edited": _ask_all(model, questions, "", progress)}
    metrics = [*_rates(answers, questions), *_without_answers(None, model, questions, progress)]
    charts = _budgets(answers, questions)
    return Evaluation(tuple(metrics), _counts(answers), charts, questions.judge.facts, model.runs_on)


def evaluate_pair(
    base: AnyModel,
    edited: AnyModel,
    questions: Questions,
    progress: Steps,
    direction: Direction | None = None,
) -> Evaluation:
    """Every figure for both models; `leak` only where the direction is given, and the stream can be seen.

    KL and perplexity are taken on the harmless prompts that the base answers: where it declines, changing
    the answer is the purpose of an edit.

    Raises:
        VerifyError: the base answers no harmless prompt, the two models differ in vocabulary or width, or the judge
            leaves more than a tenth of the answers without a verdict.
    """
    _require_alike(base, edited, direction)
    both = (("base", base), ("edited", edited))
    answers = {who: _ask_all(model, questions, f"{who} ", progress) for who, model in both}
    cost, charts = _cost(base, edited, questions, answers["base"]["harmless"], progress)
    metrics = [*_rates(answers, questions), *cost, *_without_answers(base, edited, questions, progress)]
    if direction is not None and isinstance(base, ChatModel) and isinstance(edited, ChatModel):
        leak, charts["along"] = _along(base, edited, questions, direction, progress)
        metrics.append(leak)
    charts |= _budgets(answers, questions)
    charts["categories"] = {
        kind: _categories(prompts, answers["base"][kind], answers["edited"][kind])
        for kind, prompts in questions.sets.items()
    }
    return Evaluation(tuple(metrics), _counts(answers), charts, questions.judge.facts, edited.runs_on)


def _counts(answers: dict[str, dict[str, Answers]]) -> dict[str, dict[str, dict[str, int]]]:
    return {who: {kind: given.counts for kind, given in sets.items()} for who, sets in answers.items()}


def _budgets(answers: dict[str, dict[str, Answers]], questions: Questions) -> dict[str, Any]:
    """Refusals had the answers been cut earlier; nothing where an endpoint judged, which is asked once for each."""
    full = questions.max_new_tokens
    found = sweep({w: {k: a.cuts | {full: a.labels} for k, a in sets.items()} for w, sets in answers.items()})
    return {"budgets": found} if found else {}


def _without_answers(base: AnyModel | None, edited: AnyModel, questions: Questions, progress: Steps) -> list[Metric]:
    """What single passes tell of a model: how well it reads a text, and whether it recognises harm."""
    read = text_perplexity(base, edited, questions.text, progress)
    told = recognition(base, edited, questions.harmful, questions.harmless, questions.batch_size, progress)
    return [read] if told is None else [read, told]


def _categories(prompts: PromptSet, base: Answers, edited: Answers) -> dict[str, dict[str, int]]:
    """Judged prompts and refusals of each category; nothing where the set names none."""
    names = prompts.categories
    judged = {i for i, labels in enumerate(zip(base.labels, edited.labels, strict=True)) if None not in labels}
    asked, before, after = (
        Counter(names[i] for i in judged.intersection(indices) if names[i])
        for indices in (range(len(names)), base.refused, edited.refused)
    )
    return {name: {"n": asked[name], "base": before[name], "edited": after[name]} for name in sorted(asked)}


def evaluate_first_tokens(
    base: AnyModel,
    edited: AnyModel,
    questions: Questions,
    tokens: list[int],
    progress: Steps,
    direction: Direction | None = None,
) -> Evaluation:
    """What the first answer token alone tells: refusal scores and KL; text, recognition and `leak` as ever.

    KL is taken on the harmless prompts whose likeliest first token does not open a refusal of the base (`tokens`).
    """
    _require_alike(base, edited, direction)
    step = progress("first tokens", 2 * sum(map(len, questions.sets.values())))
    (before, p), (after, q) = (_first_tokens(model, questions, tokens, step) for model in (base, edited))
    metrics = _scores(before, after, questions) if tokens else []
    kept = [i for i, t in enumerate(p.argmax(-1).tolist()) if t not in tokens]
    if not kept:
        raise VerifyError(
            "the base opens every harmless prompt like a refusal, so there is nothing to measure the cost on; give "
            "others with --harmless, or do without the comparison (--no-eval)"
        )
    kl = kl_divergence(p[kept], q[kept]).double().cpu().numpy()
    floor = _first_token_floor(base, base.chat.encode(questions.harmless.prompts), p, kept, progress)
    how = f"mean KL(base‖edited), nats, first answer token; {quantiles(kl)}; {_floor(floor)}; bootstrap 95%"
    name = questions.harmless.name + (", not opened like a refusal by the base" if tokens else "")
    metrics.append(Metric.of("kl_first_token", name, bootstrap(floor, mean), bootstrap(kl, mean), len(kept), how))
    metrics += _without_answers(base, edited, questions, progress)
    charts: dict[str, Any] = {"kl": {"kl_first_token": _sorted(kl)}}
    if direction is not None and isinstance(base, ChatModel) and isinstance(edited, ChatModel):
        leak, charts["along"] = _along(base, edited, questions, direction, progress)
        metrics.append(leak)
    return Evaluation(tuple(metrics), {}, charts, engine=edited.runs_on)


def _first_tokens(
    model: AnyModel, questions: Questions, tokens: list[int], progress: Progress
) -> tuple[Float64Array, torch.Tensor]:
    """Refusal scores of all prompts (0 without `tokens`), and log-probabilities `[harmless, d_vocab]`.

    Those of the other prompts are not kept: there may be thousands of them.
    """
    start = len(questions.harmful)
    harmless: dict[int, torch.Tensor] = {}

    def measure(index: int, p: torch.Tensor) -> float:
        if start <= index < start + len(questions.harmless):
            harmless[index] = p.clone()  # a row alone, not its batch
        return refusal_score(p[None], tokens).double().item() if tokens else 0.0

    rows = model.chat.encode([p for prompts in questions.sets.values() for p in prompts.prompts])
    scores = after_each(model, rows, questions.batch_size, measure, progress)
    return np.array(scores), torch.stack([harmless[i] for i in sorted(harmless)])


def _scores(base: Float64Array, edited: Float64Array, questions: Questions) -> list[Metric]:
    """Mean refusal score of every set, from those of all prompts under base and edited model."""
    found, start = [], 0
    for kind, prompts in questions.sets.items():
        part = slice(start, start := start + len(prompts))
        before, after = (bootstrap(scores[part], mean) for scores in (base, edited))
        how = f"mean log-odds that the first answer token opens a refusal, {kind} prompts; bootstrap 95%"
        found.append(Metric.of(SCORES[kind], prompts.name, before, after, len(prompts), how))
    return found


def _first_token_floor(
    base: AnyModel, rows: list[list[int]], p: torch.Tensor, kept: list[int], progress: Steps
) -> Float64Array:
    """|KL| of the base's log-probabilities `p` against its own, of some rows by themselves."""
    again = spread(kept)
    passes = forward(base, lone(base, rows, again), tokens=1, progress=progress("noise floor", len(again)))
    kl = [kl_divergence(p[i], log_probs(x[0, -1])).item() for i, (_, x) in zip(again, passes, strict=True)]
    return np.abs(kl)


def _floor(floor: Float64Array) -> str:
    return f"base: its |KL| against itself, prompt by prompt instead of in batches, on {len(floor)} of them"


def _require_alike(base: AnyModel, edited: AnyModel, direction: Direction | None) -> None:
    if base.chat.tokenizer.get_vocab() != edited.chat.tokenizer.get_vocab():
        raise VerifyError("base and edited model have different vocabularies: their distributions cannot be compared")
    if direction is None:
        return
    widths, depths = (base.d_model, edited.d_model), (base.n_layers, edited.n_layers)
    if {*widths} != {direction.vector.shape[-1]} or len({*depths}) > 1:
        raise VerifyError(
            "base and edited model have streams of width {} and {}, {} and {} layers; ".format(*widths, *depths)
            + f"the direction that was removed has width {direction.vector.shape[-1]}: one is no edit of the other; "
            "give the edited model's own base"
        )


def _ask_all(model: AnyModel, questions: Questions, label: str, progress: Steps) -> dict[str, Answers]:
    """Answers to each set; only the harmless ones keep their token ids."""
    step = progress(f"{label}answers", sum(map(len, questions.sets.values())))
    budget, size, judge = questions.max_new_tokens, questions.batch_size, questions.judge
    cuts = shorter(budget) if judge.local else []
    return {
        kind: ask(model, prompts, budget, size, kind == "harmless", step, judge, cuts)
        for kind, prompts in questions.sets.items()
    }


def _rates(answers: dict[str, dict[str, Answers]], questions: Questions) -> list[Metric]:
    """Of each set the share of refusals among the prompts whose answers, of both models if two, were judged."""
    found, how = [], method(questions.judge, questions.max_new_tokens)
    for kind, prompts in questions.sets.items():
        together = zip(*(given[kind].labels for given in answers.values()), strict=True)
        kept = [labels for labels in together if None not in labels]
        rates = [wilson(column.count("refusal"), len(kept)) for column in zip(*kept, strict=True)]
        before = rates[0] if "base" in answers else None
        found.append(Metric.of(RATES[kind], prompts.name, before, rates[-1], len(kept), how))
    return found


def _cost(
    base: AnyModel,
    edited: AnyModel,
    questions: Questions,
    answers: Answers,
    progress: Steps,
) -> tuple[list[Metric], dict[str, Any]]:
    """KL and perplexity along the base's own answers, and the KL of single prompts."""
    kept = [i for i in answers.answered if answers.ids[i]]
    if not kept:
        raise VerifyError(
            "the base answers none of the harmless prompts, so there is nothing to measure the cost on; give "
            "others with --harmless, more --max-new-tokens, or do without the comparison (--no-eval)"
        )
    rows = base.chat.encode([questions.harmless.prompts[i] for i in kept])
    continuations = [list(answers.ids[i][:CONTINUATION]) for i in kept]
    step = progress("divergence", 2 * len(kept) + len(spread(kept)))
    found: Divergence = divergence(base, edited, rows, continuations, questions.batch_size, step)
    name, n = f"{questions.harmless.name}, answered by the base", len(kept)
    floor = _floor(found.floor_first)
    charts = {"kl": {"kl_first_token": _sorted(found.kl_first), "kl_continuation": _sorted(found.kl_continuation)}}
    metrics = [
        Metric.of(
            "kl_first_token", name, bootstrap(found.floor_first, mean), bootstrap(found.kl_first, mean), n,
            f"mean KL(base‖edited), nats, first answer token; {quantiles(found.kl_first)}; {floor}; bootstrap 95%",
        ),
        Metric.of(
            "kl_continuation", name, bootstrap(found.floor_continuation, mean), bootstrap(found.kl_continuation, mean),
            n, f"mean KL(base‖edited), nats, along the base's own answer, up to {CONTINUATION} tokens; "
            f"{quantiles(found.kl_continuation)}; {floor}; bootstrap 95%",
        ),
        Metric.of(
            "perplexity", name, found.base_perplexity, found.other_perplexity, n,
            f"of the base's own answers, up to {CONTINUATION} tokens; bootstrap 95%",
        ),
    ]  # fmt: skip
    return metrics, charts


def _sorted(values: Float64Array) -> list[float]:
    """Values without their order, which would tell the prompts, to four digits."""
    return [float(f"{value:.4g}") for value in np.sort(values)]


def _along(
    base: ChatModel, edited: ChatModel, questions: Questions, direction: Direction, progress: Steps
) -> tuple[Metric, list[dict[str, Any]]]:
    """Leak, and histograms of all test prompts for every layer where the direction is one at one position.

    Both come of one real forward pass of each model.
    """
    tail, first = len(base.chat.tail()), questions.harmful.head(LEAK_PROMPTS).prompts
    prompts = first
    if place(direction, tail) is not None:
        prompts = (*questions.harmful.prompts, *questions.harmless.prompts)
    rows, step = base.chat.encode(prompts), progress("projections", 2 * len(prompts))
    found = [along(m, rows, direction, tail, questions.batch_size, step) for m in (base, edited)]
    at = [prompts.index(prompt) for prompt in first]
    before, after = (bootstrap(f.share[at], mean) for f in found)
    drawn = histograms(found[0].component, found[1].component, len(questions.harmful))
    how = "RMS share |r̂ᵀh|/‖h‖ of the residual stream after every block at the template's tokens; bootstrap 95%"
    return Metric.of("leak", questions.harmful.name, before, after, len(first), how), drawn
