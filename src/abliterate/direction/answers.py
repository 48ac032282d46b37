"""What the base says to some prompts, token by token, and how likely it found every token.

Owns the answers as targets for a gradient; never judges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from abliterate.model.batches import batches
from abliterate.model.generate import generate
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent
from abliterate.model.run import along, forward, log_probs

#: The likeliest tokens kept of each distribution; the others count as one.
_LIKELIEST = 256


@dataclass(frozen=True)
class Answered:
    """Prompts with the base's own greedy answers (token ids), and its distributions along them if asked for.

    `likeliest[i]` holds log-probabilities and ids `[tokens, 256]` of the likeliest tokens at every token of answer `i`.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    likeliest: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def rows(self) -> list[list[int]]:
        """Prompt and answer together."""
        return [p + a for p, a in zip(self.prompts, self.answers, strict=True)]

    @property
    def keep(self) -> int:
        """How many of each row's last positions say something about the answer."""
        return max(map(len, self.answers)) + 1

    def take(self, indices: Sequence[int]) -> Answered:
        """Some of them."""
        likeliest = [self.likeliest[i] for i in indices] if self.likeliest else []
        return Answered([self.prompts[i] for i in indices], [self.answers[i] for i in indices], likeliest)


def answered(
    model: ChatModel,
    prompts: list[list[int]],
    tokens: int,
    batch_size: int,
    progress: Progress = silent,
    *,
    distributions: bool = False,
) -> Answered:
    """The model's greedy answers of at most `tokens` tokens, the stop token included where an answer ends."""
    made = generate(model, prompts, tokens, batch_size, progress)
    answers = [c.ids if c.stop is None else [*c.ids, c.stop] for c in made]
    found = Answered(prompts, answers, [])
    return Answered(prompts, answers, _likeliest(model, found, batch_size)) if distributions else found


def _likeliest(model: ChatModel, given: Answered, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = dict[int, tuple[torch.Tensor, torch.Tensor]]()
    size = max(1, batch_size // 8)  # logits at every token are the largest thing here
    for batch, logits in forward(model, batches(model, given.rows, size, given.keep), tokens=given.keep):
        for row, index in enumerate(batch.indices):
            p = log_probs(logits[row, along(given.answers[index])])
            found[index] = p.topk(min(_LIKELIEST, p.shape[-1]), -1)
    return [(found[i][0].clone(), found[i][1].clone()) for i in range(len(given.prompts))]


def divergence_along(likeliest: tuple[torch.Tensor, torch.Tensor], q: torch.Tensor) -> torch.Tensor:
    """`[tokens]` KL(base‖q) in nats, `q` being log-probabilities `[tokens, d_vocab]`; unlikely tokens count as one."""
    p, ids = likeliest
    q = q.gather(-1, ids)
    rest, other = ((1 - x.exp().sum(-1)).clamp_min(1e-7) for x in (p, q))
    found: torch.Tensor = (p.exp() * (p - q)).sum(-1) + rest * (rest.log() - other.log())
    return found
