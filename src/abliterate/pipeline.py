"""`run`: the steps in order, each one resumable, from a model to an edited checkpoint with its record.

Owns the order and what makes a finished step; computes nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from abliterate import steps as step
from abliterate.activations.stats import ActivationStats
from abliterate.at_rest import base_card, check_edited, find_model, finish, require_room, write_edited
from abliterate.checkpoint import Checkpoint, hub_name, open_checkpoint
from abliterate.direction.direction import Direction
from abliterate.direction.front import Point, pick
from abliterate.direction.profile import profile
from abliterate.edit.plan import EditPlan, plan_edit
from abliterate.errors import AbliterateError
from abliterate.evaluate.judge import Judge
from abliterate.evaluate.text import load_text
from abliterate.model.load import ChatModel, pick_device, pick_dtype
from abliterate.model.memory import peak_memory
from abliterate.model.progress import Steps, no_steps
from abliterate.observe import Observation
from abliterate.options import Options
from abliterate.prompts import PromptSet, Splits, check_unseen
from abliterate.report.record import RunRecord
from abliterate.workspace import Workspace, check_output


def run(model: str, output: str | Path, *, resume: bool = False, steps: Steps = no_steps, **options: Any) -> RunRecord:
    """Find the refusal direction of `model`, project it out, save the result to `output`, measure what changed.

    Takes the fields of `Options` as keywords. `output` appears only when all is done; an interrupted run
    leaves `output.partial`, which `resume=True` takes up. Returns the record that is also in
    `output/abliteration/run.json`.

    Raises:
        AbliterateError: as its kinds say.
    """
    chosen, out = Options(**options), Path(output).expanduser()
    chosen.check()
    check_output(out, None)
    harmful, harmless = step.prompt_splits(chosen)
    borderline = step.borderline_prompts(chosen, harmful, harmless)
    check_unseen((harmful, harmless), borderline)
    load_text(chosen.text)  # one that cannot be read, and a judge that may not judge, show before hours of work
    source = find_model(model)
    check_output(out, source)
    checkpoint = open_checkpoint(source)
    plan = plan_edit(checkpoint, chosen.embeddings)
    step.check_site(checkpoint, chosen)
    require_room(out, checkpoint)
    memory = step.bounded_memory([checkpoint] * (2 if chosen.evaluate else 1), chosen)
    judge = step.pick_judge(chosen, steps)
    settings = asdict(chosen) | {"model": checkpoint.fingerprint, "prompts": _describe(harmful, harmless)}
    settings["asked"] = step.asked_of(chosen)
    # Going on after "there is no refusal", without the comparison or with another one is a resume like any other.
    for name in ("force", "evaluate", "memory", "borderline", "judge", "judge_model", "text", "target_refusals"):
        del settings[name]
    with Workspace(out, source, settings, resume) as work:
        this = _Run(model, checkpoint, plan, harmful, harmless, borderline, chosen, work, judge, steps, memory)
        given = {"model": model, "output": str(output), "resume": resume, **options}
        try:
            work.write("given", given)
            record = this.record(given)
        except AbliterateError:
            work.discard_if_new()
            raise
        finish(work, record)
    return record


@dataclass
class _Run:
    """What the steps of one run share: sources, options, and how long each step took."""

    name: str
    checkpoint: Checkpoint
    plan: EditPlan
    harmful: Splits
    harmless: Splits
    borderline: PromptSet
    options: Options
    work: Workspace
    judge: Judge
    steps: Steps
    memory: int | None
    seconds: dict[str, float] = field(default_factory=dict)
    _base: ChatModel | None = None

    @property
    def base(self) -> ChatModel:
        """The base model, loaded when first needed."""
        if self._base is None:
            loaded = self.steps("loading the model", 1)
            self._base = step.load(self.checkpoint.path, self.options, self.memory)
            loaded(1)
        return self._base

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """A step's result as plain values: read from an interrupted run, or computed and stored."""
        if not self.work.done(name):
            start = time.monotonic()
            result = compute()
            self.work.write(name, {"result": result, "seconds": round(time.monotonic() - start, 2)})
        stored = self.work.read(name)
        if not isinstance(stored, dict) or stored.keys() != {"result", "seconds"}:
            raise self.work.damaged(f"{name}.json")
        self.seconds[name] = stored["seconds"]
        return stored["result"]

    def observe(self) -> Observation:
        """Which prompts the base declines."""
        o = self.options

        def compute() -> dict[str, Any]:
            return step.observe(self.base, self.checkpoint, self.harmful, self.harmless, o, self.steps).as_dict

        found = self.step("observe", compute)
        try:
            return Observation.from_dict(found)
        except ValueError as error:
            raise self.work.damaged(f"observe.json: {error}") from None

    def collect(self, observed: Observation) -> tuple[ActivationStats, ActivationStats]:
        """Step 1."""
        paths = [self.work.steps / f"{kind}.safetensors" for kind in ("harmful", "harmless")]
        o = self.options

        def compute() -> None:
            depth = step.depth(self.checkpoint.n_layers, o)
            both = step.collect_both(
                self.base,
                self.checkpoint,
                observed,
                self.harmful,
                self.harmless,
                o,
                self.steps,
                depth,
                self.work.steps / "unfinished.safetensors",
            )
            for stats, path in zip(both, paths, strict=True):
                stats.save(path)

        self.step("collect", compute)
        first, second = map(ActivationStats.load, paths)
        return first, second

    def select(
        self, observed: Observation, stats: tuple[ActivationStats, ActivationStats]
    ) -> tuple[Direction, dict[str, Any]]:
        """Step 2: the direction; what the finalists scored, and tables of all candidates."""
        path = self.work.steps / "selected.safetensors"

        def compute() -> dict[str, Any]:
            choice = step.select(
                self.base, self.plan, stats, observed, self.harmful, self.harmless, self.options, self.steps
            )
            choice.direction.save(path)
            charts = profile(choice.direction, *stats, choice.tried)
            return {"finalists": [d.where for d in choice.finalists], "charts": charts}

        found = self.step("select", compute)
        if not isinstance(found, dict) or found.keys() != {"finalists", "charts"}:
            raise self.work.damaged("select.json")
        return Direction.load(path), found

    def tune(
        self, observed: Observation, stats: tuple[ActivationStats, ActivationStats], chosen: Direction
    ) -> tuple[Direction, dict[str, Any]]:
        """The direction with strengths of its own for every place, picked from the front, and the front's figures.

        The direction as it was, and the reason, where nothing is tuned.
        """

        def compute() -> dict[str, Any]:
            if why_not := step.why_not_tuned(self.base, observed, self.options):
                return {"why_not": why_not, "points": []}
            found = step.tune(
                self.base, self.plan, chosen, stats, observed, self.harmful, self.harmless, self.options, self.steps
            )
            for i, point in enumerate(found):
                point.direction.save(self.work.steps / f"tuned-{i}.safetensors")
            return {"why_not": None, "points": [point.figures for point in found]}

        found = self.step("tune", compute)
        if not isinstance(found, dict) or found.keys() != {"why_not", "points"}:
            raise self.work.damaged("tune.json")
        direction, picked, rule = chosen, None, None
        if found["points"]:
            each = [
                Point(Direction.load(self.work.steps / f"tuned-{i}.safetensors"), **figures)
                for i, figures in enumerate(found["points"])
            ]
            point, rule = pick(
                each, each[0], len(observed.harmful_validation), self.options.max_kl, self.options.target_refusals
            )
            direction, picked = point.direction, each.index(point)
        direction.save(self.work.records / "directions.safetensors")
        return direction, found | {"picked": picked, "rule": rule, "base_refused": len(observed.harmful_validation)}

    def controls(self, observed: Observation, direction: Direction) -> dict[str, Any]:
        """What other directions do at the same strengths."""

        def compute() -> dict[str, Any]:
            return step.controls(
                self.base, self.plan, direction, observed, self.harmful, self.harmless, self.options, self.steps
            )

        found: dict[str, Any] = self.step("controls", compute)
        return found

    def edit(self, direction: Direction) -> list[dict[str, Any]]:
        """Steps 3 and 4."""
        resumed = self.work.done("edit")
        edits: list[dict[str, Any]] = self.step(
            "edit", lambda: write_edited(self.checkpoint, self.plan, direction, self.work, self.options, self.steps)
        )
        if resumed and self.options.format == "checkpoint":
            try:
                check_edited(self.work.folder, edits)
            except AbliterateError as error:
                raise self.work.damaged(str(error)) from None
        return edits

    def edited(self) -> ChatModel:
        """The edited model: the result, or the base with the result merged into it."""
        if self.options.format == "checkpoint":
            return step.load(self.work.folder, self.options, self.memory)
        return step.load(self.checkpoint.path, self.options, adapter=self.work.folder)

    def evaluate(self, direction: Direction, tokens: list[int]) -> dict[str, Any]:
        """Before and after, on the test prompts."""
        if not self.options.evaluate:
            return {"metrics": [], "verdicts": {}, "charts": {}, "judge": {}, "borderline": _described(self.borderline)}

        def compute() -> dict[str, Any]:
            edited = self.edited()
            found = step.compare(
                self.base, edited, self.harmful, self.harmless, self.borderline, self.options, direction, tokens,
                self.judge,
                self.steps,
            )  # fmt: skip
            return asdict(found) | {"borderline": _described(self.borderline)}

        found: dict[str, Any] = self.step("evaluate", compute)
        if "borderline" not in found:
            raise self.work.damaged("evaluate.json")
        return found

    def record(self, given: dict[str, Any]) -> RunRecord:
        """All steps in order, and their record."""
        observed = self.observe()
        stats = self.collect(observed)
        chosen, choice = self.select(observed, stats)
        direction, tuned = self.tune(observed, stats, chosen)
        self.plan = self.plan.weighted(direction.strengths)
        controls = self.controls(observed, direction)
        edits = self.edit(direction)
        evaluation = self.evaluate(direction, observed.tokens)
        device = pick_device(self.options.device)
        resolved = asdict(self.options) | {
            "device": str(device),
            "dtype": str(pick_dtype(self.options.dtype, device)).removeprefix("torch."),
            "n_layers": self.checkpoint.n_layers,
        }
        return RunRecord(
            model=self.name,
            hub_id=hub_name(self.name),
            model_fingerprint=self.checkpoint.fingerprint,
            given=given,
            resolved=resolved,
            prompts=_describe(self.harmful, self.harmless) | {"borderline": {"test": evaluation["borderline"]}},
            direction=direction.where,
            edits=edits,
            kept=self.plan.kept,
            untouched=self.plan.untouched,
            tied_head=self.plan.tied_head,
            metrics=list(evaluation["metrics"]),
            verdicts=evaluation["verdicts"],
            judge=evaluation["judge"],
            observed={"refused": observed.refused, "asked": observed.asked, "refusal_tokens": observed.tokens},
            seconds=self.seconds,
            peak_memory_bytes=peak_memory(),
            finalists=choice["finalists"],
            front=tuned,
            controls=controls,
            charts=choice["charts"] | evaluation["charts"],
            base_card=base_card(self.checkpoint.path),
        )


def _describe(harmful: Splits, harmless: Splits) -> dict[str, Any]:
    """Name, size and hash of every part of both sets that a run is fitted on."""
    return {
        kind: {part: _described(prompts) for part, prompts in splits._asdict().items()}
        for kind, splits in (("harmful", harmful), ("harmless", harmless))
    }


def _described(prompts: PromptSet) -> dict[str, Any]:
    return {"name": prompts.name, "n": len(prompts), "sha256": prompts.sha256}
