"""Speed and memory of collecting activations, beside a plain loop over hidden states and heretic's own collection.

uv run python bench/collect.py MODEL [--prompts 128] [--ways whole blockwise loop heretic] [--heretic PYTHON]

MODEL is a folder; `bench/generate.py 16 FOLDER --tokenizer` makes one of Llama-3.1-8B's shapes. Each way runs in a
process of its own on the same built-in prompts, half harmful, half harmless, all positions after the request. Speed is
in tokens of the rendered prompts, padding not counted. The rate is 2 x (parameters of the blocks) x tokens a second,
beside what one matrix product of the model's own width reaches in the same process. `heretic` needs a Python with
heretic-llm in it (`uv venv X; uv pip install --python X/bin/python heretic-llm`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH = 64


def resident() -> tuple[int, int]:
    """Resident and anonymous memory of this process now, in bytes."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss")
    )
    size = {name: 1024 * int(value.split()[0]) for name, value in fields.items()}
    return sum(size.values()), size["RssAnon"]


def measured(work: Callable[[], int]) -> dict[str, Any]:
    """Seconds of some work that returns how many tokens it ran, and the peak of memory meanwhile."""
    peak, done = [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[:] = (max(p, n) for p, n in zip(peak, resident(), strict=True))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {"seconds": seconds, "tokens": tokens, "resident": peak[0], "anonymous": peak[1]}


def matmul_rate(d_in: int, d_out: int, rows: int = 2048) -> float:
    """Operations a second of one product in bfloat16: the best of a few."""
    import torch

    x, w = torch.randn(rows, d_in, dtype=torch.bfloat16), torch.randn(d_out, d_in, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = max(best, 2 * rows * d_in * d_out / (time.perf_counter() - start))
    return best


def prompts(n: int) -> tuple[list[str], list[str]]:
    """Built-in requests, `n` of each kind."""
    from abliterate.prompts.load import builtin_splits

    harmful, harmless = (list(builtin_splits(kind).train.prompts[:n]) for kind in ("harmful", "harmless"))
    return harmful, harmless


def ours(model: Path, n: int, blockwise: bool) -> dict[str, Any]:
    """`collect` of both sets, loading included."""
    from abliterate.activations.collect import collect_sets
    from abliterate.model.load import load_model
    from abliterate.prompts import PromptSet

    sets = [PromptSet(str(i), tuple(p), ("",) * len(p)) for i, p in enumerate(prompts(n))]

    def work() -> int:
        loaded = load_model(model, device="cpu", dtype="bfloat16", memory=4 << 30 if blockwise else None)
        collect_sets(loaded, sets, BATCH)
        return sum(map(len, loaded.chat.encode([p for s in sets for p in s.prompts])))

    return measured(work)


def loop(model: Path, n: int) -> dict[str, Any]:
    """What one writes oneself: all hidden states of padded batches, the last tokens' kept."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [p for kind in prompts(n) for p in kind]

    def work() -> int:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        chats = [
            tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
            for t in texts
        ]
        tokens = 0
        with torch.inference_mode():
            for start in range(0, len(chats), BATCH):
                batch = tokenizer(chats[start : start + BATCH], return_tensors="pt", padding=True)
                states = loaded(**batch, output_hidden_states=True).hidden_states
                torch.stack([h[:, -5:] for h in states], 1).float()
                tokens += int(batch["attention_mask"].sum())
        return tokens

    return measured(work)


def heretic(model: Path) -> dict[str, Any]:
    """Its `get_residuals_batched`, its own loading included. Runs in an environment of its own."""
    from types import SimpleNamespace

    import torch
    from heretic.model import Model
    from heretic.utils import Prompt
    from transformers import AutoModelForCausalLM, AutoTokenizer

    harmful, harmless = json.loads(sys.stdin.read())

    def work() -> int:
        theirs = Model.__new__(Model)  # its loading needs a whole settings file; its collection is what is measured
        theirs.settings = SimpleNamespace(
            batch_size=BATCH, response_prefix="", winsorization_quantile=-1, offload_outputs_to_cpu=False
        )
        theirs.response_prefix = ""
        theirs.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        theirs.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        asked = [Prompt(system="You are a helpful assistant.", user=p) for p in [*harmful, *harmless]]
        theirs.get_residuals_batched(asked)
        chats = [
            theirs.tokenizer.apply_chat_template(
                [{"role": "system", "content": p.system}, {"role": "user", "content": p.user}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for p in asked
        ]
        return sum(len(ids) for ids in theirs.tokenizer(chats)["input_ids"])

    return measured(work)


def in_child(python: str, way: str, model: Path, n: int) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [python, str(Path(__file__).resolve()), str(model), "--prompts", str(n), "--only", way]
    done = subprocess.run(command, input=json.dumps(prompts(n)), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--ways", nargs="+", default=["whole", "blockwise", "loop"])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--heretic", default=sys.executable)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    model, n = chosen.model, chosen.prompts
    if chosen.only:
        config = json.loads((model / "config.json").read_text())
        run = {
            "whole": lambda: ours(model, n, False),
            "blockwise": lambda: ours(model, n, True),
            "loop": lambda: loop(model, n),
            "heretic": lambda: heretic(model),
        }[chosen.only]()
        print(json.dumps(run | {"rate": matmul_rate(config["hidden_size"], config["intermediate_size"])}))
        return
    parameters = block_parameters(model)
    print(f"{model.name}: {parameters / 1e9:.2f} billion parameters in the blocks; {n} + {n} prompts, bfloat16\n")
    print("| way | seconds | tokens/s | × matmul rate | × its time | peak resident, GB | anonymous, GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for way in chosen.ways:
        for _ in range(chosen.runs):
            found = in_child(chosen.heretic if way == "heretic" else sys.executable, way, model, n)
            speed = found["tokens"] / found["seconds"]
            share = 2 * parameters * speed / found["rate"]
            print(
                f"| {way} | {found['seconds']:.1f} | {speed:.1f} | {share:.2f} of {found['rate'] / 1e9:.0f} GFLOP/s | "
                f"{1 / share:.2f} | {found['resident'] / 1e9:.2f} | {found['anonymous'] / 1e9:.2f} |",
                flush=True,
            )


def block_parameters(model: Path) -> int:
    """How many numbers lie in the blocks."""
    from math import prod

    from abliterate.checkpoint import open_checkpoint

    return sum(prod(t.shape) for t in open_checkpoint(model).tensors.values() if ".layers." in t.name)


if __name__ == "__main__":
    main()
