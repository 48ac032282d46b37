"""Time and memory of an edit, beside a copy of the folder and mergekit's pass over the same weights.

uv run python bench/edit.py WORKDIR [--sizes 1 4 16] [--runs 3]

For each size a checkpoint of Llama-3.1-8B's shapes is generated in WORKDIR (twice its size of disk is needed), then in
turn: `cp -r`; `abliterate edit` with and without its way back (undo); `mergekit-yaml` (from PyPI, in an environment of
its own), which scales the same matrices by one half. Before each run the disk is synchronised and, as root, the page
cache dropped: every run reads from disk. Prints a Markdown table of medians with least and most, and ratios to cp.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from generate import D_MODEL, generate

RECIPE = """\
merge_method: passthrough
dtype: bfloat16
slices:
  - sources:
      - model: {model}
        layer_range: [0, {layers}]
        parameters:
          scale:
            - {{filter: o_proj, value: 0.5}}
            - {{filter: down_proj, value: 0.5}}
            - {{filter: embed_tokens, value: 0.5}}
            - {{value: 1.0}}
"""


class Run(NamedTuple):
    """Seconds of wall time, and the peak of anonymous memory of the process and its children, in MB."""

    seconds: float
    memory: float


def anonymous(pid: int) -> int:
    """Anonymous memory of a process and all below it, in kB."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total += int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(anonymous(int(child)) for child in (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def measured(command: list[str], cold: bool) -> Run:
    """One run from a quiet disk."""
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    with tempfile.TemporaryFile() as said:
        start, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}: {said.read().decode()[-2000:]}")
    return Run(time.perf_counter() - start, peak / 1024)


def peer(workdir: Path) -> Path:
    """The programs of an environment with mergekit in it, made where it is not there."""
    home = workdir / "mergekit"
    if not home.exists():
        subprocess.run(["uv", "venv", "-q", str(home)], check=True)
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(home / "bin/python"), "mergekit"], check=True)
    return home / "bin"


def commands(model: Path, out: Path, recipe: Path, direction: Path, programs: Path) -> dict[str, list[str]]:
    """What is compared."""
    edit = [sys.executable, "-m", "abliterate", "edit", str(model), "--direction", str(direction), "-o", str(out)]
    return {
        "cp -r": ["cp", "-r", str(model), str(out)],
        "cp -r, and sync": ["sh", "-c", f"cp -r {model} {out} && sync"],
        "abliterate edit --no-undo": [*edit, "--no-undo"],
        "abliterate edit": edit,
        "mergekit-yaml": [str(programs / "mergekit-yaml"), str(recipe), str(out), "--no-copy-tokenizer", "--quiet"],
    }


def floors(programs: Path) -> dict[str, Run]:
    """What the imports alone take."""
    ours = [sys.executable, "-c", "import abliterate.at_rest"]
    theirs = [str(programs / "python"), "-c", "import mergekit.merge"]
    return {"abliterate edit": measured(ours, False), "mergekit-yaml": measured(theirs, False)}


def main() -> None:
    """Measure all sizes and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    cold = os.geteuid() == 0
    direction = chosen.workdir / "direction.npy"
    chosen.workdir.mkdir(parents=True, exist_ok=True)
    np.save(direction, np.random.default_rng(1).normal(size=D_MODEL))
    programs = peer(chosen.workdir)
    least = floors(programs)
    print(f"imports alone: {', '.join(f'{k} {v.seconds:.1f} s, {v.memory:.0f} MB' for k, v in least.items())}\n")
    for size in chosen.sizes:
        model, out = chosen.workdir / f"model-{size:g}", chosen.workdir / "out"
        if not model.exists():
            generate(size, model)
        recipe = chosen.workdir / "recipe.yml"
        recipe.write_text(RECIPE.format(model=model, layers=_layers(model)))
        found: dict[str, list[Run]] = {}
        for _ in range(chosen.runs):
            for name, command in commands(model, out, recipe, direction, programs).items():
                shutil.rmtree(out, ignore_errors=True)
                found.setdefault(name, []).append(measured(command, cold))
        shutil.rmtree(out, ignore_errors=True)
        print(table(size, model, found, chosen.runs, cold), flush=True)
        shutil.rmtree(model)


def _layers(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["num_hidden_layers"])


def table(size: float, model: Path, found: dict[str, list[Run]], runs: int, cold: bool) -> str:
    """One size in Markdown."""
    nbytes = sum(p.stat().st_size for p in model.iterdir())
    copy = statistics.median(run.seconds for run in found["cp -r"])
    lines = [
        f"### {size:g} GB ({nbytes / 1e9:.2f} GB on disk, n = {runs}, {'cold' if cold else 'warm'} page cache)\n",
        "| command | seconds, median [least, most] | × cp -r | peak anonymous memory, MB |",
        "| --- | --- | --- | --- |",
    ]
    for name, all_runs in found.items():
        times = sorted(run.seconds for run in all_runs)
        middle = statistics.median(times)
        memory = max(run.memory for run in all_runs)
        lines.append(
            f"| `{name}` | {middle:.1f} [{times[0]:.1f}, {times[-1]:.1f}] | {middle / copy:.2f} | {memory:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
