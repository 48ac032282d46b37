"""A GGUF edited by moving codes, beside one that is projected and requantised: what is left, and what llama.cpp says.

uv run --extra gguf python bench/gguf.py FILE.gguf WORK [--bf16 RUN] [--edited FILE.gguf]

`abliterate run FILE.gguf -o WORK/out.gguf` makes the edit, timed with nothing else on the machine, and measures it in
llama.cpp (--edited takes one that is there). The same directions and strengths are then taken out of the decoded
matrices, and these are encoded again in their own types by llama.cpp's encoder: WORK/naive.gguf, measured alike. RUN is
the result of the same model's safetensors, whose record has its figures, by transformers. WORK/gguf.md is for
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.pop(0)  # in this script's own folder `gguf` is the script, not the package

import abliterate
from abliterate import verbs
from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint.ggml import encode
from abliterate.checkpoint.ggml_blocks import LAYOUTS
from abliterate.checkpoint.naming import records_of
from abliterate.checkpoint.storage import by_rows, matrices
from abliterate.direction.direction import Direction
from abliterate.edit.apply import removal_of
from abliterate.edit.plan import plan_edit

FIGURES = {
    "refusal_rate": "refusals", "false_refusal_rate": "false refusals", "borderline_refusal_rate": "false, borderline",
    "kl_first_token": "KL, first token", "kl_continuation": "KL, along answer", "perplexity": "perplexity",
}  # fmt: skip


def requantised(base: Path, direction: Direction, out: Path) -> dict[str, list[float]]:
    """Write the base, every writer decoded, projected and encoded anew; the shares that are left, by type."""
    shutil.copyfile(base, out)
    checkpoint = open_checkpoint(out)
    plan = plan_edit(checkpoint).weighted(direction.strengths)
    left: dict[str, list[float]] = defaultdict(list)
    fd = os.open(out, os.O_RDWR)
    try:
        for writer in plan.writers:
            tensor = checkpoint.tensors[writer.tensor]
            removal, squares = removal_of(checkpoint, writer, direction.removed, 1.0), np.zeros(2)
            d = removal.basis.astype(np.float32)
            for matrix in matrices(checkpoint, tensor, writer.axis):
                rows = np.arange(matrix.rows)
                w = matrix.values(fd, rows).astype(np.float32)
                turned = by_rows(tensor, writer.axis)
                component = w @ d if turned else d.T @ w
                wanted = (1 - removal.strength) * component
                w -= removal.strength * (component @ d.T if turned else d @ component)
                raw = (
                    encode(w, tensor.dtype, matrix.row_bytes)
                    if tensor.dtype in LAYOUTS
                    else matrix.codec.round(w, rows)
                )
                matrix.write(fd, rows, raw)
                now = matrix.values(fd, rows).astype(np.float32)
                squares += [np.square((now @ d if turned else d.T @ now) - wanted).sum(), np.square(component).sum()]
            left[tensor.dtype].append(float(np.sqrt(squares[0] / squares[1])))
    finally:
        os.close(fd)
    return left


def cell(metric: dict[str, Any], side: str) -> str:
    """A figure with its interval."""
    value, low, high = (metric[f"{side}{end}"] for end in ("", "_low", "_high"))
    if metric["name"].endswith("rate"):
        return f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def table(columns: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A row for each figure; the base's own where it has one."""
    first = next(iter(columns.values()))
    lines = ["| measure | n | base | " + " | ".join(columns) + " |", "| --- " * (3 + len(columns)) + "|"]
    for name, words in FIGURES.items():
        of = {column: _edited(next(m for m in metrics if m["name"] == name)) for column, metrics in columns.items()}
        own = next(m for m in first if m["name"] == name)
        base = "–" if name.startswith("kl") else cell(own, "base")
        lines.append(f"| {words} | {own['n']} | {base} | " + " | ".join(cell(m, "edited") for m in of.values()) + " |")
    return lines


def _edited(metric: dict[str, Any]) -> dict[str, Any]:
    """A metric whose interval is named like the base's."""
    return metric | {"edited_low": metric["low"], "edited_high": metric["high"]}


def spread(found: list[float]) -> str:
    """The median, and the least and most."""
    return f"{np.median(found):.1e} [{min(found):.1e}, {max(found):.1e}]"


def main() -> None:
    """Make both, measure both, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--bf16", type=Path)
    parser.add_argument("--edited", type=Path)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    base, out = chosen.file.expanduser(), chosen.edited or chosen.work / "out.gguf"
    if not out.exists():
        start, load = time.monotonic(), os.getloadavg()[0]
        abliterate.run(str(base), out)
        print(f"run: {time.monotonic() - start:.0f} s, load before {load:.2f}", file=sys.stderr, flush=True)
    records = out.with_name(records_of(out.name))
    record = json.loads((records / "run.json").read_text())
    naive, told = chosen.work / "naive.gguf", chosen.work / "naive.json"
    if not told.exists():
        naive.unlink(missing_ok=True)
        start = time.monotonic()
        left = requantised(base, Direction.load(records / "directions.safetensors"), naive)
        seconds = time.monotonic() - start
        found = verbs.evaluate(str(naive), str(base))
        told.write_text(json.dumps({"left": left, "seconds": seconds, "metrics": [m.as_dict for m in found.metrics]}))
    other = json.loads(told.read_text())
    ours: dict[str, list[float]] = defaultdict(list)
    tensors = open_checkpoint(base).tensors
    for edit in record["edits"]:
        ours[tensors[edit["tensor"]].dtype].append(edit["leak"])
    lines = ["| type | tensors | left by moving codes | left by requantising |", "| --- | --- | --- | --- |"]
    lines += [f"| {t} | {len(ours[t])} | {spread(ours[t])} | {spread(other['left'][t])} |" for t in sorted(ours)]
    columns = {"codes moved": record["metrics"], "requantised": other["metrics"]}
    if chosen.bf16 is not None:
        columns["bf16, transformers"] = json.loads((chosen.bf16 / "abliteration" / "run.json").read_text())["metrics"]
    steps = ", ".join(f"{name} {s:.0f}" for name, s in record["seconds"].items())
    text = "\n".join([*lines, "", *table(columns), "", f"Seconds of the run: {steps}."]) + "\n"
    (chosen.work / "gguf.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
