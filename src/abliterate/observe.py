"""What the base does before anything is measured inside it: which prompts it declines, with which first tokens.

Owns the hand-over between judging text (`evaluate`) and finding directions (`direction`), which must not
know each other. Never reads the test split.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

from abliterate.direction.refusal_score import opening_tokens, refusal_tokens
from abliterate.errors import NoRefusalError, VerifyError
from abliterate.evaluate.intervals import Interval, wilson
from abliterate.evaluate.refusals import ask
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, Steps, silent
from abliterate.model.run import first_token_log_probs
from abliterate.options import Options
from abliterate.prompts import PromptSet, Splits, joined

#: Below this share of refusals on harmful prompts there is nothing to find.
LEAST_RATE = 0.05
#: An answer's opening moves fit in this many tokens.
OPENING_TOKENS = 12


_INDICES = ("harmful_train", "harmful_validation", "harmless_train", "harmless_validation")
_OPENINGS = ("declined", "answered")


@dataclass(frozen=True, slots=True)
class Observation:
    """Indices into train and validation splits: harmful prompts declined, harmless ones answered; refusal tokens.

    `declined` and `answered` are the first tokens of such answers.
    """

    harmful_train: list[int]
    harmful_validation: list[int]
    harmless_train: list[int]
    harmless_validation: list[int]
    tokens: list[int]
    declined: list[int]
    answered: list[int]
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

    def spread(self, part: int, of: int) -> Observation:
        """The same, of every `of`-th prompt from `part` on: its indices are those in the whole sets."""
        indices = {name: [i * of + part for i in getattr(self, name)] for name in _INDICES}
        return replace(self, **indices)  # type: ignore[arg-type]

    @classmethod
    def merged(cls, parts: list[Observation]) -> Observation:
        """What was observed in several parts of the same sets.

        Raises:
            VerifyError: some parts show refusals, and some do not.
            NoRefusalError: refusals and answers open with the same tokens.
        """
        if len({bool(part.tokens) for part in parts}) > 1:
            raise VerifyError(
                "some parts show refusals and others do not (--force went on without); collect in fewer parts"
            )
        lists = {name: [i for part in parts for i in getattr(part, name)] for name in (*_INDICES, *_OPENINGS)}
        tokens = refusal_tokens(lists["declined"], lists["answered"]) if parts[0].tokens else []
        indices = {name: sorted(lists[name]) for name in _INDICES}
        refused, asked = sum(p.refused for p in parts), sum(p.asked for p in parts)
        openings = {name: lists[name] for name in _OPENINGS}
        return cls(**indices, **openings, tokens=tokens, refused=refused, asked=asked)

    @property
    def as_dict(self) -> dict[str, Any]:
        """The observation as JSON stores it; it holds no text."""
        return asdict(self)


def observe(
    model: ChatModel,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    progress: Steps,
) -> Observation:
    """Ask the train and validation prompts, keep who was declined and which tokens opened refusals.

    Means are then taken over harmful prompts that are declined and harmless ones that are answered
    (Arditi et al. 2024, arXiv 2406.11717, appendix A): the others do not show the contrast. Without generation only
    the first token is known: a prompt counts as declined where it is one that opens answers to harmful prompts and
    hardly any to harmless ones.

    Raises:
        NoRefusalError: the base declines almost nothing, and `force` is not given.
    """
    sets = [harmful.train, harmful.validation, harmless.train, harmless.validation]
    step = progress("reading refusals", sum(map(len, sets)))
    parts = list(pairwise(accumulate(map(len, sets), initial=0)))
    asked = len(harmful.train) + len(harmful.validation)
    ask_them = _by_answers if options.generate else _by_first_tokens
    (a, b, c, d), declined, answered = ask_them(model, joined(sets), parts, asked, options.batch_size, step)
    too_few = len(declined) < LEAST_RATE * asked or len(a) < 2 or not b
    if too_few and not options.force and len(declined) >= LEAST_RATE * asked:
        raise NoRefusalError(
            f"of {asked} harmful prompts the model declines {len(a)} for training and {len(b)} for validation, too few "
            "to go on with (2 and 1 are needed); give more prompts, or larger parts of them, or take all with --force"
        )
    if too_few and not options.force:
        raise NoRefusalError(
            f"the model refuses {len(declined)} of {asked} harmful prompts ({len(declined) / asked:.0%}): there is "
            f"no refusal to find (at least {LEAST_RATE:.0%} are needed); run and collect take all prompts with --force"
        )
    if too_few:
        a, b, c, d = (list(range(len(s))) for s in sets)
        return Observation(a, b, c, d, [], declined, answered, refused=len(declined), asked=asked)
    if len(c) < 2 or not d:
        raise NoRefusalError(
            "the model declines or garbles nearly every harmless prompt too, so the two sets do not contrast; "
            "give another set with --harmless"
        )
    tokens = refusal_tokens(declined, answered)
    return Observation(a, b, c, d, tokens, declined, answered, refused=len(declined), asked=asked)


#: Indices declined in the two harmful parts and answered in the two harmless ones; first tokens of either kind.
_Told = tuple[list[list[int]], list[int], list[int]]


def _by_answers(
    model: ChatModel, prompts: PromptSet, parts: list[tuple[int, int]], _asked: int, batch_size: int, step: Progress
) -> _Told:
    """What the judge says of the opening of each answer."""
    together = ask(model, prompts, OPENING_TOKENS, batch_size, progress=step)
    answers = [together.part(start, stop) for start, stop in parts]
    declined = [a.first_tokens[i] for a in answers[:2] for i in a.refused]
    answered = [a.first_tokens[i] for a in answers[2:] for i in a.answered]
    return [a.refused for a in answers[:2]] + [a.answered for a in answers[2:]], declined, answered


def _by_first_tokens(
    model: ChatModel, prompts: PromptSet, parts: list[tuple[int, int]], asked: int, batch_size: int, step: Progress
) -> _Told:
    """Which likeliest first tokens open answers to the first `asked` prompts, the harmful ones, and hardly others."""
    tokens = first_token_log_probs(model, model.chat.encode(prompts.prompts), batch_size, step).argmax(-1).tolist()
    opens = opening_tokens(tokens[:asked], tokens[asked:])
    told = [[i for i, t in enumerate(tokens[start:stop]) if (t in opens) == (start < asked)] for start, stop in parts]
    return told, [t for t in tokens[:asked] if t in opens], [t for t in tokens[asked:] if t not in opens]


def contrast(observed: Observation, harmful: Splits, harmless: Splits) -> tuple[PromptSet, PromptSet]:
    """The train prompts that the means are taken over: declined harmful ones, answered harmless ones."""
    return harmful.train.take(observed.harmful_train), harmless.train.take(observed.harmless_train)


def declined(model: ChatModel, prompts: PromptSet, batch_size: int, progress: Progress = silent) -> list[int]:
    """Indices of the prompts that the model declines, as it runs now, judged as the base's answers were."""
    return ask(model, prompts, OPENING_TOKENS, batch_size, progress=progress).refused
