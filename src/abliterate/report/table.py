"""Print results to a terminal as tables that fit 80 columns. Knows plain results and rich, nothing else."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from abliterate.report.figures import COLUMNS, rows
from abliterate.report.record import RunRecord


def print_metrics(console: Console, metrics: list[dict[str, Any]]) -> None:
    """The before/after table."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "measure" else "right", no_wrap=column == "retained")
    for row in rows(metrics):
        table.add_row(*row)
    console.print(table)
    console.print(
        "95% intervals, on test prompts nothing was fitted or chosen on. Refusals: share of harmful prompts declined; "
        "false refusals: of harmless ones. KL (nats) and perplexity: on the base's own harmless answers. Leak: share "
        "of the residual stream along the direction.",
        style="dim",
    )


def print_direction(console: Console, direction: dict[str, Any]) -> None:
    """Where a direction was found and what its causal test said."""
    where = f"layer {direction['layer']}, position {direction['position']}"
    console.print(f"[bold]direction[/bold] {where}: {_scores(direction['scores'])}")


def print_run(console: Console, record: RunRecord, output: str) -> None:
    """What a finished run has to say: the direction, the edit, the table, where things are."""
    print_direction(console, record.direction)
    worst = max((e["leak"] for e in record.edits), default=0.0)
    console.print(
        f"[bold]edited[/bold] {len(record.edits)} tensors, strength {record.resolved['strength']:g}, "
        f"largest leak after the cast {worst:.2%}; {record.untouched + len(record.kept)} tensors byte-identical"
    )
    if record.metrics:
        print_metrics(console, record.metrics)
    seconds = sum(record.seconds.values())
    memory = f", peak memory {record.peak_memory_bytes / 1e9:.1f} GB" if record.peak_memory_bytes else ""
    console.print(f"{output}: {seconds:.0f} s{memory}", style="dim")


def _scores(scores: dict[str, float]) -> str:
    if not scores:
        return "chosen without a causal test"
    return (
        f"refusal score {scores['base_harmful']:.1f} → {scores['ablated']:.1f} ablated, "
        f"harmless {scores['base_harmless']:.1f} → {scores['added']:.1f} added, KL {scores['kl']:.3f}"
    )
