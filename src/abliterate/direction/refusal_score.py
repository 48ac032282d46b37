"""The refusal score: log-odds that a model's next token opens a refusal, with tokens read off its own refusals.

Owns the choice of those tokens and the score; never judges text (it is told which openings declined).
"""

from __future__ import annotations

from collections import Counter

import torch

from abliterate.errors import NoRefusalError

#: A token belongs to refusals if it opens at least this share of them ...
_SHARE = 0.03
#: ... and is at least this many times likelier to open a refusal than an answer.
_RATIO = 3.0


def opening_tokens(declined: list[int], answered: list[int]) -> list[int]:
    """The first tokens that open many completions of one list, and far fewer of the other; perhaps none."""
    refusals, answers = Counter(declined), Counter(answered)
    found = []
    for token, count in refusals.items():
        share = count / len(declined)
        # One pseudo-count keeps a token that no answer began with from an infinite ratio.
        if share >= _SHARE and share >= _RATIO * (answers[token] + 0.5) / (len(answered) + 1):
            found.append(token)
    return sorted(found)


def refusal_tokens(declined: list[int], answered: list[int]) -> list[int]:
    """The first tokens typical of refusals, from the first tokens of completions that declined and that answered.

    Raises:
        NoRefusalError: refusals and answers open with the same tokens.
    """
    found = opening_tokens(declined, answered)
    refusals, answers = Counter(declined), Counter(answered)
    if not found and refusals:
        token, count = refusals.most_common(1)[0]
        if count / len(declined) > answers[token] / max(1, len(answered)):
            found.append(token)
    if not found:
        raise NoRefusalError(
            "the model's refusals and answers open with the same tokens, so a first-token score cannot tell them "
            "apart; choose a direction yourself with --layer and --position"
        )
    return sorted(found)


def refusal_score(log_probs: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """`[rows]` log-odds `log Σ_{t∈R} p_t − log Σ_{t∉R} p_t` (arXiv 2406.11717, §2.3) from `[rows, d_vocab]`."""
    inside = torch.zeros(log_probs.shape[-1], dtype=torch.bool, device=log_probs.device)
    inside[tokens] = True
    return log_probs[:, inside].logsumexp(-1) - log_probs[:, ~inside].logsumexp(-1)
