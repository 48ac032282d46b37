"""`bench`: the same benchmarks of base and edited model, paired question by question.

Owns the order of the work and the result; runs lm-eval through `harness`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from abliterate.benchmark.harness import Harness, TaskScores
from abliterate.benchmark.retention import Paired, paired, verdicts
from abliterate.envelope import enveloped
from abliterate.errors import VerifyError
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, Steps

#: Loss that "retained" excludes, in points of a hundred, fixed before anything is run.
MARGIN = 0.02


@dataclass(frozen=True)
class TaskResult:
    """One task: how the models compare on its questions, what that shows, and the means of its parts."""

    task: str
    metric: str
    paired: Paired
    verdict: str
    parts: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Benchmarks:
    """All tasks of a pair of models; `margin` is the loss that "retained" excludes."""

    base: str
    edited: str
    margin: float
    limit: int | None
    tasks: tuple[TaskResult, ...]

    @property
    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return enveloped("benchmarks", asdict(self))


#: Loads one of the two models, "base" or "edited"; called when it is to run.
Load = Callable[[str], ChatModel]


def score_both(
    harness: Harness, load: Load, tasks: list[str], keep: Any, limit: int | None, batch_size: int, steps: Steps
) -> dict[str, dict[str, TaskScores]]:
    """Scores of both models on all tasks; one model is in memory at a time.

    `keep` is a journal of finished steps (`done`, `read`, `write`, and the folder `steps` for requests answered so
    far): what it has is not run again.
    """
    found: dict[str, dict[str, TaskScores]] = {}
    for which in ("base", "edited"):
        titled = partial(_titled, steps, which)
        model: ChatModel | None = None
        for task in tasks:
            step = f"{which} {task}".replace("/", " ")
            if not keep.done(step):
                model = model or load(which)
                answered = keep.steps / f"{which} answered"
                scores = harness.run(model, task, limit=limit, batch_size=batch_size, cache=answered, steps=titled)
                keep.write(step, asdict(scores))
            found.setdefault(task, {})[which] = TaskScores(**keep.read(step))
        del model
    return found


def _titled(steps: Steps, which: str, title: str, total: int) -> Progress:
    return steps(f"{which} {title}", total)


def benchmarks(
    base: str, edited: str, scores: dict[str, dict[str, TaskScores]], margin: float, limit: int | None
) -> Benchmarks:
    """Pair the scores, and say for each task what they show.

    Raises:
        VerifyError: the models were asked different questions.
    """
    pairs = []
    for task, of in scores.items():
        one, two = of["base"], of["edited"]
        if one.scores.keys() != two.scores.keys() or one.metric != two.metric:
            raise VerifyError(f"{task}: the two models were asked different questions; run both again")
        before, after = (np.array([s.scores[q] for q in one.scores]) for s in (one, two))
        pairs.append(paired(before, after, margin))
    shown = verdicts(pairs)
    return Benchmarks(
        base,
        edited,
        margin,
        limit,
        tuple(
            TaskResult(task, of["base"].metric, pair, verdict, _parts(of["base"], of["edited"]))
            for (task, of), pair, verdict in zip(scores.items(), pairs, shown, strict=True)
        ),
    )


def _parts(base: TaskScores, edited: TaskScores) -> dict[str, dict[str, float]]:
    """Means of leaf tasks or subjects; empty where there is one only."""
    names = sorted(set(base.parts.values()))
    if len(names) < 2:
        return {}
    of = {name: [q for q, part in base.parts.items() if part == name] for name in names}
    return {
        name: {
            "n": len(questions),
            "base": sum(base.scores[q] for q in questions) / len(questions),
            "edited": sum(edited.scores[q] for q in questions) / len(questions),
        }
        for name, questions in of.items()
    }
