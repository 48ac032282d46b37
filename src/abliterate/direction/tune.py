"""Strengths for every place that writes, and the direction itself, by gradient through the frozen model.

Owns the objective, the descent and the points it passes; never judges text (it is told how to count refusals) and never
sees test prompts.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from abliterate.direction.answers import Answered, divergence_along
from abliterate.direction.direction import Direction
from abliterate.direction.front import Point
from abliterate.direction.refusal_score import refusal_score
from abliterate.model.batches import batches
from abliterate.model.gradient import backward, tokens_at_once
from abliterate.model.hooks import ablate
from abliterate.model.load import ChatModel
from abliterate.model.progress import Steps, no_steps
from abliterate.model.run import along, forward, log_probs
from abliterate.model.sites import WriterSite

#: Strengths below this are none: their tensors stay as they are, byte for byte.
LEAST_STRENGTH = 0.02
BY_GRADIENT = "strengths and direction by gradient"


@dataclass(frozen=True)
class Recipe:
    """How to descend: `stages` of so many steps at one rate, what a nat of KL is worth in refusal log-odds.

    From `start`, where little is lost, falling rates follow the front towards fewer refusals, through `further` stages
    too while more than a share of `enough` of the validation prompts is declined. `batch` prompts of either kind are
    drawn for a step. `first` is the weight of the first token's KL beside the mean along the answer, `opening` that of
    a refusal's later tokens; refusal log-odds below minus `margin` gain little; `pull` is what strengths cost by
    themselves; coordinates of the direction move at `turning` times the rate of strengths, within so many axes as
    `span`. `hold` is the weight of refusals that are to stay beside answers. What else was tried: docs/method.md.
    """

    stages: tuple[tuple[int, float], ...] = ((14, 20.0), (6, 14.0))
    further: tuple[tuple[int, float], ...] = ((6, 10.0), (6, 7.0))
    enough: float = 0.05
    batch: int = 8
    learning_rate: float = 0.08
    turning: float = 0.5
    first: float = 1.0
    opening: float = 0.3
    margin: float = 3.0
    pull: float = 0.02
    start: float = 0.3
    span: int = 24
    hold: float = 3.0


RECIPE = Recipe()
#: Where refusals are to stay, they cost more than answers, and the direction has further to turn.
HOLDING = Recipe(stages=((6, 6.0), (6, 3.0), (6, 1.5)), further=(), batch=16, learning_rate=0.09, turning=1.0, span=40)


@dataclass(frozen=True)
class Task:
    """What is to go and what is to stay: the model, where it writes, prompts with the base's own answers.

    `lose` are answers that decline, `keep` those whose distributions are to stay as they are; `declined` (prompts
    alone) and `kept` are the same of the validation prompts. `count` says how many of `asked` validation prompts the
    model declines, hooked as it is when called. `hold` are refusals that are to stay, of train prompts, and `held`
    counts those of validation prompts.
    """

    model: ChatModel
    sites: Sequence[WriterSite]
    places: Sequence[str]
    tokens: list[int]
    lose: Answered
    keep: Answered
    declined: list[list[int]]
    kept: Answered
    count: Callable[[], int]
    asked: int
    batch_size: int
    hold: Answered | None = None
    held: Callable[[], int] | None = None


def tune(
    task: Task,
    chosen: Direction,
    candidates: Sequence[Direction],
    recipe: Recipe = RECIPE,
    seed: int = 0,
    steps: Steps = no_steps,
) -> list[Point]:
    """The points passed on a descent from `chosen`, measured on validation prompts; the first is `chosen` as it is.

    Minimises, by Adam over a strength `s` for every place and coordinates of the direction in the span of `candidates`,

        mean_lose [softplus(score + margin) + opening · mean softplus(log-odds of the refusal's later tokens)]
        + rate · mean_keep [mean_t KL_t(base‖edited) + first · KL_0(base‖edited)] + pull · mean |s|

    (the second term again, times `hold`, over refusals that are to stay), with the base's own words forced. Arditi et
    al. 2024 (arXiv 2406.11717) give the score; Wollschläger et al. 2025 (arXiv 2502.17420) descend on one direction at
    strength 1.
    """
    search = _Search(task, chosen, candidates, recipe, seed)
    plain = search.point(chosen, None, 0)
    points, done = [plain], 0
    for i, (n, rate) in enumerate(recipe.stages + recipe.further):
        if i >= len(recipe.stages) and points[-1].share <= recipe.enough:
            break
        step = steps(f"tuning the strengths, {rate:g} a nat", n)
        for _ in range(n):
            search.step(rate)
            step(1)
        done += n
        points.append(search.point(search.direction(), rate, done))
    return points


class _Search:
    """The parameters, and a step downhill."""

    def __init__(
        self, task: Task, chosen: Direction, candidates: Sequence[Direction], recipe: Recipe, seed: int
    ) -> None:
        self.task, self.chosen, self.recipe = task, chosen, recipe
        device = task.model.device
        self.names = list(dict.fromkeys(task.places))
        self.index = torch.tensor([self.names.index(place) for place in task.places], device=device)
        first, self.fixed = np.atleast_2d(chosen.vector)[0], torch.from_numpy(np.atleast_2d(chosen.vector)[1:])
        self.fixed = self.fixed.to(device)
        self.span = torch.from_numpy(_span(first, candidates, self.fixed.cpu().numpy(), recipe.span)).to(device)
        at = self.span @ torch.from_numpy(first).to(device)
        self.coordinates = functional.normalize(at, dim=0).requires_grad_()
        self.strengths = torch.full((len(self.names),), recipe.start, device=device, requires_grad=True)
        self.adam = torch.optim.Adam(
            [
                {"params": [self.strengths], "lr": recipe.learning_rate},
                {"params": [self.coordinates], "lr": recipe.learning_rate * recipe.turning},
            ],
            betas=(0.8, 0.95),
        )
        order = random.Random(seed)
        self.lose, self.keep = _Deck(task.lose, recipe.batch, order), _Deck(task.keep, recipe.batch, order)
        self.hold = _Deck(task.hold, recipe.batch, order) if task.hold is not None else None

    @cached_property
    def at_once(self) -> int | None:
        """Tokens of a batch, by the longest row of all."""
        known = [given for given in (self.task.lose, self.task.keep, self.task.hold) if given is not None]
        rows, keep = [row for given in known for row in given.rows], max(given.keep for given in known)
        return tokens_at_once(self.task.model, rows, keep, self.hooks)

    def hooks(self) -> AbstractContextManager[None]:
        """The model as the parameters have it."""
        return ablate(self.task.model, self.task.sites, self._basis()[None], self.strengths[self.index])

    def _basis(self) -> torch.Tensor:
        """`[k, d_model]`: the direction as its coordinates have it, and those that stay as they are."""
        unit = functional.normalize(self.coordinates @ self.span, dim=0)
        return torch.cat([unit[None], self.fixed])

    def step(self, rate: float) -> None:
        """One step of Adam on a draw of prompts."""
        lose, keep = self.lose.draw(), self.keep.draw()
        self.adam.zero_grad()
        self._backward(lose, partial(self._losing, lose))
        self._backward(keep, partial(self._keeping, keep, rate))
        if self.hold is not None:
            hold = self.hold.draw()
            self._backward(hold, partial(self._keeping, hold, rate * self.recipe.hold))
        (self.recipe.pull * self.strengths.abs().mean()).backward()
        self.adam.step()

    def direction(self) -> Direction:
        """The parameters as a direction with strengths; small ones are none."""
        with torch.no_grad():
            basis = self._basis().cpu().numpy().astype(np.float32)
        each = zip(self.names, self.strengths.tolist(), strict=True)
        strengths = {name: round(s, 4) if abs(s) >= LEAST_STRENGTH else 0.0 for name, s in each}
        vector = basis if self.chosen.vector.ndim == 2 else basis[0]
        method = f"{self.chosen.method}, then {BY_GRADIENT}"
        return dataclasses.replace(self.chosen, vector=vector, strengths=strengths, method=method)

    def point(self, direction: Direction, rate: float | None, steps: int) -> Point:
        """A direction with what it does on the validation prompts."""
        task = self.task
        each = torch.tensor([direction.strengths.get(p, 0.0) if direction.strengths else 1.0 for p in task.places])
        basis = torch.from_numpy(np.atleast_2d(direction.vector))[None]
        with ablate(task.model, task.sites, basis, each.to(task.model.device)):
            scores, refused = _scores(task), task.count()
            held = task.held() if task.held is not None else None
            first, mean = _divergences(task)
        return Point(direction, refused, task.asked, scores, first, mean, rate, steps, held)

    def _backward(self, given: Answered, loss: Callable[[list[int], torch.Tensor], torch.Tensor]) -> None:
        backward(self.task.model, given.rows, given.keep, loss, self.hooks, self.at_once)

    def _losing(self, given: Answered, indices: list[int], logits: torch.Tensor) -> torch.Tensor:
        losses = list[torch.Tensor]()
        for row, i in zip(logits, indices, strict=True):
            answer = given.answers[i]
            p = log_probs(row[along(answer)])
            score = refusal_score(p[:1], self.task.tokens)[0]
            losses.append(functional.softplus(score + self.recipe.margin))
            if len(answer) > 1:
                said = p[1:].gather(-1, torch.tensor(answer[1:], device=p.device)[:, None])[:, 0]
                odds = said - torch.log1p(-said.exp().clamp(max=1 - 1e-6))
                losses.append(self.recipe.opening * functional.softplus(odds).mean())
        return torch.stack(losses).sum() / len(given.prompts)

    def _keeping(self, given: Answered, rate: float, indices: list[int], logits: torch.Tensor) -> torch.Tensor:
        losses = list[torch.Tensor]()
        for row, i in zip(logits, indices, strict=True):
            kl = divergence_along(given.likeliest[i], log_probs(row[along(given.answers[i])]))
            losses.append(kl.mean() + self.recipe.first * kl[0])
        return rate * torch.stack(losses).sum() / len(given.prompts)


class _Deck:
    """Prompts in random order, each drawn once before any is drawn again."""

    def __init__(self, given: Answered, size: int, order: random.Random) -> None:
        self.given, self.size, self.order = given, min(size, len(given.prompts)), order
        self.left = list[int]()

    def draw(self) -> Answered:
        """The next few."""
        if len(self.left) < self.size:
            again = [i for i in range(len(self.given.prompts)) if i not in self.left]
            self.left += self.order.sample(again, len(again))
        drawn, self.left = self.left[: self.size], self.left[self.size :]
        return self.given.take(drawn)


def _span(
    first: npt.NDArray[np.float32], candidates: Sequence[Direction], fixed: npt.NDArray[np.float32], size: int
) -> npt.NDArray[np.float32]:
    """An orthonormal basis `[size, d_model]` of most of what the candidates span, `first` in it, orthogonal to `fixed`.

    Its axes are those along which the candidates point most.
    """
    given = np.stack([d.vector for d in candidates if d.vector.ndim == 1] + [first]).astype(np.float64)
    others = given - (given @ first)[:, None] * first
    others -= (others @ fixed.T) @ fixed
    _, sizes, axes = np.linalg.svd(others, full_matrices=False)
    kept = axes[: size - 1][sizes[: size - 1] > 1e-3 * max(1e-12, float(sizes[0]))]
    return np.concatenate([first[None], kept]).astype(np.float32)


def _scores(task: Task) -> float:
    """Mean refusal score of the validation prompts that the base declines."""
    found = list[torch.Tensor]()
    for _, logits in forward(task.model, batches(task.model, task.declined, task.batch_size), tokens=1):
        found.append(refusal_score(log_probs(logits[:, -1]), task.tokens))
    return torch.cat(found).mean().item()


def _divergences(task: Task) -> tuple[float, float]:
    """Mean KL at the first token and along the answers of the validation prompts that are to stay."""
    given, found = task.kept, list[torch.Tensor]()
    passes = forward(
        task.model, batches(task.model, given.rows, max(1, task.batch_size // 8), given.keep), tokens=given.keep
    )
    for batch, logits in passes:
        for row, i in zip(logits, batch.indices, strict=True):
            kl = divergence_along(given.likeliest[i], log_probs(row[along(given.answers[i])]))
            found.append(torch.stack([kl[0], kl.mean()]))
    first, mean = torch.stack(found).mean(0).tolist()
    return first, mean
