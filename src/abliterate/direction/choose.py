"""Choose one direction by what it does: ablated it must stop refusals, added it must cause them, cheaply.

Owns the causal test and its rounds; never sees the prompts that the means came from, nor any text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from abliterate.direction.direction import Direction
from abliterate.direction.refusal_score import refusal_score
from abliterate.errors import VerifyError
from abliterate.model.batches import pad_left
from abliterate.model.hooks import ablate, add_vectors
from abliterate.model.load import ChatModel
from abliterate.model.prefix import run_prefix, shared_length
from abliterate.model.progress import Progress, Steps, no_steps, silent
from abliterate.model.run import first_token_log_probs, kl_divergence, next_token_log_probs
from abliterate.model.sites import WriterSite

#: Rounds before the finalists meet all prompts: prompts of each kind used so far, candidates that stay.
_ROUNDS = ((3, 24), (8, 8))
#: How far over the bound a mean KL of a few prompts may lie before a candidate is put behind the others.
_SLACK = 1.5
#: Layers from this share of the depth on are too close to the output to carry a cause.
DEEPEST = 0.8
#: Share of the gap between harmless and harmful scores that adding a cause must close.
_LEAST_RISE = 0.05
#: Bound on first-token KL(base‖ablated) on harmless prompts, in nats.
MAX_KL = 0.2


Float64Array = npt.NDArray[np.float64]
#: Changes the running model while it lasts, each row of a batch by a direction of its own.
Change = Callable[[Sequence[Direction]], AbstractContextManager[None]]
#: `[rows]` figures of `[rows, d_vocab]` log-probabilities and of the prompts (indices) that they follow.
Measure = Callable[[torch.Tensor, list[int]], torch.Tensor]


@dataclass(frozen=True)
class Trial:
    """What the causal test needs: the model, where its stream is written, validation rows, refusal tokens."""

    model: ChatModel
    sites: Sequence[WriterSite]
    harmful: list[list[int]]
    harmless: list[list[int]]
    tokens: list[int]
    batch_size: int
    strength: float = 1.0

    @cached_property
    def base(self) -> dict[str, float]:
        """Mean refusal scores of the model as it is."""
        harmful = first_token_log_probs(self.model, self.harmful, self.batch_size)
        return {
            "base_harmful": refusal_score(harmful, self.tokens).mean().item(),
            "base_harmless": refusal_score(self._harmless, self.tokens).mean().item(),
        }

    def ablated(self, directions: list[Direction], rows: list[list[int]], progress: Progress = silent) -> Float64Array:
        """`[directions]` mean refusal scores of `rows` with each direction ablated everywhere."""
        return _means(self, self._ablate, directions, rows, lambda p, _: refusal_score(p, self.tokens), progress)

    def costs(self, directions: list[Direction], start: int, stop: int, progress: Progress = silent) -> Float64Array:
        """`[directions]` mean first-token KL(base‖ablated), in nats, on a range of the harmless prompts."""
        base = self._harmless[start:stop]  # computed before the model is changed
        rows = self.harmless[start:stop]
        return _means(self, self._ablate, directions, rows, lambda p, i: kl_divergence(base[i], p), progress)

    def bounded(self, direction: Direction) -> Direction:
        """The direction with the figures that are bounded, on harmless prompts.

        `added` is the mean refusal score with `r` added at the layer it was found at, `kl` the mean first-token
        KL(base‖ablated) in nats.
        """
        (added,) = _means(self, self._add, [direction], self.harmless, lambda p, _: refusal_score(p, self.tokens))
        (kl,) = self.costs([direction], 0, len(self.harmless))
        return dataclasses.replace(direction, scores=direction.scores | {"added": float(added), "kl": float(kl)})

    @cached_property
    def _harmless(self) -> torch.Tensor:
        """The base's log-probabilities `[harmless prompts, d_vocab]`."""
        return first_token_log_probs(self.model, self.harmless, self.batch_size)

    def _ablate(self, directions: Sequence[Direction]) -> AbstractContextManager[None]:
        return ablate(self.model, self.sites, _stack(directions), self.strength)

    def _add(self, directions: Sequence[Direction]) -> AbstractContextManager[None]:
        scales = torch.tensor([d.scale for d in directions])[:, None]
        return add_vectors(self.model, [d.layer for d in directions], _stack(directions) * scales)


def choose(
    trial: Trial, candidates: list[Direction], max_kl: float = MAX_KL, steps: Steps = no_steps
) -> tuple[Direction, list[Direction]]:
    """The candidate that lowers the refusal score most within the bounds, and all finalists with their scores.

    After Arditi et al. 2024 (arXiv 2406.11717, appendix C): minimise the refusal score of harmful prompts
    under ablation, such that adding the direction makes the score of harmless prompts rise by at least a twentieth of
    the gap to harmful ones, and KL stays under `max_kl`. Rough rounds on a few prompts pick the finalists, rows of a
    batch carrying candidates of their own. The bounds are tested from the lowest ablated score upwards until one
    finalist passes, so `added` and `kl` are known up to there only.

    Raises:
        VerifyError: no candidate passes; says which bound failed.
    """
    finalists = _finalists(trial, candidates, max_kl, steps)
    step, tested = steps("testing the choice", len(finalists)), list[Direction]()
    for direction in finalists:
        tested.append(trial.bounded(direction))
        step(1)
        if tested[-1].scores["added"] > _floor(**trial.base) and tested[-1].scores["kl"] <= max_kl:
            break
    step(len(finalists) - len(tested))
    scored = tested + finalists[len(tested) :]
    return _pick(tested, trial.base["base_harmful"], trial.base["base_harmless"], max_kl), scored


def _floor(base_harmful: float, base_harmless: float) -> float:
    """The score that harmless prompts must exceed when a cause is added: some way from harmless to harmful."""
    return base_harmless + _LEAST_RISE * (base_harmful - base_harmless)


def measure(trial: Trial, direction: Direction) -> Direction:
    """The causal test of one direction that a person named, its figures in `scores`; nothing is bounded."""
    ablated = float(trial.ablated([direction], trial.harmful)[0])
    return trial.bounded(dataclasses.replace(direction, scores=trial.base | {"ablated": ablated}))


def _finalists(trial: Trial, candidates: list[Direction], max_kl: float, steps: Steps) -> list[Direction]:
    """The candidates with the lowest ablated scores, lowest first, by rounds on more and more prompts.

    Those whose KL is far over the bound on the rounds' harmless prompts come behind all others.
    """
    everything = len(trial.harmful)
    rounds = [(min(upto, everything, len(trial.harmless)), stay) for upto, stay in _ROUNDS]
    rounds.append((everything, _ROUNDS[-1][1]))
    sizes = [len(candidates), *(min(stay, len(candidates)) for _, stay in rounds)]
    spans = list(pairwise([0, *(upto for upto, _ in rounds)]))
    rows = sum(n * (b - a) for n, (a, b) in zip(sizes, spans, strict=False))
    step = steps(
        "choosing the direction", rows + sum(n * (b - a) for n, (a, b) in zip(sizes, spans[:-1], strict=False))
    )
    scores, costs = np.zeros((2, len(candidates)))
    for (start, stop), (_, stay) in zip(spans, rounds, strict=True):
        if stop > start:
            scores += trial.ablated(candidates, trial.harmful[start:stop], step) * (stop - start)
            if (start, stop) != spans[-1]:
                costs += trial.costs(candidates, start, stop, step) * (stop - start)
        best = np.lexsort((scores, costs > _SLACK * max_kl * min(stop, spans[-1][0])))[:stay]
        candidates, scores, costs = [candidates[i] for i in best], scores[best], costs[best]
    return [
        dataclasses.replace(d, scores=trial.base | {"ablated": float(score / everything)})
        for d, score in zip(candidates, scores, strict=True)
    ]


def _pick(scored: list[Direction], base_harmful: float, base_harmless: float, max_kl: float) -> Direction:
    """The finalist with the lowest ablated score among those that pass every bound."""
    falls = [d for d in scored if d.scores["ablated"] < base_harmful]
    if not falls:
        raise VerifyError(
            f"no candidate direction lowers the refusal score when ablated (base {base_harmful:.2f}); "
            "one direction does not carry this model's refusal"
        )
    floor = _floor(base_harmful, base_harmless)
    causes = [d for d in falls if d.scores["added"] > floor]
    if not causes:
        raise VerifyError(
            "no candidate direction raises the refusal score of harmless prompts when added "
            f"(base {base_harmless:.2f}); what was found is a correlate of refusal, not its cause"
        )
    cheap = [d for d in causes if d.scores["kl"] <= max_kl]
    if not cheap:
        least = min(causes, key=lambda d: d.scores["kl"])
        raise VerifyError(
            f"every candidate that stops refusals moves harmless answers by more than {max_kl} nats (the least: layer "
            f"{least.layer}, position {least.position}, KL {least.scores['kl']:.3f}); raise --max-kl to accept it"
        )
    return min(cheap, key=lambda d: d.scores["ablated"])


def _means(
    trial: Trial,
    change: Change,
    directions: list[Direction],
    rows: list[list[int]],
    measure: Measure,
    progress: Progress = silent,
) -> Float64Array:
    """`[directions]` means of a measure over `rows`, with the model changed by each direction.

    All rows of a batch carry directions of their own; the opening that rows share is run once for each direction.
    """
    model, totals = trial.model, np.zeros(len(directions))
    opening, longest = rows[0][: shared_length(rows)], max(map(len, rows))
    by_length = sorted(range(len(rows)), key=lambda p: len(rows[p]))
    for start in range(0, len(directions), trial.batch_size):
        block = directions[start : start + trial.batch_size]
        with change(block):
            prefix = run_prefix(model, opening, longest, len(block))
        at_once = max(1, trial.batch_size // len(block))
        for i in range(0, len(rows), at_once):
            prompts = by_length[i : i + at_once]
            batch = pad_left(model, [rows[p] for _ in block for p in prompts], prefix=prefix)
            with change([d for d in block for _ in prompts]):
                figures = measure(next_token_log_probs(model, batch), prompts * len(block))
            totals[start : start + len(block)] += figures.double().cpu().numpy().reshape(len(block), -1).sum(1)
            progress(len(batch.indices))
    return totals / len(rows)


def _stack(directions: Sequence[Direction]) -> torch.Tensor:
    """`[rows, d_model]`: the direction of each row."""
    return torch.from_numpy(np.stack([d.vector for d in directions]))
