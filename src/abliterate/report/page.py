"""The page: one HTML file that opens from disk, without a network and without scripts if need be.

Owns what stands where on it, and the sentence that says what was done; never computes a figure.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from abliterate.report import measured, panels
from abliterate.report.command import command
from abliterate.report.figures import counted, judged_by, strengths, unjudged, warnings
from abliterate.report.layers import single_prompts
from abliterate.report.panels import Panel
from abliterate.report.record import RunRecord

#: What is said of the harmful, harmless and borderline test prompts, how its figures are written, and their names.
_LEADS = (
    ("refusals", "{:.1%}", ("refusal_rate", "false_refusal_rate", "borderline_refusal_rate")),
    ("the refusal score", "{:.2f}", ("refusal_score", "refusal_score_harmless", "refusal_score_borderline")),
)
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """Panels that belong together; `missing` says why there are none."""

    name: str
    title: str
    panels: Sequence[Panel]
    missing: str
    wide: bool = True


def page(record: RunRecord, name: str, *, unfinished: bool = False) -> str:
    """The page of one run, finished or not, called `name`."""
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        r=record, name=name, unfinished=unfinished, lead=lead(record), judge=judged_by(record.metrics),
        warnings=_warnings(record), sections=sections(record, unfinished), environment=environment_of(record),
        prompts=prompt_rows(record), command=command(record.given), script=Markup(script), digest=digest,  # noqa: S704  our own file
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704
    )  # fmt: skip


@cache
def _template() -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    return environment.from_string((_HERE / "page.html.j2").read_text(encoding="utf-8"))


def lead(record: RunRecord) -> str:
    """What was done, in one sentence."""
    where, model = record.direction, record.hub_id or Path(record.model).name or record.model
    if not where:
        return f"No direction has been chosen for {model} yet."
    if where.get("layer") is None:
        rank = where.get("rank", 1)
        what = "A direction" if rank == 1 else f"The span of {rank} directions"
        found = f"{what} of the residual stream ({where['method']})"
    else:
        layers = record.resolved.get("n_layers")
        of = f" (of 0 to {layers - 1})" if layers else ""
        what = "The direction of false refusals" if record.keeps else "The refusal direction"
        if where.get("rank", 1) > 1:
            what = f"The span of {where['rank']} refusal directions, the first"
        found = f"{what} found at layer {where['layer']}{of}, position {panels.minus(where['position'])},"
    if not record.edits:
        return f"{found} is chosen for {model}; no weight has been edited yet."
    adapter = record.resolved.get("format") == "adapter"
    if record.strengthens:
        verb = "is strengthened by a LoRA adapter for" if adapter else "was strengthened in"
    else:
        verb = "is taken out by a LoRA adapter for" if adapter else "was projected out of"
    done = f"{found} {verb} {len(record.edits)} tensors of {model} at {strengths(record)}"
    for called, form, names in _LEADS:
        told = [
            f"of {m['n']} {kind} test prompts went from {form.format(m['base'])} to {form.format(m['edited'])}"
            for kind, name in zip(measured.KINDS, names, strict=True)
            if (m := record.metric(name)) is not None and None not in (m["base"], m["edited"])
        ]
        if told:  # where true refusals are to rise or to stay, the other two sets tell as much
            whole = record.strengthens or record.keeps
            return f"{done}: {called} {', '.join(told if whole else told[:1])}."
    return f"{done}; what that does to its answers was not measured."


def _warnings(record: RunRecord) -> list[str]:
    """What a reader must know before trusting the figures, with what tables say of answers by themselves."""
    found = warnings(record)
    counts = [sum(v.get("broken", 0) for v in record.verdicts.get(who, {}).values()) for who in ("base", "edited")]
    if counts[1] > counts[0]:
        found.append(f"More answers are broken text, neither refusal nor answer: {counted(record.verdicts, 'broken')}.")
    if left_out := unjudged(record.verdicts):
        found.append(f"Answers without a verdict, left out of the rates: {left_out}.")
    return found


def sections(record: RunRecord, unfinished: bool) -> list[Section]:
    """Everything that is drawn, in the order of reading; sections without numbers say so."""
    r = record
    old = "The run has not come this far." if unfinished else "This record holds no numbers for it: {}."

    def section(name: str, title: str, why: str, *found: Panel | None, wide: bool = True) -> Section:
        return Section(name, title, [p for p in found if p is not None], old.format(why), wide)

    which = "first direction" if r.direction.get("rank", 1) > 1 else "direction"
    earlier = "it was made by an edit alone, or by an earlier version"
    return [
        section("result", "Before and after", "nothing was measured", measured.before_after(r)),
        section("direction", "Where the direction was found", earlier, panels.separation(r), panels.fall(r),
                panels.finalists(r), panels.controls(r)),
        section("front", "What tuning passed", r.front.get("why_not") or earlier, panels.front(r)),
        section("along", f"Both sets along the {which}", earlier, panels.projected(r), single_prompts(r)),
        section("weights", "What was added to the weights" if r.strengthens else "What was taken out of the weights",
                "nothing was edited", panels.removed(r),
                panels.leaks(r)),
        section("categories", "Refusals by category", "no answers were compared, or the prompts name no categories",
                *(measured.categories(r, kind) for kind in measured.KINDS), measured.verdicts(r),
                wide=False),
        section("budgets", "Refusals by length of the answer", "no answers of more than 8 tokens were written, or "
                "they were judged by an endpoint or an earlier version", measured.budgets(r), wide=False),
        section("cost", "How far answers moved", "nothing was measured, or by an earlier version",
                measured.moved(r, "kl_first_token"), measured.moved(r, "kl_continuation"), wide=False),
    ]  # fmt: skip


def environment_of(record: RunRecord) -> list[tuple[str, str]]:
    """With what the run was made."""
    r = record
    pairs = [
        ("made", r.created),
        ("abliterate", r.version),
        ("Python", r.python),
        *((name, version) for name, version in r.packages.items()),
        ("device, type", ", ".join(str(r.resolved[k]) for k in ("device", "dtype") if r.resolved.get(k)) or "–"),
        ("seed", str(r.resolved.get("seed", "–"))),
        ("peak memory", f"{r.peak_memory_bytes / 1e9:.1f} GB" if r.peak_memory_bytes else "–"),
        ("time", ", ".join(f"{step} {s:.0f} s" for step, s in r.seconds.items()) or "–"),
        ("base fingerprint", r.model_fingerprint),
        ("prompts declined by the base", f"{r.observed['refused']} of {r.observed['asked']}" if r.observed else "–"),
    ]
    return [(name, value) for name, value in pairs if value != "–"]


def prompt_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """Name, size and hash of every part of all prompt sets."""
    return [
        (f"{kind}, {part}", str(found["n"]), found["sha256"][:16])
        for kind, parts in record.prompts.items()
        for part, found in parts.items()
    ]
