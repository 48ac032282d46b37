"""How far a second model moved from a first on harmless prompts: KL divergence and perplexity.

Owns the teacher-forced comparison along the base's own answers; never knows how the second was made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from abliterate.evaluate.intervals import Interval, bootstrap
from abliterate.model.batches import Batch, batches
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent
from abliterate.model.run import forward, kl_divergence, log_probs

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Per prompt, `[n]`: KL at the first token, mean KL along the continuation (nats), and summed −log p of it."""

    kl_first: Float64Array
    kl_continuation: Float64Array
    base_nll: Float64Array
    other_nll: Float64Array
    tokens: Float64Array

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
    base: ChatModel,
    other: ChatModel,
    prompts: list[list[int]],
    continuations: list[list[int]],
    batch_size: int,
    progress: Progress = silent,
) -> Divergence:
    """KL(base‖other) and −log p along `continuations`, the base's own answers to `prompts` (token ids).

    KL is `Σ_t p(t) (log p(t) − log q(t))` from float32 log-softmax over the whole vocabulary, at the
    first answer token and averaged over all answer tokens given.
    """
    width = max(map(len, continuations))
    rows = [p + c for p, c in zip(prompts, continuations, strict=True)]
    out = np.zeros((len(rows), 5))
    # The logits of a whole vocabulary at every answer token are the largest thing here: keep batches small.
    size, keep = max(1, batch_size // 8), width + 1
    base_passes = forward(base, batches(base, rows, size, keep), tokens=keep, progress=progress)
    other_passes = forward(other, batches(other, rows, size, keep), tokens=keep, progress=progress)
    for (first, logits), (_, others) in zip(base_passes, other_passes, strict=True):
        for row, index in enumerate(first.indices):  # one by one: in float32 a batch of these fills gigabytes
            p, q = log_probs(logits[row]), log_probs(others[row]).to(logits.device)
            out[index] = _figures(p, q, kl_divergence(p, q), continuations[index])
        del logits, others  # before the next ones are there
    return Divergence(*(out[:, k].copy() for k in range(5)))


def _figures(p: torch.Tensor, q: torch.Tensor, kl: torch.Tensor, answer: list[int]) -> list[float]:
    """The columns of `Divergence` for one row: log-probabilities `[tokens, d_vocab]` of both, KL `[tokens]` between."""
    n = len(answer)
    # Position −n−1 predicts the first answer token, position −2 the last.
    span = slice(len(kl) - 1 - n, len(kl) - 1)
    target = torch.tensor(answer, device=p.device)[:, None]
    nll = [-(x[span].gather(-1, target)).double().sum().item() for x in (p, q)]
    along = kl[span].double()
    return [along[0].item(), along.mean().item(), *nll, n]


def quantiles(values: Float64Array) -> str:
    """Median and 95th percentile in words: KL has a heavy tail that a mean hides."""
    median, p95 = np.quantile(values, [0.5, 0.95])
    return f"median {median:.3g}, p95 {p95:.3g}"


def leak(
    model: ChatModel, rows: list[list[int]], direction: torch.Tensor, n_positions: int, batch_size: int
) -> Float64Array:
    """`[n]` root mean square over layers and template tokens of `‖r̂ᵀh‖ / ‖h‖` in a real forward pass, per prompt.

    Zero where nothing writes along `r̂` (`[d_model]`, or `[k, d_model]`); √(k/d_model) is what random ones show.
    """
    unit = torch.atleast_2d(direction).to(model.device, torch.float32).T
    total = np.zeros(len(rows))

    def fold(batch: Batch, _layer: int, hidden: torch.Tensor) -> None:
        wanted = hidden[:, -n_positions:].float()
        shares = ((wanted @ unit).norm(dim=-1) / wanted.norm(dim=-1)) ** 2
        total[batch.indices] += shares.mean(-1).double().cpu().numpy()

    for _ in forward(model, batches(model, rows, batch_size, keep=n_positions), on_block=fold, keep=n_positions):
        pass
    share: Float64Array = np.sqrt(total / model.n_layers)
    return share
