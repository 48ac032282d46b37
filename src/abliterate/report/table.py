"""Print results to a terminal as tables that fit 80 columns. Knows plain results and rich, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from abliterate.checkpoint import first_part
from abliterate.checkpoint.naming import PAGE, is_gguf, records_of
from abliterate.report.figures import (
    COLUMNS,
    broken_bounds,
    controlled,
    counted,
    judged_by,
    rows,
    settled,
    strengths,
    tuning,
    unjudged,
    warnings,
)
from abliterate.report.layout import print_table, say
from abliterate.report.record import RunRecord

_NOTES = {
    "refusal_rate": "Refusals: share of harmful prompts declined; false refusals: of harmless ones.",
    "borderline_refusal_rate": "Borderline: harmless, though they sound harmful.",
    "refusal_score": "Refusal score: log-odds that the first token opens a refusal; no answers were written.",
    "kl_first_token": "KL (nats): on harmless prompts the base answers; noise: the base against itself, unbatched.",
    "perplexity": "Perplexity: of the base's answers to these.",
    "perplexity_text": "Perplexity, text: of plain text in n windows.",
    "recognition": "Harm recognised: how often a harmful request is rather called harmful than a harmless one, asked "
    "about both; 0.5 is chance.",
    "leak": "Leak: share of the residual stream along the direction.",
}


def print_metrics(
    console: Console,
    metrics: list[dict[str, Any]],
    verdicts: dict[str, Any],
    charts: dict[str, Any],
    engine: str | None = None,
) -> None:
    """The table of figures: before and after, or of one model alone, and what ran them where an `engine` is given."""
    alone = all(m["base"] is None for m in metrics)
    shown = [i for i, c in enumerate(COLUMNS) if not (alone and c in ("base", "retained"))]
    titles = ["value" if alone and COLUMNS[i] == "edited" else COLUMNS[i] for i in shown]
    print_table(console, titles, [[row[i] for i in shown] for row in rows(metrics)], {"measure"})
    notes = [note for name, note in _NOTES.items() if any(m["name"] == name for m in metrics)]
    intervals = "95% intervals, on test prompts nothing was fitted or chosen on."
    if verdicts:
        say(console, f"broken answers (neither refusal nor answer): {counted(verdicts, 'broken')}")
    if budget := settled(charts):
        say(console, budget)
    if left_out := unjudged(verdicts):
        say(console, Text.assemble(("unjudged answers (left out of the rates):", "yellow"), f" {left_out}"))
    if method := judged_by(metrics):
        notes.append(f"Judged by: {method}.")
    if engine is not None:
        notes.append(f"Run by {engine}.")
    say(console, " ".join([intervals, *notes]), style="dim")


def print_direction(console: Console, direction: dict[str, Any], max_kl: float | None = None) -> None:
    """Where a direction was found, what its causal test said, and of bounds with this one which of them it breaks."""
    if direction["layer"] is None:
        say(console, Text.assemble(("direction", "bold"), f" {direction['method']}"))
        return
    before = ", before tuning" if direction.get("strengths") else ""
    for part in direction.get("parts") or [direction]:
        where = f"layer {part['layer']}, position {part['position']}{before}"
        say(console, Text.assemble(("direction", "bold"), f" {where}: {_scores(part['scores'])}"))
    if stopped := direction.get("stopped"):
        say(console, f"no more directions: {stopped}")
    if max_kl is not None and (failed := broken_bounds(direction["scores"], max_kl)):
        say(console, Text.assemble(("it fails the causal test:", "yellow"), f" {'; '.join(failed)}"))


def print_run(console: Console, record: RunRecord, output: str) -> None:
    """What a finished run has to say: the direction, the edit, the table, where it and its page are."""
    print_direction(console, record.direction)
    if others := controlled(record.controls):
        say(console, Text.assemble(("controls", "bold"), f" refusal score {others}"))
    if tuned := tuning(record.front):
        say(console, Text.assemble(("tuned", "bold"), f" {tuned}"))
    adds = " (adds to the direction)" if record.strengthens else ""
    strength = f"{len(record.edits)} tensors, {strengths(record)}{adds}"
    if record.resolved["format"] == "adapter":
        say(console, Text.assemble(("adapter", "bold"), f" for {strength}; the base is as it was"))
    else:
        worst = max((e["leak"] for e in record.edits), default=0.0)
        same = f"{record.untouched + len(record.kept)} tensors byte-identical"
        say(console, Text.assemble(("edited", "bold"), f" {strength}, largest leak after the cast {worst:.1e}; {same}"))
    if record.converted:
        say(console, Text.assemble(("converted", "bold"), f" to {record.converted} first; the base is the model in it"))
    if record.retyped:
        types = ", ".join(sorted(set(record.retyped.values())))
        say(
            console, Text.assemble(("in another type", "bold"), f" {len(record.retyped)} of these tensors, now {types}")
        )
    if record.tied_head is not None:
        say(console, Text.assemble(("LM head", "bold"), f" {record.tied_head}"))
    if record.metrics:
        print_metrics(console, record.metrics, record.verdicts, record.charts, record.resolved.get("engine"))
    for warning in warnings(record):
        say(console, Text(warning, "yellow"))
    seconds = sum(record.seconds.values())
    memory = f", peak memory {record.peak_memory_bytes / 1e9:.1f} GB" if record.peak_memory_bytes else ""
    made = first_part(Path(output).expanduser())
    charts = f"charts {'beside' if is_gguf(made.name) else 'in'} it, in {records_of(made.name)}/{PAGE}"
    say(console, f"{made}: {seconds:.0f} s{memory}; {charts}", style="dim")


def print_resistance(console: Console, found: dict[str, Any]) -> None:
    """The curve of refusals over the number of directions, found and random, and the figure that sums it up."""
    titles = ("k", "refusals", "broken", "KL, first", "KL, along", "random: refusals", "KL")
    rows = [("0", _share(found["base"]["refusals"]), str(found["base"]["broken"]), "–", "–", "", "")]
    for p, q in zip(found["found"], found["random"], strict=True):
        own = [f"{k[0]:.3f}{'*' if k[0] > found['max_kl'] else ''}" for k in (p["kl_first"], q["kl_first"])]
        along = f"{p['kl_continuation'][0]:.3f}"
        k, broken = (str(p[name]) for name in ("directions", "broken"))
        rows.append((k, _share(p["refusals"]), broken, own[0], along, _share(q["refusals"]), own[1]))
    print_table(console, titles, rows, ())
    figure, control = found["resistance"], found["control"]
    said = f" {_share(figure['survives'])} of {figure['of']} refusals, at k = {figure['directions']}"
    none = "" if control["directions"] else ": no number of them leaves less within the bound"
    random = f"of random directions {_share(control['survives'])}, at k = {control['directions']}{none}"
    say(console, Text.assemble(("resistance", "bold"), f"{said}; {random}"))
    say(
        console,
        "k directions ablated everywhere, each found with those before it ablated. Resistance: of the requests that "
        "the model declines, the least share that any k leaves without an answer (declined, or broken text) at a KL of "
        f"the first token of {found['max_kl']:g} nats or less (* is above). Compare models at equal prompts, judge and "
        "--max-kl. Other ways to remove refusals (training, say) are not tried. "
        f"{_test_prompts(found)}",
        style="dim",
    )


def _share(interval: list[float]) -> str:
    return "{:.1%} [{:.1f}, {:.1f}]".format(interval[0], *(100 * bound for bound in interval[1:]))


def _test_prompts(found: dict[str, Any]) -> str:
    return (
        f"95% intervals, on {found['base']['n']} harmful test prompts; KL (nats) on {found['answered']} harmless ones "
        f"that the model answers, noise {found['noise']:.0e}. Judge: {found['judge']['name']}."
    )


def print_inspection(console: Console, found: dict[str, Any]) -> None:
    """What writes to the stream, what an edit would leave, and what it would take."""
    what = (
        f" {found['n_layers']} layers, d_model {found['d_model']}, {found['tensors']} tensors, {size(found['nbytes'])}"
    )
    say(console, Text.assemble((found["model_type"], "bold"), what))
    titles = ("writes to the stream", "tensors", "shape", "type", "size", "behind")
    writers = [
        (w["role"], str(w["tensors"]), _shape(w), w["dtype"], size(w["nbytes"]), w["behind"] or "–")
        for w in found["writers"]
    ]
    print_table(console, titles, writers, {"writes to the stream", "shape", "type", "behind"})
    edited = sum(w["nbytes"] for w in found["writers"])
    say(
        console,
        f"edited {size(edited)} in {sum(w['tensors'] for w in found['writers'])} tensors along the axis with a *; "
        f"{found['untouched']} read the stream or have no part in it and stay as they are",
    )
    for name, why in found["kept"].items():
        say(console, f"kept {name}: {why}")
    if found["tied_head"] is not None:
        say(console, f"LM head: {found['tied_head']}")
    if found["edited"]:
        say(console, "edited already: this is the result of an edit by abliterate")
    for name in found["left_out"]:
        say(console, f"left out of the result: {name}")
    needs = f"{size(found['disk'])} of disk, {size(found['memory'])} of memory at most"
    say(console, f"edit: {needs}, about {duration(found['seconds'])} here", style="dim")


def _shape(writer: dict[str, Any]) -> Text:
    """The shape, with the axis that lies in the stream marked."""
    numbers = [Text(f"{n}*", "bold") if i == writer["axis"] else Text(str(n)) for i, n in enumerate(writer["shape"])]
    return Text(" × ").join(numbers)


def size(nbytes: int) -> str:
    """Bytes in the unit that leaves one to three digits."""
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= one:
            return f"{nbytes / one:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Seconds, or minutes where they are many."""
    return f"{max(1, seconds):.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _scores(scores: dict[str, float]) -> str:
    if not scores:
        return "chosen without a causal test"
    added = f"harmless {scores['base_harmless']:.1f} → {scores['added']:.1f} added, " if "added" in scores else ""
    return f"refusal score {scores['base_harmful']:.1f} → {scores['ablated']:.1f} ablated, {added}KL {scores['kl']:.3f}"
