"""`abliterate collect`: step 1 alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from abliterate.cli import console, options
from abliterate.envelope import enveloped
from abliterate.report.layout import say

if TYPE_CHECKING:
    from abliterate.verbs import Collected

EPILOG = """
[bold]Examples[/bold]

  abliterate collect demo -o demo-activations

  abliterate collect ./my-model -o acts --harmful refused.txt --harmless answered.txt

  abliterate collect ./large-model -o part-0 --prompts 0/2 --memory 8GiB

  abliterate collect --merge part-0 part-1 -o acts
"""


def collect(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="A Hugging Face folder, a hub id or demo; with --merge the folders of all parts."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.", metavar="OUT")],
    harmful: options.Harmful = None,
    harmless: options.Harmless = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    thinking: options.Thinking = "template",
    device: options.Device = None,
    dtype: options.Dtype = None,
    memory: options.Memory = None,
    no_generate: options.NoGenerate = False,
    batch_size: options.BatchSize = options.DEFAULT.batch_size,
    force: options.Force = False,
    prompts: Annotated[
        Optional[str],
        typer.Option(metavar="I/N", help="Only the I-th (from 0) of N parts of the prompts, for several machines."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put the statistics of parts together; runs nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted collection.")] = False,
    as_json: options.Json = False,
) -> None:
    """Step 1: mean and variance of the residual stream of MODEL over the prompts that show its refusal.

    OUT gets harmful.safetensors and harmless.safetensors, each n_layers x n_positions x d_model, and
    observed.json: which prompts were declined or answered and which tokens open a refusal. No text is kept.
    """
    if merge:
        from abliterate.verbs import merge as merge_verb

        _say(merge_verb(list(models), output), output, as_json)
        return
    if len(models) != 1:
        raise typer.BadParameter("give one MODEL, or --merge and the folders of all parts")
    from abliterate.verbs import collect as collect_verb

    hint = f"interrupted; the same command with --resume goes on with it (kept in {output}.partial)"
    with console.progress_bars(hint) as steps:
        found = collect_verb(
            models[0], output, resume=resume, steps=steps, prompts=prompts,
            harmful=harmful, harmless=harmless, limit=limit, seed=seed, system_prompt=system_prompt,
            chat_template=str(chat_template) if chat_template else None, thinking=thinking,
            device=device, dtype=dtype, memory=memory, generate=not no_generate,
            batch_size=batch_size, force=force,
        )  # fmt: skip
    _say(found, output, as_json)


def _say(found: Collected, output: Path, as_json: bool) -> None:
    n_layers, n_positions, d_model = found.harmful.mean.shape
    if as_json:
        console.print_json(enveloped("activations", {
            "output": str(output), "n_layers": n_layers, "n_positions": n_positions, "d_model": d_model,
            "harmful": found.harmful.count, "harmless": found.harmless.count,
            "refused": found.observed.refused, "asked": found.observed.asked,
        }))  # fmt: skip
    else:
        of = ("harmful", "harmless") if not found.observed.tokens else ("declined harmful", "answered harmless")
        say(
            console.stdout(),
            f"{output}: {n_layers} layers, {n_positions} positions, d_model {d_model}; means over "
            f"{found.harmful.count} {of[0]} and {found.harmless.count} {of[1]} prompts",
        )
