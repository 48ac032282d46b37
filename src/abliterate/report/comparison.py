"""Print how two checkpoints or models differ, in 80 columns. Knows plain results and rich, nothing else."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.text import Text

from abliterate.report.layout import print_table, say

#: From this share on, a change is said to be an edit along the shared directions; below the second, to be none.
_ALONG, _HARDLY = 0.9, 0.5


def print_comparison(console: Console, found: dict[str, Any]) -> None:
    """One sentence, the table of changed tensors by kind, and what else differs."""
    say(console, Text.from_markup(sentence(found)))
    if found["changed"]:
        print_table(console, _CHANGED, _kinds(found["changed"]), {"changed"})
    for title in ("added", "missing", "reshaped", "rounded", "unread"):
        if found[title]:
            shown = ", ".join(found[title][:3]) + (" …" if len(found[title]) > 3 else "")
            say(console, Text.assemble((_TITLES[title], "bold"), f" {len(found[title])}: {shown}"))
    for name, lines in found["files"].items():
        say(console, name, style="bold")
        for line in lines:
            say(console, f"  {line}", indent=4)
    if found["writers_known"] is not None:
        say(console, f"which tensors write to the stream is not known: {found['writers_known']}", style="dim")


_CHANGED = ("changed", "tensors", "layers", "rank", "strength", "explained", "cosine")
_TITLES = {
    "added": "only in the other",
    "missing": "only in the base",
    "reshaped": "of another shape",
    "rounded": "changed by rounding alone",
    "unread": "changed, of types that hold no plain numbers",
}


def sentence(found: dict[str, Any]) -> str:
    """What the differences amount to, in words."""
    changed, total = len(found["changed"]), found["same"] + len(found["changed"]) + len(found["rounded"])
    if not changed:
        return f"no tensor of {total + len(found['unread'])} differs by more than rounding"
    k, explained = found["directions"], found["explained"]
    head = f"[bold]{changed} of {total + len(found['unread'])}[/bold] tensors differ; "
    if not k or explained is None:
        return head + "no axis of theirs is as wide as the residual stream"
    what = "one direction of the residual stream" if k == 1 else f"{k} directions of the residual stream"
    if explained < _HARDLY:
        return head + f"{what} explains no more than {explained:.1%} of the change: not an edit along a direction"
    readers = sum(t["role"] is None for t in found["changed"]) if found["writers_known"] is None else 0
    beside = f"; {readers} of them do not write to the stream" if readers else ""
    verb = "explains" if k == 1 else "explain"
    along = f"{what} {verb} [bold]{explained:.1%}[/bold] of the change{beside}"
    if explained >= _ALONG and found["strength"] is None:
        along += "; the base has hardly anything along it: are the two given the wrong way round?"
    elif explained >= _ALONG:
        share = found["strength"]
        along += (
            f"; of what the base has along it, {share:.1%} is gone"
            if share >= 0
            else f"; what the base has along it grew by {-share:.1%}"
        )
    near = found["cosines"]
    told = f"; cosine to the direction given {', '.join(f'{c:.4f}' for c in near)}" if near else ""
    return head + along + told


def _kinds(changed: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row of `_CHANGED` for the tensors of all layers that have the same name."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for t in changed:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", t["tensor"]), []).append(t)
    rows = list[tuple[str, ...]]()
    for kind, tensors in kinds.items():
        layers = [int(m[1]) for t in tensors if (m := re.search(r"\.(\d+)\.", t["tensor"]))]
        span = "" if not layers else f"{min(layers)}–{max(layers)}" if len(layers) > 1 else str(layers[0])
        figures = (_range(tensors, "strength", ".2f"), _range(tensors, "explained", ".0%"))
        name = ".".join(kind.removesuffix(".weight").split(".")[-2:])
        rows.append((name, str(len(tensors)), span, _ranks(tensors), *figures, _range(tensors, "cosine", ".3f")))
    return rows


def _ranks(tensors: list[dict[str, Any]]) -> str:
    ranks = sorted({t["rank"] for t in tensors if t["rank"] is not None})
    texts = [str(r) for r in ranks] + (["more"] if any(t["rank"] is None for t in tensors) else [])
    return texts[0] if len(texts) == 1 else f"{texts[0]}–{texts[-1]}"


def _range(tensors: list[dict[str, Any]], figure: str, form: str) -> str:
    values = [t[figure] for t in tensors if t[figure] is not None]
    if not values:
        return "–"
    low, high = (format(v, form) for v in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def print_benchmarks(console: Console, found: dict[str, Any]) -> None:
    """The table of the field, with what it shows: base, edited, retained share with its interval."""
    rows = []
    for t in found["tasks"]:
        p = t["paired"]
        base, edited, (d, d_low, d_high) = p["base"][0], p["edited"][0], p["difference"]
        kept = "–" if p["retained"] is None else "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in p["retained"]))
        change = f"{100 * d:+.1f} [{100 * d_low:.1f}, {100 * d_high:.1f}]"
        rows.append((t["task"], str(p["n"]), f"{base:.1%}", f"{edited:.1%}", change, kept, t["verdict"]))
    print_table(console, ("task", "n", "base", "edited", "points", "retained, %", "shown"), rows, {"task", "shown"})
    asked = f", at most {found['limit']} questions of each" if found["limit"] else ""
    say(
        console,
        f"95% intervals from pairs of answers{asked}. retained: a loss of {100 * found['margin']:g} points or more is "
        "excluded; lost, gained: a change is shown; all tasks together with an error of 5%.",
        style="dim",
    )
