"""Print results to a terminal as tables that fit 80 columns. Knows plain results and rich, nothing else."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from abliterate.report.figures import COLUMNS, broken_bounds, counted, judged_by, rows, unjudged
from abliterate.report.record import RunRecord

_NOTES = {
    "refusal_rate": "Refusals: share of harmful prompts declined; false refusals: of harmless ones.",
    "refusal_score": "Refusal score: log-odds that the first token opens a refusal; no answers were written.",
    "perplexity": "KL (nats) and perplexity: on the base's own harmless answers.",
    "leak": "Leak: share of the residual stream along the direction.",
}


def print_metrics(console: Console, metrics: list[dict[str, Any]], verdicts: dict[str, Any]) -> None:
    """The table of figures: before and after, or of one model alone."""
    alone = all(m["base"] is None for m in metrics)
    shown = [i for i, c in enumerate(COLUMNS) if not (alone and c in ("base", "retained"))]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in (COLUMNS[i] for i in shown):
        title = "value" if alone and column == "edited" else column
        table.add_column(title, justify="left" if column == "measure" else "right", no_wrap=column == "retained")
    for row in rows(metrics):
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    notes = [note for name, note in _NOTES.items() if any(m["name"] == name for m in metrics)]
    intervals = "95% intervals, on test prompts nothing was fitted or chosen on."
    if verdicts:
        console.print(f"broken answers (neither refusal nor answer): {counted(verdicts, 'broken')}", highlight=False)
    if left_out := unjudged(verdicts):
        console.print(f"[yellow]unjudged answers (left out of the rates):[/yellow] {left_out}", highlight=False)
    if method := judged_by(metrics):
        notes.append(f"Judged by: {method}.")
    console.print(" ".join([intervals, *notes]), style="dim", markup=False)


def print_direction(console: Console, direction: dict[str, Any], max_kl: float) -> None:
    """Where a direction was found, what its causal test said, and the bounds that it breaks if a person named it."""
    if direction["layer"] is None:
        console.print(f"[bold]direction[/bold] {direction['method']}", highlight=False)
        return
    where = f"layer {direction['layer']}, position {direction['position']}"
    console.print(f"[bold]direction[/bold] {where}: {_scores(direction['scores'])}")
    if failed := broken_bounds(direction["scores"], max_kl):
        console.print(f"[yellow]it fails the causal test:[/yellow] {'; '.join(failed)}")


def print_run(console: Console, record: RunRecord, output: str) -> None:
    """What a finished run has to say: the direction, the edit, the table, where things are."""
    print_direction(console, record.direction, record.resolved["max_kl"])
    if record.direction_from_elsewhere:
        console.print("[yellow]found on another checkpoint[/yellow] than the one that was edited")
    strength = f"{len(record.edits)} tensors, strength {record.resolved['strength']:g}"
    if record.resolved["format"] == "adapter":
        console.print(f"[bold]adapter[/bold] for {strength}; the base is as it was")
    else:
        worst = max((e["leak"] for e in record.edits), default=0.0)
        same = f"{record.untouched + len(record.kept)} tensors byte-identical"
        console.print(f"[bold]edited[/bold] {strength}, largest leak after the cast {worst:.1e}; {same}")
    if record.tied_head is not None:
        console.print(f"[bold]LM head[/bold] {record.tied_head}", highlight=False)
    if record.metrics:
        print_metrics(console, record.metrics, record.verdicts)
    seconds = sum(record.seconds.values())
    memory = f", peak memory {record.peak_memory_bytes / 1e9:.1f} GB" if record.peak_memory_bytes else ""
    console.print(f"{output}: {seconds:.0f} s{memory}", style="dim")


def print_inspection(console: Console, found: dict[str, Any]) -> None:
    """What writes to the stream, what an edit would leave, and what it would take."""
    console.print(
        f"[bold]{found['model_type']}[/bold] {found['n_layers']} layers, d_model {found['d_model']}, "
        f"{found['tensors']} tensors, {size(found['nbytes'])}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("writes to the stream", "tensors", "shape", "type", "size", "behind"):
        table.add_column(title, justify="right" if title in ("tensors", "size") else "left")
    for w in found["writers"]:
        shape = " × ".join(f"[bold]{n}[/bold]" if i == w["axis"] else str(n) for i, n in enumerate(w["shape"]))
        row = (w["role"], str(w["tensors"]), shape, w["dtype"], size(w["nbytes"]), w["behind"] or "–")
        table.add_row(*row)
    console.print(table)
    edited = sum(w["nbytes"] for w in found["writers"])
    console.print(
        f"edited {size(edited)} in {sum(w['tensors'] for w in found['writers'])} tensors along the axis in bold; "
        f"{found['untouched']} read the stream or have no part in it and stay as they are",
        highlight=False,
    )
    for name, why in found["kept"].items():
        console.print(f"kept {name}: {why}", highlight=False)
    if found["tied_head"] is not None:
        console.print(f"LM head: {found['tied_head']}", highlight=False)
    for name in found["left_out"]:
        console.print(f"left out of the result: {name}", highlight=False)
    console.print(
        f"edit: {size(found['disk'])} of disk, {size(found['memory'])} of memory at most, about "
        f"{duration(found['seconds'])} here",
        style="dim",
        highlight=False,
    )


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
    return (
        f"refusal score {scores['base_harmful']:.1f} → {scores['ablated']:.1f} ablated, "
        f"harmless {scores['base_harmless']:.1f} → {scores['added']:.1f} added, KL {scores['kl']:.3f}"
    )
