"""What the base does before anything is measured inside it: which prompts it declines, with which first tokens.

Owns the hand-over between judging text (`evaluate`) and finding directions (`direction`), which must not
know each other. Never reads the test split.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import accumulate, pairwise
from typing import Any

from abliterate.direction.refusal_score import refusal_tokens
from abliterate.errors import NoRefusalError
from abliterate.evaluate.intervals import Interval, wilson
from abliterate.evaluate.refusals import ask
from abliterate.model.load import ChatModel
from abliterate.model.progress import Steps
from abliterate.prompts import PromptSet, Splits, joined

#: Below this share of refusals on harmful prompts there is nothing to find.
LEAST_RATE = 0.05
#: An answer's opening moves fit in this many tokens.
OPENING_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Observation:
    """Indices into train and validation splits: harmful prompts declined, harmless ones answered; refusal tokens."""

    harmful_train: list[int]
    harmful_validation: list[int]
    harmless_train: list[int]
    harmless_validation: list[int]
    tokens: list[int]
    refused: int
    asked: int

    @property
    def rate(self) -> Interval:
        """The base's refusal rate on the train and validation prompts."""
        return wilson(self.refused, self.asked)

    @classmethod
    def from_dict(cls, value: Any) -> Observation:
        """Read what `as_dict` gave.

        Raises:
            ValueError: something else.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(value, dict) or value.keys() != names:
            raise ValueError(f"expected {', '.join(sorted(names))}")
        for name, found in value.items():
            numbers = [found] if name in ("refused", "asked") else found
            if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
                raise ValueError(f"'{name}' is damaged")
        return cls(**value)

    @property
    def as_dict(self) -> dict[str, Any]:
        """The observation as JSON stores it; it holds no text."""
        return asdict(self)


def observe(
    model: ChatModel,
    harmful: Splits,
    harmless: Splits,
    batch_size: int,
    force: bool,
    progress: Steps,
) -> Observation:
    """Ask the train and validation prompts, keep who was declined and which tokens opened refusals.

    Means are then taken over harmful prompts that are declined and harmless ones that are answered
    (Arditi et al. 2024, arXiv 2406.11717, appendix A): the others do not show the contrast.

    Raises:
        NoRefusalError: the base declines almost nothing, and `force` is not given.
    """
    sets = [harmful.train, harmful.validation, harmless.train, harmless.validation]
    step = progress("reading refusals", sum(map(len, sets)))
    together = ask(model, joined(sets), OPENING_TOKENS, batch_size, progress=step)
    answers = [together.part(a, b) for a, b in pairwise(accumulate(map(len, sets), initial=0))]
    declined = [t for a in answers[:2] for t in (a.first_tokens[i] for i in a.refused)]
    answered = [t for a in answers[2:] for t in (a.first_tokens[i] for i in a.answered)]
    asked = len(harmful.train) + len(harmful.validation)
    too_few = len(declined) < LEAST_RATE * asked or len(answers[0].refused) < 2 or not answers[1].refused
    if too_few and not force:
        raise NoRefusalError(
            f"the model refuses {len(declined)} of {asked} harmful prompts ({len(declined) / asked:.0%}): there is "
            f"no refusal to find (at least {LEAST_RATE:.0%} are needed); --force goes on with all prompts"
        )
    if too_few:
        a, b, c, d = (list(range(len(s))) for s in sets)
        return Observation(a, b, c, d, tokens=[], refused=len(declined), asked=asked)
    a, b, c, d = answers[0].refused, answers[1].refused, answers[2].answered, answers[3].answered
    if len(c) < 2 or not d:
        raise NoRefusalError(
            "the model declines or garbles nearly every harmless prompt too, so the two sets do not contrast; "
            "give another set with --harmless"
        )
    return Observation(a, b, c, d, tokens=refusal_tokens(declined, answered), refused=len(declined), asked=asked)


def contrast(observed: Observation, harmful: Splits, harmless: Splits) -> tuple[PromptSet, PromptSet]:
    """The train prompts that the means are taken over: declined harmful ones, answered harmless ones."""
    return harmful.train.take(observed.harmful_train), harmless.train.take(observed.harmless_train)
