"""One GGUF in llama.cpp and in transformers: do both say the same, and what does either take?

uv run python bench/engines.py FILE.gguf [--limit 16] [--dtype float32]

The built-in test prompts, harmful, harmless and borderline: verdicts and whole answers that are equal; on the harmless
ones KL(transformers‖llama.cpp) at the first token and along transformers' answers, and tokens on which both agree.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from abliterate.evaluate.evaluation import CONTINUATION
from abliterate.evaluate.judge import RULES
from abliterate.model.batches import batches
from abliterate.model.generate import Completion, generate
from abliterate.model.load import load_model
from abliterate.model.native import AnyModel, load_native
from abliterate.model.run import along, forward, kl_divergence, log_probs
from abliterate.prompts.load import builtin


def answers(model: AnyModel, prompts: list[str], tokens: int) -> tuple[list[Completion], float]:
    """Greedy answers, and the seconds of processor time that they took."""
    start = time.process_time()
    return generate(model, model.chat.encode(prompts), tokens, 64), time.process_time() - start


def loaded(load: Callable[[], AnyModel]) -> tuple[AnyModel, float]:
    """A model, and the seconds of processor time that loading took."""
    start = time.process_time()
    return load(), time.process_time() - start


def along_answers(model: AnyModel, rows: list[list[int]], texts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities `[tokens, n_vocab]` of the tokens of each text behind its row."""
    keep, found = max(map(len, texts)) + 1, dict[int, torch.Tensor]()
    whole = [row + text for row, text in zip(rows, texts, strict=True)]
    for batch, logits in forward(model, batches(model, whole, 8, keep), tokens=keep):
        found |= {i: log_probs(own[along(texts[i])]) for i, own in zip(batch.indices, logits, strict=True)}
    return [found[i] for i in range(len(rows))]


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    chosen = parser.parse_args()
    sets = [list(builtin(kind, "test").head(chosen.limit).prompts) for kind in ("harmful", "harmless", "borderline")]
    prompts = [p for own in sets for p in own]
    torch_model, torch_load = loaded(lambda: load_model(chosen.file, device="cpu", dtype=chosen.dtype))
    native, native_load = loaded(lambda: load_native(chosen.file))
    both = torch_model, native
    (ours, torch_seconds), (theirs, native_seconds) = (answers(m, prompts, chosen.tokens) for m in both)
    labels = [RULES([(p, c.text) for p, c in zip(prompts, made, strict=True)]) for made in (ours, theirs)]
    rows = torch_model.chat.encode(sets[1])
    kept = [i for i in range(len(rows)) if ours[len(sets[0]) + i].ids]
    texts = [ours[len(sets[0]) + i].ids[:CONTINUATION] for i in kept]
    p, q = (along_answers(m, [rows[i] for i in kept], texts) for m in both)
    kl = [kl_divergence(a, b).double().numpy() for a, b in zip(p, q, strict=True)]
    first, mean = np.array([k[0] for k in kl]), np.array([k.mean() for k in kl])
    alike = np.concatenate([(a.argmax(-1) == b.argmax(-1)).numpy() for a, b in zip(p, q, strict=True)])
    print(json.dumps({
        "file": chosen.file.name, "dtype": chosen.dtype, "prompts": len(prompts),
        "same tokens": torch_model.chat.encode(prompts) == native.chat.encode(prompts),
        "same verdict": sum(a == b for a, b in zip(*labels, strict=True)),
        "refusals": [made.count("refusal") for made in labels],
        "same answer": sum(a.ids == b.ids for a, b in zip(ours, theirs, strict=True)),
        "same likeliest token": [int(alike.sum()), len(alike)],
        "KL first": [float(first.mean()), float(np.quantile(first, 0.95))],
        "KL along": [float(mean.mean()), float(np.quantile(mean, 0.95))],
        "cpu seconds, transformers": {"loading": torch_load, "answers": torch_seconds},
        "cpu seconds, llama.cpp": {"loading": native_load, "answers": native_seconds},
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
