"""`run`: the steps in order, each one resumable; and the same steps one by one for the other verbs.

Owns the order and what is handed from step to step; computes nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from abliterate import observe as observing
from abliterate.activations.collect import collect
from abliterate.activations.stats import ActivationStats
from abliterate.checkpoint import Checkpoint, open_checkpoint, resolve_model
from abliterate.checkpoint.scan import require_finite
from abliterate.checkpoint.stream import require_disk
from abliterate.direction import choose as choosing
from abliterate.direction.direction import Direction, candidates, most_separated
from abliterate.edit.apply import apply_edit
from abliterate.edit.plan import EditPlan, Embeddings, plan_edit
from abliterate.errors import AbliterateError, UsageError, VerifyError
from abliterate.evaluate.evaluation import Evaluation, Questions, evaluate_alone, evaluate_pair
from abliterate.model.load import ChatModel, load_model, peak_memory, pick_device, pick_dtype, require_memory
from abliterate.model.progress import Progress, silent
from abliterate.observe import Observation
from abliterate.prompts import PromptSet, Splits, check_contrast, load_prompts, split
from abliterate.prompts.load import Kind, builtin_splits
from abliterate.report.card import write_card
from abliterate.report.record import RunRecord
from abliterate.workspace import Workspace, check_output

#: Most prompts used of each set, unless `--limit` says otherwise.
LIMITS = {"train": 128, "validation": 48, "test": 96}
#: Validation prompts in the causal test, of each kind.
TRIAL_PROMPTS = 32
Steps = Callable[[str, int], Progress]


def _no_steps(_title: str, _total: int) -> Progress:
    return silent


@dataclass(frozen=True)
class Options:
    """Everything that can be set about a run, as resolved; the verbs' options of the same names explain each."""

    harmful: str | None = None
    harmless: str | None = None
    limit: int | None = None
    layer: int | None = None
    position: int | None = None
    strength: float = 1.0
    max_kl: float = choosing.MAX_KL
    embeddings: Embeddings = "edit"
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 32
    max_new_tokens: int = 48
    seed: int = 0
    system_prompt: str | None = None
    chat_template: str | None = None
    evaluate: bool = True
    force: bool = False

    def check(self) -> None:
        """Raise `UsageError` for values that make no sense, before anything is loaded."""
        for name, least in (("limit", 8), ("batch_size", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        if self.layer is not None and self.layer < 0:
            raise UsageError(f"--layer {self.layer}: layers count from 0")
        if self.position is not None and self.position >= 0:
            raise UsageError(f"--position {self.position}: positions are negative, -1 is the prompt's last token")
        if not 0 <= self.strength <= 4:
            raise UsageError(f"--strength {self.strength:g}: expected 0 to 4 (1 removes the direction, 2 reflects)")
        if self.embeddings not in ("edit", "keep"):
            raise UsageError(f"--embeddings {self.embeddings}: expected edit or keep")


def find_model(model: str) -> Path:
    """The folder of MODEL: a folder, a hub id, or `demo`."""
    if model == "demo":
        from abliterate.demo.build import demo_folder

        return demo_folder()
    return resolve_model(model)


def prompt_splits(options: Options) -> tuple[Splits, Splits]:
    """The harmful and the harmless set, split and limited.

    Raises:
        PromptError: a set is empty, unreadable, too small, or the two do not contrast.
    """

    def one(source: str | None, kind: Kind) -> Splits:
        whole = split(load_prompts(source), options.seed) if source is not None else builtin_splits(kind)
        return Splits(*(part.head(options.limit or LIMITS[name]) for name, part in whole._asdict().items()))

    harmful, harmless = one(options.harmful, "harmful"), one(options.harmless, "harmless")
    for a, b in zip(harmful, harmless, strict=True):
        check_contrast(a, b)
    return harmful, harmless


def load(folder: Path, options: Options) -> ChatModel:
    """The model, ready to run as the options say."""
    template = Path(options.chat_template) if options.chat_template else None
    return load_model(
        folder,
        device=options.device,
        dtype=options.dtype,
        system_prompt=options.system_prompt,
        chat_template=template,
    )


def collect_both(
    model: ChatModel,
    checkpoint: Checkpoint,
    observed: Observation,
    harmful: Splits,
    harmless: Splits,
    batch_size: int,
    steps: Steps = _no_steps,
) -> tuple[ActivationStats, ActivationStats]:
    """Step 1 for both sets, over the prompts that show the contrast.

    Raises:
        VerifyError: NaN or infinity in the activations; names the tensor if it comes from the weights.
    """
    sets = observing.contrast(observed, harmful, harmless)
    step = steps("collecting activations", sum(map(len, sets)))
    with _naming_bad_weights(checkpoint):
        first, second = (collect(model, s, batch_size, checkpoint.fingerprint, step) for s in sets)
    return first, second


@contextmanager
def _naming_bad_weights(checkpoint: Checkpoint) -> Iterator[None]:
    """Where activations are not finite, look for the weights that cause it, and name them instead."""
    try:
        yield
    except VerifyError:
        require_finite(checkpoint)
        raise


def select(
    model: ChatModel,
    plan: EditPlan,
    stats: tuple[ActivationStats, ActivationStats],
    observed: Observation,
    harmful: Splits,
    harmless: Splits,
    options: Options,
    steps: Steps = _no_steps,
) -> tuple[Direction, list[Direction]]:
    """Step 2: the direction, by causal test on validation prompts, and the finalists; or the one named by options.

    Raises:
        UsageError: `layer` or `position` is not among the candidates.
        VerifyError: no candidate passes the test.
    """
    named = options.layer is not None or options.position is not None
    deepest = model.n_layers if named else max(1, int(choosing.DEEPEST * model.n_layers))
    found = candidates(*stats, last_layer=deepest)
    found = [d for d in found if options.layer in (None, d.layer) and options.position in (None, d.position)]
    if not found:
        raise UsageError(
            f"--layer {options.layer} --position {options.position}: no such candidate; layers are 0 to "
            f"{model.n_layers - 1}, positions {stats[0].positions[0]} to -1"
        )
    if not observed.tokens:
        return most_separated(found, *stats), []
    rows = [
        model.chat.encode(part.validation.take(kept[:TRIAL_PROMPTS]).prompts)
        for part, kept in ((harmful, observed.harmful_validation), (harmless, observed.harmless_validation))
    ]
    trial = choosing.Trial(model, plan.sites, rows[0], rows[1], observed.tokens, options.batch_size, options.strength)
    if len(found) == 1:
        return choosing.measure(trial, found[0]), []
    step = steps("choosing the direction", choosing.passes(len(found), len(rows[0]), len(rows[1])))
    return choosing.choose(trial, found, options.max_kl, step)


def edit(
    checkpoint: Checkpoint, plan: EditPlan, direction: Direction, out: Path, strength: float, steps: Steps = _no_steps
) -> list[dict[str, Any]]:
    """Steps 3 and 4 into folder `out`; the records of all edited tensors."""
    step = steps("editing weights", len(plan.writers))
    return [asdict(r) for r in apply_edit(checkpoint, plan, direction.vector, out, strength, step)]


def questions(harmful: PromptSet, harmless: PromptSet, options: Options) -> Questions:
    """What the evaluation asks."""
    return Questions(harmful, harmless, options.max_new_tokens, options.batch_size)


def evaluate(model: str, base: str | None = None, options: Options = Options(), steps: Steps = _no_steps) -> Evaluation:  # noqa: B008
    """Refusal rates of a model on the test prompts; against `base` also KL and perplexity.

    Raises:
        AbliterateError: as its kinds say.
    """
    options.check()
    harmful, harmless = prompt_splits(options)
    folders = [find_model(m) for m in (model, base) if m is not None]
    opened = [open_checkpoint(folder) for folder in folders]
    _check_memory(opened, options)
    asked = questions(harmful.test, harmless.test, options)
    edited = load(folders[0], options)
    if base is None:
        return evaluate_alone(edited, asked, steps)
    return evaluate_pair(load(folders[1], options), edited, asked, steps)


def _check_memory(models: list[Checkpoint], options: Options) -> None:
    """Room for all of `models` at once, and half a gigabyte and a tenth for what runs through them."""
    device = pick_device(options.device)
    size = pick_dtype(options.dtype, device).itemsize
    elements = sum(
        t.nbytes * 8 // {"F64": 64, "F32": 32}.get(t.dtype, 16) for c in models for t in c.tensors.values()
    )
    require_memory(int(1.1 * elements * size + 5e8), device)


@dataclass
class _Run:
    """What the steps of one run share: sources, options, results so far and how long each step took."""

    name: str
    checkpoint: Checkpoint
    plan: EditPlan
    harmful: Splits
    harmless: Splits
    options: Options
    work: Workspace
    steps: Steps
    seconds: dict[str, float] = field(default_factory=dict)
    _base: ChatModel | None = None

    @property
    def base(self) -> ChatModel:
        """The base model, loaded when first needed."""
        if self._base is None:
            self.steps("loading the model", 1)(1)
            self._base = load(self.checkpoint.path, self.options)
        return self._base

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """A step's result as plain values: read from an interrupted run, or computed and stored."""
        if not self.work.done(name):
            start = time.monotonic()
            result = compute()
            self.work.write(name, {"result": result, "seconds": round(time.monotonic() - start, 2)})
        stored = self.work.read(name)
        self.seconds[name] = stored["seconds"]
        return stored["result"]

    def observe(self) -> Observation:
        """Which prompts the base declines."""

        def compute() -> dict[str, Any]:
            with _naming_bad_weights(self.checkpoint):
                collect(self.base, self.harmful.train.head(1), 1)  # damaged weights show before they are asked anything
            options = self.options
            found = observing.observe(
                self.base, self.harmful, self.harmless, options.batch_size, options.force, self.steps
            )
            return found.as_dict

        return Observation(**self.step("observe", compute))

    def collect(self, observed: Observation) -> tuple[ActivationStats, ActivationStats]:
        """Step 1."""
        paths = [self.work.steps / f"{kind}.safetensors" for kind in ("harmful", "harmless")]

        def compute() -> None:
            o = self.options
            both = collect_both(
                self.base, self.checkpoint, observed, self.harmful, self.harmless, o.batch_size, self.steps
            )
            for stats, path in zip(both, paths, strict=True):
                stats.save(path)

        self.step("collect", compute)
        first, second = map(ActivationStats.load, paths)
        return first, second

    def select(self, observed: Observation) -> tuple[Direction, list[dict[str, Any]]]:
        """Step 2."""
        path = self.work.records / "directions.safetensors"

        def compute() -> list[dict[str, Any]]:
            stats = self.collect(observed)
            direction, finalists = select(
                self.base, self.plan, stats, observed, self.harmful, self.harmless, self.options, self.steps
            )
            direction.save(path)
            return [f.where for f in finalists]

        finalists = self.step("select", compute)
        return Direction.load(path), finalists

    def edit(self, direction: Direction) -> list[dict[str, Any]]:
        """Steps 3 and 4."""
        strength = self.options.strength
        edits: list[dict[str, Any]] = self.step(
            "edit", lambda: edit(self.checkpoint, self.plan, direction, self.work.folder, strength, self.steps)
        )
        return edits

    def evaluate(self, direction: Direction) -> dict[str, Any]:
        """Before and after, on the test prompts."""
        if not self.options.evaluate:
            return {"metrics": [], "verdicts": {}}

        def compute() -> dict[str, Any]:
            edited = load(self.work.folder, self.options)
            asked = questions(self.harmful.test, self.harmless.test, self.options)
            return asdict(evaluate_pair(self.base, edited, asked, self.steps, direction.vector))

        found: dict[str, Any] = self.step("evaluate", compute)
        return found

    def record(self, given: dict[str, Any]) -> RunRecord:
        """All steps in order, and their record."""
        observed = self.observe()
        direction, finalists = self.select(observed)
        edits = self.edit(direction)
        evaluation = self.evaluate(direction)
        device = pick_device(self.options.device)
        resolved = asdict(self.options) | {
            "device": str(device),
            "dtype": str(pick_dtype(self.options.dtype, device)).removeprefix("torch."),
            "n_layers": self.checkpoint.config["num_hidden_layers"],
        }
        return RunRecord(
            model=self.name,
            model_fingerprint=self.checkpoint.fingerprint,
            given=given,
            resolved=resolved,
            prompts={k: _describe(s) for k, s in (("harmful", self.harmful), ("harmless", self.harmless))},
            direction=direction.where,
            edits=edits,
            kept=self.plan.kept,
            untouched=self.plan.untouched,
            metrics=list(evaluation["metrics"]),
            verdicts=evaluation["verdicts"],
            observed={"refused": observed.refused, "asked": observed.asked, "refusal_tokens": observed.tokens},
            seconds=self.seconds,
            peak_memory_bytes=peak_memory(),
            finalists=finalists,
        )


def _describe(splits: Splits) -> dict[str, Any]:
    return {k: {"name": s.name, "n": len(s), "sha256": s.sha256} for k, s in splits._asdict().items()}


def run(
    model: str,
    output: str | Path,
    *,
    resume: bool = False,
    steps: Steps = _no_steps,
    **options: Any,
) -> RunRecord:
    """Find the refusal direction of `model`, project it out, save the result to `output`, measure what changed.

    Takes the fields of `Options` as keywords. `output` appears only when all is done; an interrupted run
    leaves `output.partial`, which `resume=True` takes up. Returns the record that is also in
    `output/abliteration/run.json`.

    Raises:
        AbliterateError: as its kinds say.
    """
    chosen = Options(**options)
    chosen.check()
    out = Path(output).expanduser()
    check_output(out, None)
    harmful, harmless = prompt_splits(chosen)
    source = find_model(model)
    check_output(out, source)
    checkpoint = open_checkpoint(source)
    plan = plan_edit(checkpoint, chosen.embeddings)
    settings = asdict(chosen) | {"model": checkpoint.fingerprint, "prompts": [_describe(harmful), _describe(harmless)]}
    settings["force"] = None  # going on after "there is no refusal" is a resume like any other
    require_disk(out.parent, int(1.02 * sum((source / f).stat().st_size for f in checkpoint.shards + checkpoint.side_files)))
    _check_memory([checkpoint] * (2 if chosen.evaluate else 1), chosen)
    work = Workspace(out, source, settings, resume)
    this = _Run(model, checkpoint, plan, harmful, harmless, chosen, work, steps)
    try:
        record = this.record({"model": model, "output": str(output), "resume": resume, **options})
    except AbliterateError:
        work.discard_if_new()
        raise
    finish(work, record)
    return record


def finish(work: Workspace, record: RunRecord) -> None:
    """Write record and card (the base's own card is kept beside the record), then publish."""
    readme = work.folder / "README.md"
    if readme.exists():
        readme.rename(work.records / "base-README.md")
    write_card(record, work.output.name, readme)
    record.save(work.records / "run.json")
    work.publish()
