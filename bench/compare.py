"""Does `compare` recognise edits by several tools: changed matrices, direction, strength; with its time and memory?

uv run python bench/compare.py MODEL [--heretic PYTHON] [--folder WORK]

MODEL is a folder. Each tool takes the same random direction out of it: ours (`edit`), the formula of most scripts
(`W - r (r^T W)` in the weights' own type, blocks only), the same at a fifth of its strength, and heretic's own code at
weights that fall towards the ends, where some layers are left alone, saved as it saves them. `heretic` needs a Python
with heretic-llm in it (`uv venv X; uv pip install --python X/bin/python heretic-llm`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def by_formula(model: Path, out: Path, r: np.ndarray[Any, Any], strength: float) -> set[str]:
    """A copy with every attention and MLP output projected; the names of what was changed."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.gguf"))
    named = set()
    for shard in sorted(out.glob("*.safetensors")):
        tensors = load_file(shard)
        for name, w in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                d = torch.from_numpy(r).to(w.dtype)
                tensors[name] = w - strength * torch.outer(d, d @ w)
                named.add(name)
        save_file(tensors, shard, {"format": "pt"})
    return named


def by_heretic(model: Path, out: Path, r: Path) -> None:
    """Heretic's edit at weights of its own form, merged and saved by transformers. Runs in its environment."""
    import torch
    from heretic.config import RowNormalization
    from heretic.model import AbliterationParameters, Model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    peer: Any = Model.__new__(Model)
    peer.model, peer.settings = loaded, SimpleNamespace(row_normalization=RowNormalization.NONE)
    peer._apply_lora()
    n = len(peer.get_layers())
    kinds = {name for i in range(n) for name in peer.get_layer_modules(i)}
    falling = AbliterationParameters(
        max_weight=1.1, max_weight_position=0.6 * n, min_weight=0.3, min_weight_distance=0.5 * n
    )
    directions = torch.from_numpy(np.load(r)).float().repeat(n + 1, 1)
    peer.abliterate(directions, None, dict.fromkeys(kinds, falling))
    peer.model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def compared(model: Path, out: Path, r: Path) -> tuple[dict[str, Any], float, float]:
    """What `compare` says, its seconds and peak memory in MB, in a process of its own."""
    code = (
        "import sys; from abliterate.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "compare", str(model), str(out), "--direction", str(r), "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - start, int(done.stderr.split()[-1]) / 1e3


def main() -> None:
    """Edit with each tool, compare, and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--heretic", help="a Python with heretic-llm")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        by_heretic(chosen.model, *chosen.only)
        return
    from abliterate import at_rest
    from abliterate.checkpoint import open_checkpoint

    d_model = int(open_checkpoint(chosen.model).config["hidden_size"])
    print("| edited by | changed, named | rank | cosine | strengths | explained | seconds | peak MB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=chosen.folder) as work:
        r = np.random.default_rng(0).normal(size=d_model).astype(np.float32)
        r /= np.linalg.norm(r)
        file = Path(work) / "r.npy"
        np.save(file, r)
        made: dict[str, set[str]] = {}
        record = at_rest.edit(str(chosen.model), file, Path(work) / "abliterate", undo=False)
        made["abliterate"] = {e["tensor"] for e in record.edits}
        made["formula"] = by_formula(chosen.model, Path(work) / "formula", r, 1.0)
        made["formula, 0.2"] = by_formula(chosen.model, Path(work) / "formula, 0.2", r, 0.2)
        if chosen.heretic:
            command = [chosen.heretic, __file__, str(chosen.model), "--only", str(Path(work) / "heretic"), str(file)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            n = int(open_checkpoint(chosen.model).n_layers)
            made["heretic"] = {t for t in made["formula"] if abs(int(t.split(".")[2]) - 0.6 * n) <= 0.5 * n}
        for tool, names in made.items():
            found, seconds, memory = compared(chosen.model, Path(work) / tool, file)
            told = {t["tensor"] for t in found["changed"]}
            ranks = sorted({t["rank"] or 99 for t in found["changed"]})
            strengths = sorted(t["strength"] for t in found["changed"])
            right = "exactly" if told == names else f"{len(told & names)} and {len(told - names)} others"
            print(
                f"| {tool} | {len(names)}, {right} | {ranks[0]}–{ranks[-1]} | {min(found['cosines']):.5f} | "
                f"{strengths[0]:.2f}–{strengths[-1]:.2f} | {found['explained']:.1%} | {seconds:.1f} | {memory:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
