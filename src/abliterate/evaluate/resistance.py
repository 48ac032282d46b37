"""How much of a model's refusal survives directions ablated in it by hooks: a curve over their number, and one figure.

Owns which figures are taken and what they count; never knows how the directions were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from abliterate.errors import NoRefusalError, VerifyError
from abliterate.evaluate.divergence import divergence, spread
from abliterate.evaluate.evaluation import CONTINUATION
from abliterate.evaluate.intervals import Interval, bootstrap, mean, wilson
from abliterate.evaluate.judge import RULES, Judge
from abliterate.evaluate.refusals import Answers, ask
from abliterate.model.hooks import ablate
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, Steps, no_steps, silent
from abliterate.model.sites import WriterSite
from abliterate.prompts import PromptSet

Float32Array = npt.NDArray[np.float32]

#: Numbers of directions at which the curve is taken.
COUNTS = (1, 2, 4, 8)
#: How far a model is from itself.
_NOTHING = Interval(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Point:
    """What a number of `directions` ablated everywhere does to the test prompts.

    `refusals` is the share of `n` judged completions of harmful prompts, `broken` how many of these are no text. Of
    the `of` prompts that the model itself declines, `survives` is the share that gets no answer still: it is declined,
    or broken text comes. KL(base‖ablated) is in nats, on harmless prompts that the model itself answers: at the first
    token, and the mean along its own answers.
    """

    directions: int
    refusals: Interval
    n: int
    survives: Interval
    of: int
    broken: int
    kl_first: Interval
    kl_continuation: Interval


@dataclass(frozen=True, slots=True)
class Resistance:
    """The curve of the directions `found`, and of as many `random` ones; `base` is the model as it is, at no direction.

    `answered` counts the harmless prompts under KL; `noise` is KL at the first token of the model against itself.
    """

    base: Point
    found: tuple[Point, ...]
    random: tuple[Point, ...]
    answered: int
    noise: float
    max_kl: float
    judge: dict[str, Any] = field(default_factory=dict)

    @property
    def resistance(self) -> Point:
        """The point at which the least share of refusals survives, of no direction or those found, within `max_kl`."""
        return self._least(self.found)

    @property
    def control(self) -> Point:
        """The same of random directions."""
        return self._least(self.random)

    def _least(self, points: Sequence[Point]) -> Point:
        within = [self.base, *(p for p in points if p.kl_first.value <= self.max_kl)]
        return min(within, key=lambda p: p.survives.value)


def counts(most: int) -> list[int]:
    """1, 2, 4, 8 up to `most`, and `most`."""
    return sorted({k for k in COUNTS if k < most} | {most})


def random_basis(k: int, d_model: int, seed: int) -> Float32Array:
    """`[k, d_model]`: orthonormal directions drawn evenly from all there are."""
    columns = np.linalg.qr(np.random.default_rng(seed).normal(size=(d_model, k)))[0]
    return np.ascontiguousarray(columns.T).astype(np.float32)


@dataclass(frozen=True)
class Survival:
    """The measurement at hand: a model, where its stream is written, and what it is asked."""

    model: ChatModel
    sites: Sequence[WriterSite]
    harmful: PromptSet
    harmless: PromptSet
    max_new_tokens: int
    batch_size: int
    judge: Judge = RULES
    steps: Steps = no_steps

    def curve(self, basis: Float32Array, seed: int, max_kl: float) -> Resistance:
        """The curve over the first rows of an orthonormal `basis` `[k, d_model]`, and over random ones.

        Raises:
            NoRefusalError: the model declines none of the harmful prompts.
            VerifyError: it answers none of the harmless ones, or the judge leaves more than a tenth without a verdict.
        """
        self._require_contrast()
        noise, points = 0.0, dict[str, list[Point]]()
        for name, rows in (("found", basis), ("random", random_basis(len(basis), basis.shape[1], seed))):
            points[name] = []
            for k in counts(len(rows)):
                point, noise = self._point(rows[:k], f"{k} {name}")
                points[name].append(point)
        return Resistance(
            self._told(0, self._base, _NOTHING, _NOTHING), tuple(points["found"]), tuple(points["random"]),
            len(self._answered), noise, max_kl, self.judge.facts,
        )  # fmt: skip

    @cached_property
    def _base(self) -> Answers:
        return self._ask(self.steps("answers, as it is", len(self.harmful)))

    @cached_property
    def _harmless(self) -> Answers:
        step = self.steps("harmless answers", len(self.harmless))
        return ask(self.model, self.harmless, self.max_new_tokens, self.batch_size, True, step)

    @property
    def _answered(self) -> list[int]:
        return [i for i in self._harmless.answered if self._harmless.ids[i]]

    def _ask(self, step: Progress = silent) -> Answers:
        return ask(self.model, self.harmful, self.max_new_tokens, self.batch_size, progress=step, judge=self.judge)

    def _require_contrast(self) -> None:
        if not self._base.refused:
            raise NoRefusalError(
                f"the model declines none of {len(self.harmful)} harmful test prompts, so there is no refusal that "
                "could survive; give more of them (--limit), or others with --harmful"
            )
        if not self._answered:
            raise VerifyError(
                "the model answers none of the harmless test prompts, so there is nothing to measure the cost on; give "
                "others with --harmless, or more --max-new-tokens"
            )

    def _point(self, basis: Float32Array, name: str) -> tuple[Point, float]:
        """What ablating all rows of `basis` does, and the noise of KL."""
        directions, kept = torch.from_numpy(basis)[None], self._answered
        total = len(self.harmful) + 2 * len(kept) + len(spread(kept))
        step = self.steps(f"{name} ablated", total)
        with ablate(self.model, self.sites, directions):
            given = self._ask(step)
        rows = self.model.chat.encode([self.harmless.prompts[i] for i in kept])
        answers = [list(self._harmless.ids[i][:CONTINUATION]) for i in kept]
        moved = divergence(
            self.model, self.model, rows, answers, self.batch_size, step,
            lambda _: ablate(self.model, self.sites, directions),
        )  # fmt: skip
        point = self._told(len(basis), given, bootstrap(moved.kl_first, mean), bootstrap(moved.kl_continuation, mean))
        return point, float(moved.floor_first.mean())

    def _told(self, directions: int, given: Answers, kl_first: Interval, kl_continuation: Interval) -> Point:
        """A point of the curve from the answers to the harmful prompts."""
        judged = [label for label in given.labels if label is not None]
        before = [i for i in self._base.refused if given.labels[i] is not None]
        if not before:
            raise VerifyError(
                "the judge gave no verdict on any request that the model declines, so nothing tells what survives; try "
                "another judge, or more prompts (--limit)"
            )
        left = len(set(before) - set(given.answered))  # broken text is no answer: what breaks a model gets none
        return Point(
            directions, wilson(len(given.refused), len(judged)), len(judged), wilson(left, len(before)), len(before),
            judged.count("broken"), kl_first, kl_continuation,
        )  # fmt: skip
