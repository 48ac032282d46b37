"""`abliterate collect`: step 1 alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import console, options

EPILOG = """
[bold]Examples[/bold]

  abliterate collect demo -o demo-activations

  abliterate collect ./my-model -o acts --harmful refused.txt --harmless answered.txt
"""


def collect(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.", metavar="OUT")],
    harmful: options.Harmful = None,
    harmless: options.Harmless = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = options.DEFAULT.batch_size,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Step 1: mean and variance of the residual stream of MODEL over the prompts that show its refusal.

    OUT gets harmful.safetensors and harmless.safetensors, each n_layers x n_positions x d_model, and
    observed.json: which prompts were declined or answered and which tokens open a refusal. No text is kept.
    """
    from abliterate.verbs import collect as collect_verb

    with console.progress_bars() as steps:
        found = collect_verb(
            model, output, steps=steps,
            harmful=harmful, harmless=harmless, limit=limit, seed=seed, system_prompt=system_prompt,
            chat_template=str(chat_template) if chat_template else None, device=device, dtype=dtype,
            batch_size=batch_size, force=force,
        )  # fmt: skip
    n_layers, n_positions, d_model = found.harmful.mean.shape
    if as_json:
        console.print_json({
            "output": str(output), "n_layers": n_layers, "n_positions": n_positions, "d_model": d_model,
            "harmful": found.harmful.count, "harmless": found.harmless.count,
            "refused": found.observed.refused, "asked": found.observed.asked,
        })  # fmt: skip
    else:
        of = ("harmful", "harmless") if not found.observed.tokens else ("declined harmful", "answered harmless")
        console.stdout().print(
            f"{output}: {n_layers} layers, {n_positions} positions, d_model {d_model}; means over "
            f"{found.harmful.count} {of[0]} and {found.harmless.count} {of[1]} prompts"
        )
