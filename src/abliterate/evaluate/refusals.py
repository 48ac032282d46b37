"""Ask a model a prompt set and judge every answer; the texts are dropped, the verdicts kept.

Owns the refusal rate of one model; never knows how the model was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from abliterate.evaluate.budgets import Cuts
from abliterate.evaluate.judge import RULES, Judge, Label
from abliterate.model.generate import Completion, generate
from abliterate.model.native import AnyModel
from abliterate.model.progress import Progress, silent
from abliterate.prompts import PromptSet


@dataclass(frozen=True, slots=True)
class Answers:
    """Verdict and first token of each answer, in the order of the prompts; `ids` of the whole answers if kept.

    A label is None where the judge gave no verdict: such an answer counts neither as a refusal nor as an answer. `cuts`
    are the labels of the answers' first 8, 16, … tokens, if asked for.
    """

    labels: tuple[Label | None, ...]
    first_tokens: tuple[int, ...]
    ids: tuple[tuple[int, ...], ...]
    cuts: Cuts = field(default_factory=dict)

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
        """How many answers each verdict got, and how many got none (`unjudged`)."""
        return dict(Counter(label or "unjudged" for label in self.labels))


def ask(
    model: AnyModel,
    prompts: PromptSet,
    max_new_tokens: int,
    batch_size: int,
    keep_ids: bool = False,
    progress: Progress = silent,
    judge: Judge = RULES,
    cuts: Sequence[int] = (),
) -> Answers:
    """Greedy answers of at most `max_new_tokens`, judged. Texts leave this function only to the judge.

    `keep_ids` keeps the token ids (for harmless prompts, whose answers are continued later). The answers are judged
    anew cut to each number of tokens in `cuts`; one that is no longer than that keeps its label.

    Raises:
        VerifyError: the judge leaves more than a tenth of the answers without a verdict.
    """
    completions = generate(model, model.chat.encode(prompts.prompts), max_new_tokens, batch_size, progress)
    labels = judge(list(zip(prompts.prompts, (c.text for c in completions), strict=True)))
    return Answers(
        tuple(labels),
        tuple(c.ids[0] if c.ids else -1 for c in completions),
        tuple(tuple(c.ids) for c in completions) if keep_ids else (),
        {n: _cut(model, prompts, completions, labels, n, judge) for n in cuts},
    )


def _cut(
    model: AnyModel,
    prompts: PromptSet,
    made: list[Completion],
    labels: list[Label | None],
    n: int,
    judge: Judge,
) -> tuple[Label | None, ...]:
    """The labels of the first `n` tokens of each answer that was `made`."""
    longer = [i for i, c in enumerate(made) if len(c.ids) > n]
    found = judge([(prompts.prompts[i], model.chat.text(made[i].ids[:n])) for i in longer])
    again = dict(zip(longer, found, strict=True))
    return tuple(again.get(i, label) for i, label in enumerate(labels))


def method(judge: Judge, max_new_tokens: int) -> str:
    """How a rate was taken, for tables and records."""
    return f"{judge.name}, greedy, {max_new_tokens} tokens; Wilson 95%"
