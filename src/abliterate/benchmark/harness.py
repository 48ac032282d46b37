"""Run lm-eval's tasks on a model in memory, and keep the score of every question.

Owns lm-eval, which is loaded at first use; never compares models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from abliterate.errors import HubError, UnsupportedError, UsageError
from abliterate.model.load import ChatModel
from abliterate.model.progress import Progress, Steps, no_steps, silent

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

#: Our own task, which needs no network.
BUILT_IN = "abliterate_mcq"
_FOLDER = Path(__file__).parent / "tasks"
#: Of several scores of a question the one that its tasks are usually reported by; else the first.
_USUAL = ("acc_norm", "exact_match", "acc")
#: Of several ways to read an answer the one that fits a chat, which does not end its answers in "####".
_FILTER = "flexible-extract"


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task's questions, larger being better: `{question: score}`, and the part that each belongs to.

    A question is named by its leaf task, number and hash, so that two models' scores can be paired.
    """

    task: str
    metric: str
    scores: dict[str, float]
    parts: dict[str, str]


@cache
def _all_tasks() -> TaskManager:
    """lm-eval's index, which takes seconds to make: it reads thousands of files."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UnsupportedError(
            "benchmarks are run by lm-eval, which is not installed: pip install 'abliterate[bench]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=str(_FOLDER))


class Harness:
    """lm-eval with our task added to its own.

    Raises:
        UnsupportedError: lm-eval is not installed.
    """

    def __init__(self) -> None:
        self._tasks = _all_tasks()

    def check(self, tasks: list[str]) -> None:
        """Check that lm-eval knows all of these tasks and groups.

        Raises:
            UsageError: it does not know one; names those that are spelt alike.
        """
        if not tasks:
            raise UsageError(f"--tasks is empty; expected names of lm-eval's tasks, such as mmlu,gsm8k or {BUILT_IN}")
        for task in tasks:
            if task not in self._tasks.all_tasks:
                alike = get_close_matches(task, self._tasks.all_tasks, 3)
                hint = f"did you mean {', '.join(alike)}?" if alike else "`lm-eval ls tasks` lists them"
                raise UsageError(f"--tasks: lm-eval knows no task {task!r}; {hint}")

    def run(
        self,
        model: ChatModel,
        task: str,
        *,
        limit: int | None,
        batch_size: int,
        cache: Path | None = None,
        steps: Steps = no_steps,
    ) -> TaskScores:
        """The scores of one task, each request a chat of the model's template.

        Args:
            model: whole in memory.
            task: a task or group of lm-eval.
            limit: at most so many questions of each leaf task.
            batch_size: requests at once.
            cache: a path for a database of answered requests, from which an interrupted run goes on.
            steps: makes progress bars.

        Raises:
            HubError: the task's questions could not be had.
            UnsupportedError: it scores no single questions.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        runner = HFLM(
            pretrained=model.model, tokenizer=model.chat.tokenizer, batch_size=batch_size, device=str(model.device)
        )
        try:
            with _bars(steps, task):
                found: Any = lm_eval.simple_evaluate(
                    model=runner, tasks=[task], limit=limit, task_manager=self._tasks, apply_chat_template=True,
                    system_instruction=model.chat.system_prompt, log_samples=True, bootstrap_iters=0,
                    use_cache=None if cache is None else str(cache),
                )  # fmt: skip
        except (ConnectionError, OSError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise HubError(
                f"--tasks {task}: its questions could not be had ({why}); {BUILT_IN} needs no network"
            ) from None
        return _scores(task, found["samples"])


def _scores(task: str, samples: dict[str, list[dict[str, Any]]]) -> TaskScores:
    everything = [(leaf, sample) for leaf, own in samples.items() for sample in own]
    filters = {sample.get("filter", "none") for _, sample in everything}
    read = _FILTER if _FILTER in filters else next(iter(sorted(filters, key=lambda f: f != "none")), "none")
    scores, parts, metric = dict[str, float](), dict[str, str](), ""
    for leaf, sample in everything:
        if sample.get("filter", "none") != read:
            continue
        metric = metric or _metric(task, sample)
        question = f"{leaf}/{sample['doc_id']}/{str(sample['doc_hash'])[:16]}"
        scores[question] = float(sample[metric])
        subject = sample["doc"].get("subject") if isinstance(sample["doc"], dict) else None
        parts[question] = leaf if len(samples) > 1 else str(subject or "")
    return TaskScores(task, metric, scores, parts)


def _metric(task: str, sample: dict[str, Any]) -> str:
    numbers: list[str] = [m for m in sample.get("metrics", ()) if isinstance(sample.get(m), int | float)]
    for name in (*_USUAL, *numbers):
        if name in numbers:
            return name
    raise UnsupportedError(f"--tasks {task}: gives no score for each question, so two models cannot be paired on it")


@contextmanager
def _bars(steps: Steps, title: str) -> Iterator[None]:
    """Let lm-eval's own progress bars report to ours; those of its preparations are left out."""
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    class Bar:
        def __init__(self, things: Iterable[Any] = (), *_: Any, total: int = 0, **__: Any) -> None:
            self._things, self._total = things, total
            self._advance: Progress = silent

        def __iter__(self) -> Iterator[Any]:
            return iter(self._things)

        def update(self, n: int = 1) -> None:
            if self._advance is silent:
                self._advance = steps(title, self._total)
            self._advance(n)

        def close(self) -> None:
            pass

    with ExitStack() as stack:
        for module in (huggingface, model, task):
            stack.enter_context(patch.object(module, "tqdm", Bar))
        yield
