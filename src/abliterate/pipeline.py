"""`run`: the steps in order, each one resumable, from a model to an edited checkpoint with its record.

Owns the order and what makes a finished step; computes nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from abliterate import find
from abliterate import steps as step
from abliterate.activations.stats import ActivationStats
from abliterate.at_rest import base_card, check_edited, find_model, finish, write_edited
from abliterate.checkpoint import Checkpoint, hub_name, open_checkpoint
from abliterate.checkpoint.naming import DIRECTIONS
from abliterate.contrast import Contrast, Held, depth
from abliterate.direction.direction import Direction
from abliterate.direction.front import Point, pick
from abliterate.direction.profile import profile
from abliterate.edit.plan import EditPlan
from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluate.judge import Judge
from abliterate.evaluate.text import load_text
from abliterate.formats import Target, check_format, target_of
from abliterate.model.load import ChatModel, pick_device, pick_dtype
from abliterate.model.memory import peak_memory
from abliterate.model.native import AnyModel
from abliterate.model.progress import Steps, no_steps
from abliterate.observe import Observation
from abliterate.options import Options
from abliterate.report.record import RunRecord
from abliterate.roles import Sets, described, prompt_sets
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
    check_format(out, chosen)
    sets = prompt_sets(chosen)
    load_text(chosen.text)  # one that cannot be read, and a judge that may not judge, show before hours of work
    source = find_model(model)
    check_output(out, source)
    checkpoint = open_checkpoint(source)
    target = target_of(out, checkpoint, chosen)
    step.check_site(checkpoint, chosen)
    memory = step.bounded_memory([checkpoint] * (2 if chosen.evaluate else 1), chosen)
    judge = step.pick_judge(chosen, steps)
    settings = asdict(chosen) | {"model": checkpoint.fingerprint, "prompts": sets.fitted}
    settings["asked"] = step.asked_of(chosen)
    # Going on after "there is no refusal", without the comparison or with another one is a resume like any other.
    for name in ("force", "evaluate", "memory", "engine", "judge", "judge_model", "text", "target_refusals"):
        del settings[name]
    settings["max_kl"] = chosen.test_max_kl  # a lower bound takes another point of the same front
    if chosen.keep is None:
        del settings["borderline"]
    with Workspace(out, source, settings, resume, target.files) as work:
        given = {"model": model, "output": str(output), "resume": resume, **options}
        try:
            work.write("given", given)
            at_rest, plan = target.base(checkpoint, work, chosen, steps)
            this = _Run(model, checkpoint, at_rest, target, plan, sets, chosen, work, judge, steps, memory)
            record = this.record(given)
        except AbliterateError:
            work.discard_if_new()
            raise
        finish(work, record)
    return record


@dataclass
class _Run:
    """What the steps of one run share: sources, options, and how long each step took.

    `checkpoint` is what the direction is found in, `at_rest` what it is taken out of: the same, or converted from it.
    """

    name: str
    checkpoint: Checkpoint
    at_rest: Checkpoint
    target: Target
    plan: EditPlan
    sets: Sets
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
            self._base = step.load(self.checkpoint.source, self.options, self.memory)
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
            sets = self.sets
            return step.observe(self.base, self.checkpoint, sets.lose, sets.harmless, o, self.steps).as_dict

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
            both = step.collect_both(
                self.base, self.checkpoint, observed, self.sets.lose, self.sets.harmless, o, self.steps,
                depth(self.checkpoint.n_layers, o), self.work.steps / "unfinished.safetensors",
            )  # fmt: skip
            for stats, path in zip(both, paths, strict=True):
                stats.save(path)

        self.step("collect", compute)
        first, second = map(ActivationStats.load, paths)
        return first, second

    def contrast(self, observed: Observation) -> Contrast:
        """What is to go and what is to stay; with `--keep harmful` the true refusals that are to stay as well."""
        sets, path = self.sets, self.work.steps / "held.safetensors"
        if self.options.keep is None:
            return Contrast(observed, sets.lose, sets.harmless)

        def compute() -> list[list[int]]:
            train, validation, stats = find.hold(self.base, self.plan, sets.harmful, self.options, self.steps)
            stats.save(path)
            return [train, validation]

        found = self.step("hold", compute)
        train, validation = (part.take(i) for part, i in zip(sets.harmful, found, strict=False))
        return Contrast(
            observed,
            sets.lose,
            sets.harmless,
            Held(train, validation, len(sets.harmful.validation), ActivationStats.load(path)),
        )

    def select(
        self, shown: Contrast, stats: tuple[ActivationStats, ActivationStats]
    ) -> tuple[Direction, dict[str, Any]]:
        """Step 2: the direction; what the finalists scored, and tables of all candidates."""
        path = self.work.steps / "selected.safetensors"

        def compute() -> dict[str, Any]:
            choice = find.select(self.base, self.plan, stats, shown, self.options, self.steps)
            choice.direction.save(path)
            charts = profile(choice.direction, *stats, choice.tried)
            where = [d.where for d in choice.finalists]
            return {"finalists": where, "charts": charts, "max_kl": self.options.max_kl}

        found = self.step("select", compute)
        if not isinstance(found, dict) or found.keys() != {"finalists", "charts", "max_kl"}:
            raise self.work.damaged("select.json")
        return Direction.load(path), found

    def tune(
        self, shown: Contrast, stats: tuple[ActivationStats, ActivationStats], chosen: Direction
    ) -> tuple[Direction, dict[str, Any]]:
        """The direction with strengths of its own for every place, picked from the front, and the front's figures.

        The direction as it was, and the reason, where nothing is tuned.
        """

        def compute() -> dict[str, Any]:
            if why_not := find.why_not_tuned(self.base, shown.observed, self.options):
                self.require_same("--max-kl", self.work.read("select")["result"]["max_kl"], self.options.max_kl)
                return {"why_not": find.unless_asked(why_not, self.options), "points": []}
            found = find.tune(self.base, self.plan, chosen, stats, shown, self.options, self.steps)
            for i, point in enumerate(found):
                point.direction.save(self.work.steps / f"tuned-{i}.safetensors")
            return {"why_not": None, "points": [point.figures for point in found]}

        found = self.step("tune", compute)
        if not isinstance(found, dict) or found.keys() != {"why_not", "points"}:
            raise self.work.damaged("tune.json")
        return self.picked(shown, chosen, found)

    def picked(self, shown: Contrast, chosen: Direction, tuned: dict[str, Any]) -> tuple[Direction, dict[str, Any]]:
        """The direction that is taken out, and the front with the pick.

        Raises:
            UsageError: an interrupted run went on with another target or bound.
        """
        o, base_refused = self.options, len(shown.observed.harmful_validation)
        asked = {"target": o.target_refusals, "max_kl": o.max_kl}
        each = [
            Point(Direction.load(self.work.steps / f"tuned-{i}.safetensors"), **figures)
            for i, figures in enumerate(tuned["points"])
        ]

        def compute() -> dict[str, Any]:
            told: dict[str, Any] = {"picked": None, "rule": None, "base_refused": base_refused, **asked}
            if each:
                point, rule = pick(each, each[0], base_refused, o.max_kl, o.target_refusals, shown.least_held)
                told |= {"picked": each.index(point), "rule": rule}
            return told

        found = self.step("pick", compute)
        if not isinstance(found, dict) or found.keys() != {"picked", "rule", "base_refused", *asked}:
            raise self.work.damaged("pick.json")
        self.require_same("--target-refusals", found["target"], o.target_refusals)
        self.require_same("--max-kl", found["max_kl"], o.max_kl)
        direction = chosen if found["picked"] is None else each[found["picked"]].direction
        direction.save(self.work.record(DIRECTIONS))
        return direction, tuned | {name: found[name] for name in ("picked", "rule", "base_refused")}

    def require_same(self, option: str, before: float | None, now: float | None) -> None:
        """Check that an interrupted run goes on with the value of an option that it has used.

        Raises:
            UsageError: it is another.
        """
        if before != now:
            went_on = "without it" if before is None else f"with {before:g}"
            raise UsageError(
                f"{option}: {self.work.folder} went on {went_on}; resume with the same, or delete it to start again"
            )

    def controls(self, shown: Contrast, direction: Direction) -> dict[str, Any]:
        """What other directions do at the same strengths."""

        def compute() -> dict[str, Any]:
            return find.controls(self.base, self.plan, direction, shown, self.options, self.steps)

        found: dict[str, Any] = self.step("controls", compute)
        return found

    def edit(self, direction: Direction) -> list[dict[str, Any]]:
        """Steps 3 and 4."""
        resumed = self.work.done("edit")
        edits: list[dict[str, Any]] = self.step(
            "edit", lambda: write_edited(self.at_rest, self.plan, direction, self.work, self.options, self.steps)
        )
        if resumed and self.options.format != "adapter":
            try:
                check_edited(self.work.result, edits)
            except AbliterateError as error:
                raise self.work.damaged(str(error)) from None
        return edits

    def compared(self) -> tuple[AnyModel, AnyModel]:
        """What was edited, before and after."""
        if self.options.format == "adapter":
            return self.base, step.load(self.checkpoint.source, self.options, adapter=self.work.folder)
        both = self.at_rest, open_checkpoint(self.work.result)
        if step.measured_natively([*both], self.options, self.target.made):
            self._base = None  # as numbers it takes several times the memory of the file
            first, second = (step.load_native(model.source, self.options) for model in both)
            return first, second
        if self.at_rest is not self.checkpoint:
            self._base = None  # so that no more than two are in memory
            self._base = step.load(both[0].source, self.options, self.memory)
        return self.base, step.load(both[1].source, self.options, self.memory)

    def evaluate(self, direction: Direction, tokens: list[int]) -> dict[str, Any]:
        """Before and after, on the test prompts."""
        if not self.options.evaluate:
            return {
                "metrics": [],
                "verdicts": {},
                "charts": {},
                "judge": {},
                "engine": None,
                "borderline": described(self.sets.borderline),
            }

        def compute() -> dict[str, Any]:
            base, edited = self.compared()
            found = step.compare(base, edited, self.sets, self.options, direction, tokens, self.judge, self.steps)
            return asdict(found) | {"borderline": described(self.sets.borderline)}

        found: dict[str, Any] = self.step("evaluate", compute)
        if not {"borderline", "engine"} <= found.keys():
            raise self.work.damaged("evaluate.json")
        return found

    def record(self, given: dict[str, Any]) -> RunRecord:
        """All steps in order, and their record."""
        if self.target.made and not self.work.done("observe"):
            step.check_measurable(self.at_rest, self.options, self.memory, self.sets.harmful)
        observed = self.observe()
        stats = self.collect(observed)
        shown = self.contrast(observed)
        chosen, choice = self.select(shown, stats)
        direction, tuned = self.tune(shown, stats, chosen)
        self.plan = self.plan.weighted(direction.strengths)
        controls = self.controls(shown, direction)
        edits = self.edit(direction)
        evaluation = self.evaluate(direction, observed.tokens)
        device = pick_device(self.options.device)
        resolved = asdict(self.options) | {
            "device": str(device),
            "dtype": str(pick_dtype(self.options.dtype, device)).removeprefix("torch."),
            "engine": evaluation["engine"],
            "type": self.target.type,
            "n_layers": self.checkpoint.n_layers,
        }
        return RunRecord(
            model=self.name,
            hub_id=hub_name(self.name),
            model_fingerprint=self.checkpoint.fingerprint,
            given=given,
            resolved=resolved,
            prompts=self.sets.measured(evaluation["borderline"]),
            direction=direction.where | {"rank": direction.rank},
            edits=edits,
            kept=self.plan.kept,
            untouched=self.plan.untouched,
            tied_head=self.plan.tied_head,
            retyped=dict(self.plan.retyped),
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
            base_card=base_card(self.checkpoint.source),
        )
