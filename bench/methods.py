"""All ways to make an edit side by side, on one model: the same prompts, the same judges, the same KL.

uv run python bench/methods.py MODEL WORK [--only NAME ...] [--harmless 128] [--xstest 120] [...]

MODEL is a folder. Each way is `abliterate run MODEL` with the options below on the built-in prompts, which it is fitted
and chosen on; each result is measured by `bench/measure.py` on prompts of others: harmful_val, harmless_val and XSTest
of ../shared/data. WORK/methods.md is for docs/benchmarks.md; what is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import abliterate
from abliterate.errors import AbliterateError
from bench import measure
from bench.front import interval, percent

#: Name and options of each way. At strength 1 everywhere but for the tuned ones.
WAYS: dict[str, dict[str, Any]] = {
    "projected off the harmless mean": {"tune": False},
    "plain difference": {"tune": False, "method": "difference"},
    "affine": {"method": "affine"},
    "each layer its own": {"method": "per-layer"},
    "column norms kept": {"tune": False, "keep_norms": True},
    "up to 2 directions": {"tune": False, "directions": 2},
    "up to 4 directions": {"tune": False, "directions": 4},
    "embedding left": {"tune": False, "embeddings": "keep"},
    "tuned": {},
    "tuned, plain difference": {"method": "difference"},
    "tuned, up to 2 directions": {"directions": 2},
}


def edited(model: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The result in `folder`, made where it is not there: what was chosen, or why there is none; seconds."""
    told = folder.with_suffix(".json")
    if told.is_file():
        found: dict[str, Any] = json.loads(told.read_text())
        if found["options"] == options and (found["failed"] or folder.is_dir()):
            return found
    for left in (folder, folder.with_name(f"{folder.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    start, failed, chosen = time.monotonic(), None, {}
    try:
        record = abliterate.run(str(model), folder, evaluate=False, undo=False, **options)
        names = ("layer", "position", "rank", "method", "stopped")
        chosen = {name: record.direction[name] for name in names} | {"steps": record.seconds}
    except AbliterateError as error:
        failed = str(error)
    found = {"options": options, "seconds": time.monotonic() - start, "failed": failed, "chosen": chosen}
    told.write_text(json.dumps(found, indent=1) + "\n")
    return found


def table(made: dict[str, dict[str, Any]], figures: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each way, in the order of `WAYS`."""
    sizes = {kind: figures["base"]["refusals"][kind]["rules"]["n"] for kind in figures["base"]["refusals"]}
    head = [
        "way", "directions", f"harmful declined (n {sizes['harmful']})", f"XSTest unsafe (n {sizes['xstest_unsafe']})",
        f"XSTest safe (n {sizes['xstest_safe']})", "KL, first token", "KL, along 32", "perplexity",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, found in {"base": None, **made}.items():
        if found is not None and found["failed"]:
            lines.append(f"| {name} | {' | '.join(['–'] * (len(head) - 1))} |")
            continue
        f = figures["base" if found is None else slug(name)]
        cells = [percent(f["refusals"][kind]["rules"]) for kind in ("harmful", "xstest_unsafe", "xstest_safe")]
        if found is not None:
            cells += [interval(f[k]) for k in ("kl_first", "kl_along")]
            ratio = f["perplexity_ratio"]
            cells.append(f"×{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
        rank = "–" if found is None else str(found["chosen"]["rank"])
        lines.append("| " + " | ".join([name, rank, *cells, *["–"] * (len(head) - 2 - len(cells))]) + " |")
    failed = [f"{name}: no edit ({found['failed']})" for name, found in made.items() if found["failed"]]
    return "\n".join([*lines, "", *failed]) + "\n"


def slug(name: str) -> str:
    """A file's name."""
    return name.replace(",", "").replace(" ", "-")


def main() -> None:
    """Make what is missing, measure what is not measured, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help=", ".join(WAYS))
    measure.add_options(parser)
    parser.set_defaults(xstest=120)
    chosen = parser.parse_args()
    model, work = chosen.model.expanduser().resolve(), chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    made = dict[str, dict[str, Any]]()
    for name in chosen.only:
        made[name] = edited(model, work / slug(name), WAYS[name])
        print(f"{name}: {made[name]['failed'] or 'made'} in {made[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    folders = {slug(name): work / slug(name) for name, found in made.items() if not found["failed"]}
    figures = measure.measure(model, work / "measured", folders, measure.settings_of(chosen))
    (work / "methods.json").write_text(json.dumps({"made": made, "measured": figures}, indent=1) + "\n")
    (work / "methods.md").write_text(table(made, figures), encoding="utf-8")
    print(table(made, figures))


if __name__ == "__main__":
    main()
