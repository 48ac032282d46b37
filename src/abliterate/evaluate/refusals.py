"""Ask a model a prompt set and judge every answer; the texts are dropped, the verdicts kept.

Owns the refusal rate of one model; never knows how the model was made.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from abliterate.evaluate.intervals import Interval, wilson
from abliterate.evaluate.judge import METHOD, Label, judge
from abliterate.model.generate import generate
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, silent
from abliterate.prompts import PromptSet


@dataclass(frozen=True, slots=True)
class Answers:
    """Verdict and first token of each answer, in the order of the prompts; `ids` of the whole answers if kept."""

    labels: tuple[Label, ...]
    first_tokens: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def refused(self) -> list[int]:
        """Indices of the prompts that were declined."""
        return [i for i, label in enumerate(self.labels) if label == "refusal"]

    @property
    def answered(self) -> list[int]:
        """Indices of the prompts that were answered, in whole or in part, by text that is not broken."""
        return [i for i, label in enumerate(self.labels) if label in ("compliance", "partial")]

    def part(self, start: int, stop: int) -> Answers:
        """The answers to prompts `start` to `stop`."""
        return Answers(self.labels[start:stop], self.first_tokens[start:stop], self.ids[start:stop])

    @property
    def counts(self) -> dict[str, int]:
        """How many answers each verdict got."""
        return dict(Counter(self.labels))

    @property
    def rate(self) -> Interval:
        """The share of answers that are refusals, with its Wilson interval."""
        return wilson(len(self.refused), len(self.labels))


def ask(
    model: ChatModel,
    prompts: PromptSet,
    max_new_tokens: int,
    batch_size: int,
    keep_ids: bool = False,
    progress: Progress = silent,
) -> Answers:
    """Greedy answers of at most `max_new_tokens`, judged. Texts leave this function only as verdicts.

    `keep_ids` keeps the token ids (for harmless prompts, whose answers are continued later).
    """
    completions = generate(model, model.chat.encode(prompts.prompts), max_new_tokens, batch_size, progress)
    return Answers(
        tuple(judge(c.text).label for c in completions),
        tuple(c.ids[0] if c.ids else -1 for c in completions),
        tuple(tuple(c.ids) for c in completions) if keep_ids else (),
    )


def method(max_new_tokens: int) -> str:
    """How a rate was taken, for tables and records."""
    return f"{METHOD}, greedy, {max_new_tokens} tokens; Wilson 95%"
