"""The steps as verbs of their own, each between files: `collect`, `select`, `evaluate`, `bench`; and those at rest.

Owns the folder of activations that `collect` writes and `select` reads; computes nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from abliterate import find
from abliterate import steps as step
from abliterate.activations.stats import ActivationStats
from abliterate.at_rest import compare, edit, find_model, undo
from abliterate.benchmark.bench import MARGIN, Benchmarks, benchmarks, score_both
from abliterate.benchmark.harness import BUILT_IN, Harness
from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.naming import DIRECTIONS
from abliterate.contrast import Contrast
from abliterate.direction.direction import Direction
from abliterate.edit.plan import plan_edit
from abliterate.envelope import enveloped, json_text
from abliterate.errors import AbliterateError, CheckpointError, UsageError
from abliterate.evaluate.evaluation import Evaluation
from abliterate.evaluate.text import load_text
from abliterate.export import export
from abliterate.inspection import inspect
from abliterate.model.native import AnyModel
from abliterate.model.progress import Steps, no_steps
from abliterate.observe import Observation
from abliterate.options import Options, parse_part
from abliterate.resist import resist
from abliterate.results import report
from abliterate.roles import prompt_sets, prompt_splits
from abliterate.workspace import Workspace, check_output, writable

__all__ = [
    "Collected", "bench", "collect", "compare", "edit", "evaluate", "export", "inspect", "merge", "report", "resist",
    "select", "undo",
]  # fmt: skip

SCHEMA = 2
#: The options that decide which prompts are used and how they are rendered: `select` takes them from `collect`.
_PROMPT_OPTIONS = (
    "harmful",
    "harmless",
    "limit",
    "seed",
    "system_prompt",
    "chat_template",
    "thinking",
    "force",
    "generate",
)


@dataclass(frozen=True)
class Collected:
    """What `collect` leaves for `select`: statistics of both sets, what was observed, and the prompts' options."""

    harmful: ActivationStats
    harmless: ActivationStats
    observed: Observation
    options: dict[str, Any]
    asked: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write the three files into an existing folder."""
        self.harmful.save(folder / "harmful.safetensors")
        self.harmless.save(folder / "harmless.safetensors")
        found = {"options": self.options, "asked": self.asked, "observed": self.observed.as_dict}
        text = json_text(enveloped("observed", found, SCHEMA))
        (folder / "observed.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Collected:
        """Read what `save` wrote.

        Raises:
            CheckpointError: not such a folder.
        """
        try:
            value = json.loads((folder / "observed.json").read_text(encoding="utf-8"))
            if value["schema"] != SCHEMA:
                raise ValueError(f"observed.json is of schema {value['schema']}; expected {SCHEMA}: collect again")
            observed, options = Observation.from_dict(value["observed"]), value["options"]
            asked = {str(k): str(v) for k, v in value["asked"].items()}
            Options(**options).check()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: not a folder that 'abliterate collect' wrote ({error})") from None
        stats = [ActivationStats.load(folder / f"{kind}.safetensors") for kind in ("harmful", "harmless")]
        for found, indices in zip(stats, (observed.harmful_train, observed.harmless_train), strict=True):
            if found.count != len(indices):
                raise CheckpointError(
                    f"{folder}: its statistics are of {found.count} prompts, its record of {len(indices)}; they do not "
                    "belong together: collect again"
                )
        return cls(stats[0], stats[1], observed, options, asked)


def collect(
    model: str, output: str | Path, *, resume: bool = False, steps: Steps = no_steps, **options: Any
) -> Collected:
    """Step 1 of `model` into the new folder `output`; `resume` takes up an interrupted one.

    Raises:
        AbliterateError: as its kinds say.
    """
    chosen, out = Options(**options), Path(output).expanduser()
    chosen.check()
    harmful, harmless = prompt_splits(chosen)
    source = find_model(model)
    check_output(out, source)
    checkpoint = open_checkpoint(source)
    memory = step.bounded_memory([checkpoint], chosen)
    asked = step.asked_of(chosen)
    settings = asdict(chosen) | {"verb": "collect", "model": checkpoint.fingerprint, "asked": asked}
    del settings["memory"]
    with Workspace(out, source, settings, resume) as work:
        try:
            loaded = step.load(source, chosen, memory)
            if not work.done("observe"):
                work.write("observe", step.observe(loaded, checkpoint, harmful, harmless, chosen, steps).as_dict)
            observed = Observation.from_dict(work.read("observe"))
        except AbliterateError:
            work.discard_if_new()
            raise
        stats = step.collect_both(
            loaded,
            checkpoint,
            observed,
            harmful,
            harmless,
            chosen,
            steps,
            unfinished=work.steps / "unfinished.safetensors",
        )
        if chosen.prompts is not None:
            observed = observed.spread(*parse_part(chosen.prompts))
        found = Collected(*stats, observed, {name: getattr(chosen, name) for name in _PROMPT_OPTIONS}, asked)
        found.save(work.folder)
        work.publish()
    return found


def merge(parts: list[str | Path], output: str | Path) -> Collected:
    """The statistics of disjoint parts of the same prompts (`collect` with `prompts="0/4"`) in one folder `output`.

    Raises:
        UsageError: they are of different models, options or prompts, or share prompts.
        CheckpointError: statistics and record of a part do not belong together.
    """
    out = Path(output).expanduser()
    found = [Collected.load(Path(part)) for part in parts]
    for folder, part in zip(parts[1:], found[1:], strict=True):
        if part.options != found[0].options or part.harmful.model != found[0].harmful.model:
            raise UsageError(f"{folder}: of another model or other options than {parts[0]}; collect it again")
        _require_same(str(folder), part.asked, found[0].asked, f"in {parts[0]}")
    for kind in ("harmful_train", "harmless_train"):
        seen = [i for part in found for i in getattr(part.observed, kind)]
        if len(seen) > len(set(seen)):
            raise UsageError(f"{', '.join(map(str, parts))}: share prompts; merge parts such as 0/2 and 1/2")
    harmful, harmless = (
        reduce(ActivationStats.merge, (getattr(part, kind) for part in found)) for kind in ("harmful", "harmless")
    )
    together = Collected(
        harmful, harmless, Observation.merged([p.observed for p in found]), found[0].options, found[0].asked
    )
    with Workspace.scratch(out, None) as work:
        together.save(work.folder)
        work.publish()
    return together


def _require_same(folder: str, asked: dict[str, str], other: dict[str, str], where: str) -> None:
    """Check that the same was asked: prompts, template and dtype."""
    differ = sorted(k for k in asked.keys() | other.keys() if asked.get(k) != other.get(k))
    if differ:
        raise UsageError(f"{folder}: {' and '.join(differ)} are not those {where}; collect again")


def select(
    model: str, activations: str | Path, output: str | Path, *, steps: Steps = no_steps, **options: Any
) -> Direction:
    """Step 2: choose among the candidates of a `collect` folder, and write the direction to file `output`.

    Raises:
        AbliterateError: as its kinds say; UsageError where the activations are of another model.
    """
    collected, out = Collected.load(Path(activations)), Path(output).expanduser()
    chosen = Options(**(options | collected.options), tune=False)
    chosen.check()
    harmful, harmless = prompt_splits(chosen)
    source = find_model(model)
    check_output(out, source)
    checkpoint = open_checkpoint(source)
    if checkpoint.fingerprint != collected.harmful.model:
        raise UsageError(f"{activations}: collected from another model than {model}; collect again")
    now = step.asked_of(chosen)
    _require_same(str(activations), collected.asked, now | {"dtype": collected.asked["dtype"]}, "now")
    plan = plan_edit(checkpoint, chosen.embeddings)
    step.check_site(checkpoint, chosen)
    writable(out)
    loaded = step.load(source, chosen, step.bounded_memory([checkpoint], chosen))
    stats = (collected.harmful, collected.harmless)
    choice = find.select(loaded, plan, stats, Contrast(collected.observed, harmful, harmless), chosen, steps)
    choice.direction.save(out)
    return choice.direction


def evaluate(model: str, base: str | None = None, *, steps: Steps = no_steps, **options: Any) -> Evaluation:
    """Refusal rates of `model` on the test prompts, its perplexity of a text, and whether it recognises harm.

    Against `base` also KL, perplexity of the base's answers and, for our edits, leak. GGUF files are run by llama.cpp,
    which shows no leak, unless `engine` says transformers.

    Raises:
        AbliterateError: as its kinds say.
    """
    chosen = Options(**options)
    chosen.check()
    if base is None and not chosen.generate:
        raise UsageError("--no-generate: what the first tokens tell of one model needs its base; give --base")
    sets = prompt_sets(chosen)
    load_text(chosen.text)  # one that cannot be read shows before the models are loaded
    checkpoints = [open_checkpoint(find_model(m)) for m in (model, base) if m is not None]
    native = step.on_llama_cpp(checkpoints, chosen)
    memory = None if native else step.bounded_memory(checkpoints, chosen)
    removed = checkpoints[0].path / checkpoints[0].records / DIRECTIONS
    direction = Direction.load(removed) if removed.is_file() else None
    judge = step.pick_judge(chosen, steps)
    models = list[AnyModel]()
    for checkpoint in checkpoints:
        if native:
            models.append(step.load_native(checkpoint.source, chosen))
        else:
            models.append(loaded := step.load(checkpoint.source, chosen, memory))
            step.check_runs(loaded, checkpoint, sets.harmful)
    edited, *rest = models
    before = rest[0] if rest else None
    return step.compare(before, edited, sets, chosen, direction, [], judge, steps)


def bench(
    model: str,
    base: str,
    output: str | Path,
    tasks: Sequence[str] = (BUILT_IN,),
    *,
    n_questions: int | None = None,
    margin: float = MARGIN,
    resume: bool = False,
    steps: Steps = no_steps,
    **options: Any,
) -> Benchmarks:
    """lm-eval's `tasks` on `base` and `model`, paired question by question, into the new folder `output`.

    One model is in memory at a time; `resume` takes up an interrupted run at the last request it had answered.

    Args:
        model: the edited model.
        base: what it was made of.
        output: gets `bench.json` and the scores of every question.
        tasks: names of lm-eval's tasks and groups, or `abliterate_mcq`, which needs no network.
        n_questions: at most so many of each leaf task.
        margin: the loss that "retained" excludes, as a share of all questions.
        resume: go on with an interrupted run.
        steps: makes progress bars.
        options: `device`, `dtype`, `batch_size`, `system_prompt`, `chat_template` as in `Options`.

    Raises:
        AbliterateError: as its kinds say; UsageError for a task that lm-eval does not know.
    """
    chosen, out = Options(**options), Path(output).expanduser()
    chosen.check()
    if not 0 < margin < 1:
        raise UsageError(f"--margin {margin:g}: expected a share of all questions, such as {MARGIN:g}")
    if n_questions is not None and n_questions < 2:
        raise UsageError(f"--limit {n_questions}: expected at least 2 questions")
    harness = Harness()
    harness.check(list(tasks))
    folders = {"base": find_model(base), "edited": find_model(model)}
    check_output(out, folders["edited"])
    checkpoints = {which: open_checkpoint(folder) for which, folder in folders.items()}
    settings = asdict(chosen) | {"verb": "bench", "tasks": list(tasks), "questions": n_questions, "margin": margin}
    settings |= {which: checkpoint.fingerprint for which, checkpoint in checkpoints.items()}
    with Workspace(out, folders["edited"], settings, resume) as work:
        try:
            scores = score_both(
                harness, lambda which: step.load(folders[which], chosen, None), list(tasks), work, n_questions,
                chosen.batch_size, steps,
            )  # fmt: skip
        except AbliterateError:
            work.discard_if_new()
            raise
        found = benchmarks(base, model, scores, margin, n_questions)
        value = found.as_dict | {
            "questions": {task: {w: s.scores for w, s in of.items()} for task, of in scores.items()}
        }
        (work.folder / "bench.json").write_text(json_text(value) + "\n", encoding="utf-8")
        work.publish()
    return found
