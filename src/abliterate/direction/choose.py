"""Choose one direction by what it does: ablated it must stop refusals, added it must cause them, cheaply.

Owns the causal test and its rounds; never sees the prompts that the means came from, nor any text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from abliterate.direction.direction import Direction
from abliterate.direction.refusal_score import refusal_score
from abliterate.errors import VerifyError
from abliterate.model.batches import Batch, opening_of, pad_left
from abliterate.model.hooks import ablate, add_vectors
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, Steps, no_steps, silent
from abliterate.model.run import first_token_log_probs, forward, kl_divergence, log_probs
from abliterate.model.sites import WriterSite

#: Rounds before the finalists meet all prompts: prompts of each kind used by then, candidates that stay.
_ROUNDS = ((2, 24), (8, 6))
#: How far over the bound a mean KL of a few prompts may lie before a candidate is put behind the others.
_SLACK = 1.5
#: Layers from this share of the depth on are too close to the output to carry a cause.
DEEPEST = 0.8
#: Standard errors by which a mean over prompts must lie above 0 to be no accident of the prompts.
_CERTAIN = 1.96

Float64Array = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
#: Changes the running model while it lasts, each row of a batch by a direction of its own.
Change = Callable[[Sequence[Direction]], AbstractContextManager[None]]
#: `[rows]` figures of `[rows, d_vocab]` log-probabilities and of the prompts (indices) that they follow.
Measure = Callable[[torch.Tensor, list[int]], torch.Tensor]


def preference(tested: Direction) -> tuple[float, float]:
    """What is least for the best candidate: its ablated score, but no lower than the base's on harmless prompts; KL.

    A harmful prompt that is answered like a harmless one cannot be answered more than that: what an edit does to scores
    beyond it is only cost.
    """
    return max(tested.scores["ablated"], tested.scores["base_harmless"]), tested.scores["kl"]


class Choice(NamedTuple):
    """The direction chosen, the finalists with their scores, and all candidates with those of the first round.

    The last are `base` and `ablated`, mean refusal scores on the round's `prompts` harmful prompts.
    """

    direction: Direction
    finalists: list[Direction]
    tried: list[Direction]


@dataclass(frozen=True)
class Trial:
    """What the causal test needs: the model, where its stream is written, validation rows, refusal tokens.

    `removed` `[k, d_model]`, orthonormal, is ablated in all that is tried: candidates are judged by what they do behind
    it, and KL is that of all together from the model as it is. `induces` is whether a direction must raise the score
    when it is added.
    """

    model: ChatModel
    sites: Sequence[WriterSite]
    harmful: list[list[int]]
    harmless: list[list[int]]
    tokens: list[int]
    batch_size: int
    strength: float = 1.0
    removed: Float32Array | None = None
    induces: bool = True

    @cached_property
    def base(self) -> dict[str, float]:
        """Mean refusal scores before a candidate is tried."""
        return {
            "base_harmful": self.base_harmful.mean().item(),
            "base_harmless": self.base_harmless.mean().item(),
        }

    @cached_property
    def base_harmful(self) -> torch.Tensor:
        """`[harmful prompts]` refusal scores before a candidate is tried."""
        with self.begun():
            return refusal_score(first_token_log_probs(self.model, self.harmful, self.batch_size), self.tokens)

    @cached_property
    def base_harmless(self) -> torch.Tensor:
        """`[harmless prompts]` refusal scores before a candidate is tried."""
        if self.removed is None:
            return refusal_score(self._harmless, self.tokens)
        with self.begun():
            return refusal_score(first_token_log_probs(self.model, self.harmless, self.batch_size), self.tokens)

    def begun(self) -> AbstractContextManager[None]:
        """The model with `removed` ablated, while it lasts."""
        if self.removed is None:
            return nullcontext()
        return ablate(self.model, self.sites, torch.from_numpy(self.removed)[None], self.strength)

    def ablated(
        self, directions: list[Direction], harmful: range, harmless: range, progress: Progress = silent
    ) -> tuple[Float64Array, Float64Array]:
        """What each direction does when ablated everywhere, on a range of the harmful and of the harmless prompts.

        Returns refusal scores `[directions, harmful]` and first-token KL(base‖ablated) `[directions, harmless]`, nats.
        """
        rows = [self.harmful[i] for i in harmful] + [self.harmless[i] for i in harmless]
        base = self._harmless[list(harmless)]  # computed before the model is changed

        def measure(p: torch.Tensor, prompts: list[int]) -> torch.Tensor:
            which = torch.tensor(prompts, device=p.device) - len(harmful)
            figures = refusal_score(p, self.tokens)
            figures[which >= 0] = kl_divergence(base[which[which >= 0]], p[which >= 0])
            return figures

        found = _figures(self, self._ablate, directions, rows, measure, progress)
        return found[:, : len(harmful)], found[:, len(harmful) :]

    def added(self, direction: Direction) -> Float64Array:
        """`[harmless]` rises of the refusal score with `r` added at the layer it was found at."""
        (scores,) = _figures(self, self._add, [direction], self.harmless, lambda p, _: refusal_score(p, self.tokens))
        base: Float64Array = self.base_harmless.double().cpu().numpy()
        rises: Float64Array = scores - base
        return rises

    def bounded(self, direction: Direction) -> Direction:
        """The direction with the figures that are bounded, on harmless prompts.

        `added` is the mean refusal score with `r` added, `rise` how far that is above the base's, less 1.96 standard
        errors (both only where it must rise), and `kl` the mean first-token KL(base‖ablated) in nats.
        """
        _, (kl,) = self.ablated([direction], range(0), range(len(self.harmless)))
        figures = {"kl": float(kl.mean())}
        if self.induces:
            rises = self.added(direction)
            figures |= {"added": float(self.base["base_harmless"] + rises.mean()), "rise": certain(rises)}
        return dataclasses.replace(direction, scores=direction.scores | figures)

    @cached_property
    def _harmless(self) -> torch.Tensor:
        """The base's log-probabilities `[harmless prompts, d_vocab]`."""
        return first_token_log_probs(self.model, self.harmless, self.batch_size)

    def _ablate(self, directions: Sequence[Direction]) -> AbstractContextManager[None]:
        if directions[0].layers is not None:
            each = torch.from_numpy(np.stack([d.removed for d in directions], 1))
            return ablate(self.model, self.sites, each, self.strength)
        together = torch.from_numpy(np.stack([np.atleast_2d(d.vector) for d in directions]))
        if self.removed is not None:
            before = torch.from_numpy(self.removed).expand(len(directions), -1, -1)
            together = torch.cat([before, together], 1)
        offset = torch.tensor([[d.offset] for d in directions]) if any(d.offset for d in directions) else None
        return ablate(self.model, self.sites, together, self.strength, offset)

    @contextmanager
    def _add(self, directions: Sequence[Direction]) -> Iterator[None]:
        scales = torch.tensor([d.scale for d in directions])[:, None]
        layers = [d.layer or 0 for d in directions]
        with self.begun(), add_vectors(self.model, layers, _stack(directions) * scales):
            yield


def causes(tested: Direction) -> bool:
    """Whether adding a direction raised the refusal score, where it must."""
    return tested.scores.get("rise", 1.0) > 0


def certain(values: Float64Array) -> float:
    """The mean of figures of single prompts less 1.96 standard errors: above 0 it is no accident of the prompts."""
    return float(values.mean() - _CERTAIN * values.std() / len(values) ** 0.5)


def choose(trial: Trial, candidates: list[Direction], max_kl: float, steps: Steps = no_steps) -> Choice:
    """The candidate that lowers the refusal score most within the bounds, and what all others scored.

    After Arditi et al. 2024 (arXiv 2406.11717, appendix C): minimise the refusal score of harmful prompts
    under ablation, such that adding the direction surely raises the score of harmless prompts, and KL stays under
    `max_kl`; of those that bring it to where harmless prompts are, the one of least KL. Rough rounds on a few prompts
    pick the finalists, rows of a batch carrying candidates of their own. The bounds are tested from the lowest ablated
    score upwards until one finalist passes and no other gets so far, so `added`, `rise` and `kl` are known up to there
    only.

    Raises:
        VerifyError: no candidate passes; says which bound failed.
    """
    tested, others, tried = ranked(trial, candidates, max_kl, steps)
    return Choice(_pick(tested, max_kl), tested + others, tried)


def ranked(
    trial: Trial, candidates: list[Direction], max_kl: float, steps: Steps = no_steps
) -> tuple[list[Direction], list[Direction], list[Direction]]:
    """The finalists, lowest ablated score first, in two lists; and all candidates with what they scored in round 1.

    In the first are those whose bounds were tested: all that reach the score of harmless prompts, and others from the
    lowest score upwards until one keeps to the bounds.
    """
    finalists, tried = _finalists(trial, candidates, max_kl, steps)
    step, tested = steps("testing the choice", len(finalists)), list[Direction]()
    for direction in finalists:
        far = direction.scores["ablated"] > direction.scores["base_harmless"]
        if far and any(causes(d) and d.scores["kl"] <= max_kl for d in tested):
            break
        tested.append(trial.bounded(direction))
        step(1)
    step(len(finalists) - len(tested))
    return tested, finalists[len(tested) :], tried


def measure(trial: Trial, direction: Direction) -> Direction:
    """The causal test of one direction that a person named, its figures in `scores`; nothing is bounded."""
    scores, _ = trial.ablated([direction], range(len(trial.harmful)), range(0))
    return trial.bounded(dataclasses.replace(direction, scores=trial.base | {"ablated": float(scores.mean())}))


def _finalists(
    trial: Trial, candidates: list[Direction], max_kl: float, steps: Steps
) -> tuple[list[Direction], list[Direction]]:
    """The candidates with the lowest ablated scores, lowest first, by rounds on more and more prompts; all of round 1.

    Those whose KL is far over the bound on the rounds' harmless prompts come behind all others.
    """
    everything, rounds = len(trial.harmful), list[tuple[range, range, int]]()
    start = 0
    for stop, stay in _ROUNDS:
        rounds.append((range(start, min(stop, everything)), range(start, min(stop, len(trial.harmless))), stay))
        start = stop
    rounds.append((range(start, everything), range(0), _ROUNDS[-1][1]))
    sizes = [len(candidates), *(min(stay, len(candidates)) for *_, stay in rounds)]
    step = steps(
        "choosing the direction",
        sum(n * (len(harmful) + len(harmless)) for n, (harmful, harmless, _) in zip(sizes, rounds, strict=False)),
    )
    scores, costs, tried = np.zeros((len(candidates), 0)), np.zeros((len(candidates), 0)), list[Direction]()
    for harmful, harmless, stay in rounds:
        found = trial.ablated(candidates, harmful, harmless, step)
        scores, costs = (np.concatenate(both, 1) for both in zip((scores, costs), found, strict=True))
        tried = tried or _first_round(trial, candidates, scores)
        best = np.lexsort((scores.mean(1), costs.mean(1) > _SLACK * max_kl))[:stay]
        candidates, scores, costs = [candidates[i] for i in best], scores[best], costs[best]
    finalists = [
        dataclasses.replace(d, scores=trial.base | {"ablated": float(score.mean())})
        for d, score in zip(candidates, scores, strict=True)
    ]
    return finalists, tried


def _first_round(trial: Trial, candidates: list[Direction], scores: Float64Array) -> list[Direction]:
    """The candidates with what they scored on the same few prompts."""
    n = scores.shape[1]
    base = trial.base_harmful[:n].mean().item()
    return [
        dataclasses.replace(d, scores={"base": base, "ablated": float(score.mean()), "prompts": n})
        for d, score in zip(candidates, scores, strict=True)
    ]


def _pick(tested: list[Direction], max_kl: float) -> Direction:
    """The best finalist among those that pass every bound."""
    falls = [d for d in tested if d.scores["ablated"] < d.scores["base_harmful"]]
    if not falls:
        raise VerifyError(
            f"no candidate direction lowers the refusal score when ablated (base "
            f"{tested[0].scores['base_harmful']:.2f}); one direction does not carry this model's refusal"
        )
    causing = [d for d in falls if causes(d)]
    if not causing:
        raise VerifyError(
            "no candidate direction raises the refusal score of harmless prompts when added "
            f"(base {falls[0].scores['base_harmless']:.2f}); what was found is a correlate of refusal, not its cause"
        )
    cheap = [d for d in causing if d.scores["kl"] <= max_kl]
    if not cheap:
        least = min(causing, key=lambda d: d.scores["kl"])
        raise VerifyError(
            f"every candidate that stops refusals moves harmless answers by more than {max_kl} nats (the least: layer "
            f"{least.layer}, position {least.position}, KL {least.scores['kl']:.3f}); raise --max-kl to accept it"
        )
    return min(cheap, key=preference)


def _figures(
    trial: Trial,
    change: Change,
    directions: list[Direction],
    rows: list[list[int]],
    measure: Measure,
    progress: Progress = silent,
) -> Float64Array:
    """`[directions, rows]` figures, with the model changed by each direction.

    All rows of a batch carry directions of their own; the opening that rows share is run once for each direction.
    """
    model, found = trial.model, np.zeros((len(directions), len(rows)))
    if not rows:
        return found
    by_length = sorted(range(len(rows)), key=lambda p: len(rows[p]))

    def todo() -> Iterator[Batch]:
        """Batches whose indices are places in `found`, counted row by row."""
        for start in range(0, len(directions), trial.batch_size):
            block = range(start, min(len(directions), start + trial.batch_size))
            opening = opening_of(model, rows, copies=len(block))
            if opening is not None:
                opening = opening._replace(indices=[d * len(rows) for d in block])
            at_once = max(1, trial.batch_size // len(block))
            for i in range(0, len(rows), at_once):
                prompts = by_length[i : i + at_once]
                places = [d * len(rows) + p for d in block for p in prompts]
                after = [d - start for d in block for _ in prompts]
                yield pad_left(model, [rows[p] for _ in block for p in prompts], places, opening, after)

    def changed(batch: Batch) -> AbstractContextManager[None]:
        return change([directions[place // len(rows)] for place in batch.indices])

    for batch, logits in forward(model, todo(), tokens=1, change=changed, progress=progress):
        figures = measure(log_probs(logits[:, -1]), [place % len(rows) for place in batch.indices])
        found.flat[batch.indices] = figures.double().cpu().numpy()
    return found


def _stack(directions: Sequence[Direction]) -> torch.Tensor:
    """`[rows, d_model]`: the direction of each row."""
    return torch.from_numpy(np.stack([d.vector for d in directions]))
