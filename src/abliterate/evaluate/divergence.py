"""How far a second model moved from a first on harmless prompts: KL divergence and perplexity.

Owns the teacher-forced comparison along the base's own answers; never knows how the second was made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from abliterate.evaluate.intervals import Interval, bootstrap
from abliterate.model.batches import Batch, batches, pad_left
from abliterate.model.native import AnyModel
from abliterate.model.progress import Progress, silent
from abliterate.model.run import Change, along, forward, kl_divergence, log_probs, unchanged

Float64Array = npt.NDArray[np.float64]


#: Prompts on which the noise floor of KL is taken.
FLOOR_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Divergence:
    """Per prompt, `[n]`: KL at the first token, mean KL along the continuation (nats), and summed −log p of it.

    The floors, of up to `FLOOR_PROMPTS`, are |KL| of the base against itself, prompt by prompt instead of in batches:
    what padding, shared openings and the order of summation make of it. A KL of their size shows nothing.
    """

    kl_first: Float64Array
    kl_continuation: Float64Array
    base_nll: Float64Array
    other_nll: Float64Array
    tokens: Float64Array
    floor_first: Float64Array
    floor_continuation: Float64Array

    @property
    def base_perplexity(self) -> Interval:
        """exp of the base's mean −log p over all tokens of its own answers, bootstrap over prompts."""
        return _perplexity(self.base_nll, self.tokens)

    @property
    def other_perplexity(self) -> Interval:
        """The same of the other model, on the base's answers."""
        return _perplexity(self.other_nll, self.tokens)


def _perplexity(nll: Float64Array, tokens: Float64Array) -> Interval:
    return bootstrap(np.stack([nll, tokens], 1), lambda rows: float(np.exp(rows[:, 0].sum() / rows[:, 1].sum())))


def divergence(
    base: AnyModel,
    other: AnyModel,
    prompts: list[list[int]],
    continuations: list[list[int]],
    batch_size: int,
    progress: Progress = silent,
    change: Change = unchanged,
) -> Divergence:
    """KL(base‖other) and −log p along `continuations`, the base's own answers to `prompts` (token ids).

    `change` is entered while `other` runs, which may then be the base itself.

    KL is `Σ_t p(t) (log p(t) − log q(t))` from float32 log-softmax over the whole vocabulary, at the
    first answer token and averaged over all answer tokens given.
    """
    rows = [p + c for p, c in zip(prompts, continuations, strict=True)]
    out, floors, keep = np.zeros((len(rows), 5)), list[list[float]](), max(map(len, continuations)) + 1
    # The logits of a whole vocabulary at every answer token are the largest thing here: keep batches small.
    size = max(1, batch_size // 8)
    base_passes = forward(base, batches(base, rows, size, keep), tokens=keep, progress=progress)
    other_passes = forward(other, batches(other, rows, size, keep), tokens=keep, change=change, progress=progress)
    again = spread([i for batch in batches(base, rows, size, keep) for i in batch.indices])
    lone_passes = forward(base, lone(base, rows, again), tokens=keep, progress=progress)
    for (first, logits), (_, others) in zip(base_passes, other_passes, strict=True):
        for row, index in enumerate(first.indices):  # one by one: in float32 a batch of these fills gigabytes
            answer = continuations[index]
            span = along(answer)
            p, q = log_probs(logits[row, span]), log_probs(others[row, span]).to(logits.device)
            out[index] = [*_first_and_mean(kl_divergence(p, q)), _nll(p, answer), _nll(q, answer), len(answer)]
            if index in again:
                _, by_itself = next(lone_passes)
                floors.append(_first_and_mean(kl_divergence(p, log_probs(by_itself[0, span]))))
        del logits, others  # before the next ones are there
    return Divergence(*out.T.copy(), *np.abs(floors).T.copy())


def spread(indices: list[int]) -> list[int]:
    """At most `FLOOR_PROMPTS` of them, evenly."""
    return indices[:: -(-len(indices) // FLOOR_PROMPTS)]


def lone(model: AnyModel, rows: list[list[int]], indices: list[int]) -> list[Batch]:
    """Each of these rows by itself: no padding, nothing shared, another order of summation."""
    return [pad_left(model, [rows[i]], [i]) for i in indices]


def _first_and_mean(kl: torch.Tensor) -> list[float]:
    return [kl[0].item(), kl.double().mean().item()]


def _nll(p: torch.Tensor, answer: list[int]) -> float:
    """Summed −log p of an answer, from log-probabilities `[tokens, d_vocab]`."""
    return -p.gather(-1, torch.tensor(answer, device=p.device)[:, None]).double().sum().item()


def quantiles(values: Float64Array) -> str:
    """Median and 95th percentile in words: KL has a heavy tail that a mean hides."""
    median, p95 = np.quantile(values, [0.5, 0.95])
    return f"median {median:.3g}, p95 {p95:.3g}"
