"""A prompt set as a value: its prompts, its hash, its split into train, validation and test.

Owns what makes two prompts the same and which go where; never knows where they came from or models.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from abliterate.errors import PromptError

#: Fewer prompts than this give neither a mean nor a test worth having.
MINIMUM = 8
#: Shares of train, validation and test where a set does not say its own.
SHARES = (0.5, 0.2, 0.3)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts with the category of each ('' where the source names none); `name` says where they came from."""

    name: str
    prompts: tuple[str, ...]
    categories: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the prompts in order, each ended by a zero byte."""
        return hashlib.sha256(b"".join(p.encode() + b"\0" for p in self.prompts)).hexdigest()

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: list[int], name: str | None = None) -> PromptSet:
        """The prompts at `indices`, in that order."""
        return PromptSet(
            name or self.name, tuple(self.prompts[i] for i in indices), tuple(self.categories[i] for i in indices)
        )

    def head(self, limit: int | None) -> PromptSet:
        """At most `limit` prompts, drawn evenly over the set so that categories in file order stay balanced."""
        if limit is None or limit >= len(self):
            return self
        return self.take([i * len(self) // limit for i in range(limit)])


class Splits(NamedTuple):
    """Three disjoint sets: means are fitted on `train`, choices made on `validation`, figures taken on `test`."""

    train: PromptSet
    validation: PromptSet
    test: PromptSet

    @property
    def whole(self) -> PromptSet:
        """All three parts as one set."""
        return joined(self)


def joined(sets: Sequence[PromptSet]) -> PromptSet:
    """All prompts of `sets` in order, under the name of the first."""
    prompts = tuple(p for s in sets for p in s.prompts)
    return PromptSet(sets[0].name, prompts, tuple(c for s in sets for c in s.categories))


def words(prompt: str) -> str:
    """A prompt folded to lower-case words: two prompts equal in these are the same request."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def split(prompts: PromptSet, seed: int) -> Splits:
    """Train, validation and test by `SHARES`, shuffled by `seed`; near-duplicates stay together.

    Prompts that share four fifths of their words go to the same part, so that nothing is tested on a
    paraphrase of what it was fitted on.

    Raises:
        PromptError: fewer than `MINIMUM` prompts, or so many near-duplicates that a part stays empty.
    """
    if len(prompts) < MINIMUM:
        raise PromptError(f"{prompts.name}: {len(prompts)} different prompts; at least {MINIMUM} are needed")
    families = _families(prompts.prompts)
    random.Random(seed).shuffle(families)
    wanted = [share * len(prompts) for share in SHARES]
    parts: list[list[int]] = [[], [], []]
    for family in families:
        # Fill whichever part is furthest from its share.
        target = max(range(3), key=lambda k: (wanted[k] - len(parts[k])) / wanted[k])
        parts[target] += family
    if not all(parts):
        raise PromptError(
            f"{prompts.name}: {len(prompts)} prompts fall into {len(families)} groups of near-duplicates (four "
            "fifths of their words in common), too few to split into three parts; give more different ones"
        )
    return Splits(*(prompts.take(sorted(part), prompts.name) for part in parts))


def _families(prompts: tuple[str, ...], threshold: float = 0.8) -> list[list[int]]:
    """Indices grouped so that prompts of word-set Jaccard similarity at least `threshold` are together."""
    sets = [frozenset(words(p).split()) for p in prompts]
    holders: dict[str, list[int]] = {}
    first: dict[str, int] = {}
    root = list(range(len(prompts)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for i, mine in enumerate(sets):
        # Similar sets share at least one of their rarer words; looking at holders of the long words suffices.
        for j in {j for word in mine for j in holders.get(word, ())[-200:]}:
            if len(mine & sets[j]) >= threshold * len(mine | sets[j]):
                root[find(i)] = find(j)
        root[find(i)] = find(first.setdefault(words(prompts[i]), i))  # however many prompts lie between the two
        for word in mine:
            holders.setdefault(word, []).append(i)
    groups: dict[int, list[int]] = {}
    for i in range(len(prompts)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def check_contrast(harmful: PromptSet, harmless: PromptSet) -> None:
    """Check that the two sets do contrast.

    Raises:
        PromptError: the sets are the same, or share a request.
    """
    if harmful.sha256 == harmless.sha256:
        raise PromptError(f"{harmful.name} and {harmless.name}: the same prompts; there is nothing to contrast")
    shared = sorted({words(p) for p in harmful.prompts} & {words(p) for p in harmless.prompts})
    if shared:
        raise PromptError(
            f"{harmful.name} and {harmless.name}: share {len(shared)} prompts, first {shared[0]!r}; "
            "each request must be in one set only"
        )


def check_unseen(sets: Sequence[Splits], borderline: PromptSet) -> None:
    """Check that no request that figures are taken on is one that something is fitted to or chosen on.

    Raises:
        PromptError: one is.
    """
    seen = {words(p): part.name for splits in sets for part in (splits.train, splits.validation) for p in part.prompts}
    for tested in (*(splits.test for splits in sets), borderline):
        shared = [p for p in map(words, tested.prompts) if p in seen]
        if shared:
            raise PromptError(
                f"{tested.name}: {len(shared)} test prompts are among those the direction is found on, first "
                f"{shared[0]!r} of {seen[shared[0]]}; each request must be in one part of one set"
            )
