"""The prompts of a run, and the role of each set: which refusals are to go, what is to stay, what is only measured.

Owns how options name them; never knows models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from abliterate.errors import PromptError
from abliterate.options import LIMITS, Options, parse_part
from abliterate.prompts import PromptSet, Splits, check_contrast, check_unseen, load_prompts, split
from abliterate.prompts.load import Kind, builtin, builtin_splits
from abliterate.prompts.promptset import words


@dataclass(frozen=True)
class Sets:
    """Harmful and harmless prompts in three parts, borderline ones to measure on; `lose` are those to be answered.

    These are the harmful ones, or, where true refusals are to be kept, borderline ones that nothing is measured on.
    """

    harmful: Splits
    harmless: Splits
    borderline: PromptSet
    lose: Splits

    @property
    def described(self) -> dict[str, Any]:
        """Name, size and hash of every part of the sets that a run is fitted on, and of what is measured."""
        known = {"harmful": self.harmful, "harmless": self.harmless}
        if self.lose is not self.harmful:
            known["borderline"] = self.lose
        found = {
            kind: {part: described(prompts) for part, prompts in splits._asdict().items()}
            for kind, splits in known.items()
        }
        found.setdefault("borderline", {})["test"] = described(self.borderline)
        return found

    @property
    def fitted(self) -> dict[str, Any]:
        """What is fitted and chosen on, and measured: a resumed run may name other borderline prompts to measure on."""
        return {k: v for k, v in self.described.items() if k != "borderline" or self.lose is not self.harmful}

    def measured(self, borderline: dict[str, Any]) -> dict[str, Any]:
        """All sets, with the borderline prompts that were measured, by an earlier part of this run perhaps."""
        found = self.described
        found["borderline"]["test"] = borderline
        return found


def described(prompts: PromptSet) -> dict[str, Any]:
    """Name, size and hash of a set."""
    return {"name": prompts.name, "n": len(prompts), "sha256": prompts.sha256}


def prompt_splits(options: Options) -> tuple[Splits, Splits]:
    """The harmful and the harmless set, split and limited.

    Raises:
        PromptError: a set is empty, unreadable, too small, or the two do not contrast.
    """

    def one(source: str | None, kind: Kind) -> Splits:
        if source is None:
            return builtin_splits(kind)
        return split(load_prompts(source), options.seed)

    harmful, harmless = one(options.harmful, "harmful"), one(options.harmless, "harmless")
    check_contrast(harmful.whole, harmless.whole)
    return limited(harmful, options), limited(harmless, options)


def prompt_sets(options: Options) -> Sets:
    """All prompts that options name.

    Raises:
        PromptError: a set is empty, unreadable, too small, two do not contrast, or a test prompt is fitted on.
    """
    harmful, harmless = prompt_splits(options)
    if options.keep is None:
        sets = Sets(harmful, harmless, borderline_prompts(options, harmful, harmless), harmful)
    else:
        given = options.borderline
        whole = builtin_splits("borderline") if given is None else split(load_prompts(given), options.seed)
        check_contrast(whole.whole, harmless.whole)
        check_contrast(harmful.whole, whole.whole)
        lose = limited(whole, options)
        sets = Sets(harmful, harmless, lose.test, lose)
    check_unseen((sets.harmful, sets.harmless, sets.lose), sets.borderline)
    return sets


def borderline_prompts(options: Options, *fitted: Splits) -> PromptSet:
    """The borderline requests: the built-in ones for testing, or all of a person's own, as nothing is fitted on them.

    Requests that another set uses to find or choose a direction are left out.

    Raises:
        PromptError: unreadable, or none is left.
    """
    given = builtin("borderline", "test") if options.borderline is None else load_prompts(options.borderline)
    seen = {words(p) for splits in fitted for part in (splits.train, splits.validation) for p in part.prompts}
    kept = [i for i, p in enumerate(given.prompts) if words(p) not in seen]
    if not kept:
        raise PromptError(f"{given.name}: the direction is found on every prompt in it; give others with --borderline")
    return given.take(kept).head(options.limit or (LIMITS["test"] if options.borderline is None else None))


def limited(splits: Splits, options: Options) -> Splits:
    """At most `--limit` prompts of each split, or as many as `LIMITS` says; of these `--prompts`."""
    heads = [part.head(options.limit or LIMITS[name]) for name, part in splits._asdict().items()]
    if options.prompts is not None:
        part, of = parse_part(options.prompts)
        heads = [head.take(list(range(part, len(head), of))) for head in heads]
    return Splits(*heads)
