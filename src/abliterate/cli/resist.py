"""`abliterate resist`: how much of a model's refusal survives directions taken out of it."""

from __future__ import annotations

from typing import Annotated

import typer

from abliterate.cli import console, options

EPILOG = """
[bold]Examples[/bold]

  abliterate resist demo --directions 2

  abliterate resist org/model-v2 --judge classifier --json
"""


def resist(
    model: options.Model,
    directions: Annotated[
        int, typer.Option(metavar="K", help="The most directions that are taken out at once (at most 8).")
    ] = 8,
    max_kl: Annotated[
        float, typer.Option(help="Most KL on harmless prompts, in nats, at which a point of the curve counts.")
    ] = options.DEFAULT.max_kl,
    harmful: options.Harmful = None,
    harmless: options.Harmless = None,
    limit: options.Limit = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the random directions, and of the split of your own prompt sets.",
            rich_help_panel="Prompts",
        ),
    ] = 0,
    system_prompt: options.SystemPrompt = None,
    chat_template: options.ChatTemplate = None,
    thinking: options.Thinking = "template",
    embeddings: options.Embeddings = "edit",
    device: options.Device = None,
    dtype: options.Dtype = None,
    memory: options.Memory = None,
    batch_size: options.BatchSize = options.DEFAULT.batch_size,
    max_new_tokens: options.MaxNewTokens = options.DEFAULT.max_new_tokens,
    judge: options.Judge = None,
    judge_model: options.JudgeModel = None,
    as_json: options.Json = False,
) -> None:
    """How much of MODEL's refusal survives 1, 2, 4 and 8 directions: a curve over KL, and one figure. Edits nothing.

    Each direction is found with those before it ablated; as many random ones are the control. Resistance is the least
    share of MODEL's own refusals of test prompts that survives, at a KL of the first token of --max-kl or less.
    """
    from abliterate.report.table import print_resistance
    from abliterate.verbs import resist as resist_verb

    with console.progress_bars() as steps:
        found = resist_verb(
            model, steps=steps, directions=directions, max_kl=max_kl, harmful=harmful, harmless=harmless, limit=limit,
            seed=seed, system_prompt=system_prompt, chat_template=str(chat_template) if chat_template else None,
            thinking=thinking, embeddings=embeddings, device=device, dtype=dtype, memory=memory,
            batch_size=batch_size, max_new_tokens=max_new_tokens, judge=judge, judge_model=judge_model,
        )  # fmt: skip
    if as_json:
        console.print_json(found.as_dict)
    else:
        print_resistance(console.stdout(), found.as_dict)
